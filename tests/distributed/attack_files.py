"""Part C of `benchmarks/attack.py`: hostile files, which have to be read as before, or refused.

A case is one mutation of one file that zods reads: bytes cut, zeroed, flipped or inserted, numbers
of 400 digits, lists in 100,000 lists, lines of 50 MB, other encodings, a folder or a pipe in place
of the file. The code that reads the file runs in a forked process with limits on time and memory.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.distributed.attack_mutations import (
    MUTATIONS,
    is_no_csv,
    is_no_json,
    is_no_json_lines,
    is_no_safetensors,
    is_no_text,
)
from tests.distributed.attack_verdicts import Verdict

CPU_SECONDS = 30  # of processor time, of one case
IDLE_SECONDS = 15  # without any processor time: it waits for ever, as for a pipe's other end
MEMORY = 3 << 30  # bytes of address space above that of the imports
RUN = Path("run")
SAVED = RUN / "checkpoints" / "global_step6"


# --- files that are read --------------------------------------------------------------------------


@dataclass(frozen=True)
class FileKind:
    """A file that zods reads.

    path: in the folder of the specimens. read: reads it as zods does, and returns what it found, as
    text; it raises, or ends with a message and an exit code, where zods refuses the file.
    is_protected: the file has a checksum, so that no other content may be accepted. invalid:
    whether bytes break the rules of the file's format.
    """

    name: str
    path: str
    read: Callable[[Path], str]
    is_protected: bool = False
    invalid: Callable[[bytes], bool] = lambda data: False


class Refused(Exception):
    """The file is refused, and the reason is printed."""


def digest(value: Any) -> str:
    text = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True, default=str)
    data = text if isinstance(text, bytes) else text.encode(errors="surrogatepass")
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _words(folder: Path, file: str = "train.jsonl", model: str = "model") -> list[str]:
    from tests.distributed.command_line import prompted_options

    return prompted_options(
        folder, folder / "new", max_length=24, max_steps=4, model=folder / model,
        train_file=folder / file,
    )  # fmt: skip


def _checked(folder: Path, words: Sequence[str], loads: bool = False) -> str:
    """Check the input as a start does; with `loads`, load the model too."""
    from zods.cli.arguments import parse_arguments
    from zods.cli.load_model import load_model
    from zods.comm.process import report_failure
    from zods.finetune import check_input

    arguments = parse_arguments(list(words))
    try:
        one_rank: Any = SimpleNamespace(rank=0, world_size=1)
        watchdog: Any = SimpleNamespace(beat=lambda what, limit: None)
        checked = check_input(arguments, one_rank, watchdog)
        found = [
            checked.run.to_dict(), arguments.to_dict(), checked.data.train.to_dict(),
            checked.data.held_out.to_dict(), checked.pretrained.config.to_dict(),
        ]  # fmt: skip
        if loads:
            model, _ = load_model(
                arguments.model, checked.run, checked.data.task, checked.pretrained
            )
            found += [digest(p.detach().float().numpy().tobytes()) for p in model.parameters()]
    except Exception as error:
        sys.exit(report_failure(error, "zods.finetune"))
    return digest(json.dumps(found, default=str).replace(str(folder), ""))


def _data(file: str) -> Callable[[Path], str]:
    return lambda folder: _checked(folder, _words(folder, file))


def _model(model: str) -> Callable[[Path], str]:
    return lambda folder: _checked(folder, _words(folder, model=model), loads=True)


def _read_log(folder: Path) -> str:
    """Verify and inspect the log. A log that ends earlier, at a record, is as good."""
    from zods.trajectory.__main__ import main
    from zods.trajectory.log import read_log

    path = folder / RUN / "trajectory.log"
    for command in ("verify", "inspect"):
        if main([command, str(path)]) > 1:
            raise Refused
    whole = read_log(_specimens(folder) / RUN / "trajectory.log").heads
    found = read_log(path).heads
    return "as before" if found == whole[: len(found)] else f"other records: {found}"


def _read_checkpoints(folder: Path) -> str:
    """Take the newest good checkpoint, as a resume does."""
    import torch

    from zods.params.shards import Shard
    from zods.training.checkpoint_files import ShardFiles, newest_checkpoints, read_state

    specimen = json.loads((_specimens(folder) / SAVED / "state.json").read_text())
    shards = []
    for ordinal, (name, shape, dtype) in enumerate(specimen["parameters"]):
        numel = torch.Size(shape).numel()
        kind = getattr(torch, dtype.removeprefix("torch."))
        shards.append(Shard(name, ordinal, None, kind, tuple(shape), 0, numel, numel))
    found, left_out = newest_checkpoints(folder / RUN / "checkpoints")
    for reason in left_out:
        print(f"zods: error: {reason}")
    for checkpoint in found:
        try:
            state = read_state(checkpoint)
            files = ShardFiles(checkpoint, "parameters", shards, state.get("files"))
            tensors = [digest(files.read(shard).numpy().tobytes()) for shard in shards]
        except (ValueError, OSError) as error:
            left_out.append(str(error))
            print(f"zods: error: {error}")
            continue
        older = checkpoint.name != SAVED.name
        if older and left_out and digest(state) == _state_of(folder, checkpoint.name):
            raise Refused
        return digest([state, tensors])
    raise Refused


def _state_of(folder: Path, name: str) -> str:
    from zods.training.checkpoint_files import read_state

    return digest(read_state(_specimens(folder) / SAVED.parent / name))


def _read_latest(folder: Path) -> str:
    from zods.finetune import checkpoint_to_fork
    from zods.training.checkpoint_files import read_state

    try:
        found = checkpoint_to_fork(folder / RUN)
        return str(read_state(found)["global_steps"])
    except (ValueError, OSError) as error:
        print(f"zods: error: {error}")
        raise Refused from error


def _read_metrics(folder: Path) -> str:
    """Continue a run's metrics after step 7: each step must have one line that can be read."""
    from zods.cli.run_folder import RunFolder, read_metrics

    try:
        run = RunFolder(folder / RUN, rank=0, resume=True)
        run.describe({}, arguments={}, seed=1, world_size=1, device="cpu", step=7, has_begun=True)
        run.evaluation_at(0)
        records = list(read_metrics(folder / RUN))
    except (ValueError, OSError) as error:
        print(f"zods: error: {error}")
        raise Refused from error
    steps = [record["step"] for record in records if record["kind"] == "train"]
    return "as before" if steps == list(range(1, 8)) else f"lines of the steps {steps}"


def _read_first_order(folder: Path) -> str:
    """Check a checkpoint of first-order training, as a resume on one rank does."""
    import torch

    from zods.comm.communicator import Communicator
    from zods.training.first_order_checkpoint import check, checkpoints_in, unsealed_in

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        found = checkpoints_in(folder / "first order")
        left_out = unsealed_in(folder / "first order")
        if not found or left_out:
            raise ValueError(f"not whole: {left_out}")
        check(found[0], Communicator(torch.device("cpu")))
    except (ValueError, OSError) as error:
        print(f"zods: error: {error}")
        raise Refused from error
    return digest([digest(path.read_bytes()) for path in sorted(found[0].glob("*.pt"))])


def _specimens(folder: Path) -> Path:
    return Path((folder / "specimens").read_text())


def _yaml_words(folder: Path) -> str:
    return _checked(folder, [str(folder / "run.yaml"), *_words(folder)])


FILES: list[FileKind] = [
    FileKind("configuration", "config.json", _data("train.jsonl"), invalid=is_no_text),
    FileKind("run file", "run.yaml", _yaml_words, invalid=is_no_text),
    FileKind("data, jsonl", "train.jsonl", _data("train.jsonl"), invalid=is_no_json_lines),
    FileKind("data, json", "list.json", _data("list.json"),
             invalid=lambda data: is_no_json(data) and is_no_json_lines(data)),
    FileKind("data, csv", "train.csv", _data("train.csv"), invalid=is_no_csv),
    FileKind("data, tsv", "train.tsv", _data("train.tsv"), invalid=is_no_text),
    FileKind("data, jsonl.gz", "train.jsonl.gz", _data("train.jsonl.gz"), is_protected=True),
    FileKind("data, parquet", "train.parquet", _data("train.parquet")),
    FileKind("data, txt", "train.txt", _data("train.txt"), invalid=lambda data: True),
    FileKind("model, config.json", "model/config.json", _model("model"), invalid=is_no_json),
    FileKind("tokenizer.json", "model/tokenizer.json", _model("model"), invalid=is_no_json),
    FileKind("tokenizer_config.json", "model/tokenizer_config.json", _model("model"),
             invalid=is_no_json),
    FileKind("generation_config.json", "model/generation_config.json", _model("model")),
    FileKind("model.safetensors", "model/model.safetensors", _model("model"),
             invalid=is_no_safetensors),
    FileKind("adapter_config.json", "adapter/adapter_config.json", _model("adapter"),
             invalid=is_no_json),
    FileKind("adapter_model.safetensors", "adapter/adapter_model.safetensors", _model("adapter"),
             invalid=is_no_safetensors),
    FileKind("trajectory.log", "run/trajectory.log", _read_log, is_protected=True),
    FileKind("metrics.jsonl", "run/metrics.jsonl", _read_metrics, is_protected=True),
    FileKind("state.json", str(SAVED / "state.json"), _read_checkpoints, is_protected=True),
    FileKind("shards", str(SAVED / "parameters-rank00001-of-00002.safetensors"),
             _read_checkpoints, is_protected=True),
    FileKind("latest", "run/checkpoints/latest", _read_latest, is_protected=True),
    FileKind("first order, zods.json", "first order/global_step6/zods.json", _read_first_order,
             is_protected=True),
    FileKind("first order, states", "first order/global_step6/mp_rank_00_model_states.pt",
             _read_first_order, is_protected=True),
]  # fmt: skip


def make_specimens(folder: Path, runs: dict[str, Path], model: Path) -> None:
    """Write one good file of each kind. runs: folders of runs, "zeroth", "first" and "adapter"."""
    import pyarrow.json
    import pyarrow.parquet
    import yaml

    if (folder / "made").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copytree(model, folder / "model")
    shutil.copytree(runs["zeroth"] / "run", folder / "run")
    shutil.copytree(runs["first"] / "run" / "checkpoints", folder / "first order")
    shutil.copytree(runs["adapter"] / "run" / "model", folder / "adapter")
    rows = [
        {"text": f'return "{i}", café', "label": ("code", "text")[i % 2], "n": i} for i in range(24)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(lines)
    (folder / "train.txt").write_text(lines)
    (folder / "list.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    (folder / "train.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    for name, delimiter in (("train.csv", ","), ("train.tsv", "\t")):
        with open(folder / name, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    table = pyarrow.json.read_json(io.BytesIO(lines.encode()))
    pyarrow.parquet.write_table(table, folder / "train.parquet")
    section = {"method": "mezo_svrg", "lr": 1e-3, "anchor": {"point": "cpu", "gradient": "cpu"}}
    selector = {"candidates": 16, "num_directions": 4}
    config = {"train_batch_size": 8, "zeroth_order": {**section, "selector": selector}}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    options = {"lr": 1e-4, "task": "prompted", "held_out": 0.2, "save_model": True, "eps": 1e-3}
    (folder / "run.yaml").write_text(yaml.safe_dump(options))
    (folder / "made").touch()


# --- cases ----------------------------------------------------------------------------------------


def _put(case: Path, kind: FileKind, mutation: str, data: bytes) -> None:
    """Make the folder of a case: links to the specimens, and the mutated file."""
    path = case / kind.path
    path.unlink()
    if mutation == "a folder":
        path.mkdir()
    elif mutation == "a named pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(data)


def _link(specimens: Path, case: Path) -> None:
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(specimens, case, copy_function=os.symlink)
    (case / "specimens").write_text(str(specimens))


def _child(case: Path, kind: FileKind) -> None:
    """Read the file, and leave `found` if it is accepted. Ends the process."""
    output = os.open(case / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, in_use + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
    code = 0
    try:
        found = kind.read(case)
        (case / "found").write_text(found)
    except Refused:
        code = 2
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _read_forked(case: Path, kind: FileKind) -> tuple[str, str]:
    """Read a file in a forked process: (how it ended, what was accepted or the output)."""
    process = os.fork()
    if process == 0:
        _child(case, kind)
    used, worked = b"", time.monotonic()
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            break
        now = b"".join(Path(f"/proc/{process}/stat").read_bytes().split()[13:15])
        if now != used:
            used, worked = now, time.monotonic()
        if time.monotonic() > worked + IDLE_SECONDS:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return "hangs", "it waits without end"
        time.sleep(0.01)
    output = (case / "output").read_text(errors="replace")
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number in (signal.SIGXCPU, signal.SIGKILL):
            return "hangs", f"over {CPU_SECONDS} s of processor time"
        return "crashes", f"signal {number}: {output[-300:]}"
    if "MemoryError" in output or "bad_alloc" in output:
        return "memory", output
    if "Traceback (most recent call last)" in output:
        return "traceback", output
    if (case / "found").exists():
        return "accepted", (case / "found").read_text()
    return ("refused" if "error:" in output else "no message"), output


def _worker(specimens: Path, work: Path, kind: int, cases: Sequence[int], seed: int) -> None:
    """Run the cases of a kind of file, and write their results to `work`/results."""
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):
        import peft  # noqa: F401
    file, case = FILES[kind], work / "case"
    data = (specimens / file.path).read_bytes()
    _link(specimens, case)
    expected = _read_forked(case, file)
    results = []
    for k in cases:
        rng = random.Random(f"{seed} {file.name} {k}")
        # each kind begins with other mutations, so that few cases try all of them together
        mutation = list(MUTATIONS)[(k + 7 * kind) % len(MUTATIONS)]
        changed = MUTATIONS[mutation](rng, data)
        _link(specimens, case)
        _put(case, file, mutation, changed)
        how, found = _read_forked(case, file)
        if how == "accepted":
            is_file = mutation not in ("a folder", "a named pipe")
            wrong = file.is_protected or not is_file or file.invalid(changed)
            how = "as before" if found == expected[1] else "silent" if wrong else "other content"
        result = {"case": k, "mutation": mutation, "how": how, "found": found[-600:]}
        results.append(result)
        if how in FAILURES and changed:
            kept = work / "failures" / f"{Path(file.path).name} {k}"
            kept.parent.mkdir(exist_ok=True)
            kept.write_bytes(changed[:1_000_000])
    shutil.rmtree(case)
    (work / "results").write_text(json.dumps({"expected": expected, "results": results}))


FAILURES = ("silent", "traceback", "hangs", "memory", "crashes", "no message")


def hostile_files(
    context: Any, specimens: Path, work: Path, name: str, cases: Sequence[int], seed: int
) -> Verdict:
    """The verdict on the cases of a kind of file.

    context: of multiprocessing; its processes have the imports made.
    """
    kind = next(k for k, file in enumerate(FILES) if file.name == name)
    (work / "results").unlink(missing_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    worker: multiprocessing.Process = context.Process(
        target=_worker, args=(specimens, work, kind, cases, seed), daemon=True
    )
    worker.start()
    worker.join()
    if worker.exitcode:
        return Verdict("", failure=f"the cases themselves failed with {worker.exitcode}")
    report = json.loads((work / "results").read_text())
    results = report["results"]
    how, found = report["expected"]
    if how != "accepted" and name != "data, txt":
        return Verdict("", failure=f"the good file is not accepted: {how}", details=found[-3000:])
    counts = Counter(result["how"] for result in results)
    outcome = f"{len(results)} files: " + ", ".join(f"{n} {how}" for how, n in counts.items())
    failing = [result for result in results if result["how"] in FAILURES]
    odd = sum(counts[how] for how in FAILURES[2:])
    return Verdict(
        outcome,
        counts["silent"],
        counts["traceback"],
        f"{outcome}" if odd else "",
        "\n".join(json.dumps(result) for result in failing[:12]),
    )

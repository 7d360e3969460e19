"""The files that `python -m zods.trajectory` reads and writes: links, pipes, full disks, damage."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.disks import Syncs, fill, small_disk, within
from zods.config.schema import parse_section
from zods.files import make_folder
from zods.kernels import fingerprint
from zods.trajectory.__main__ import main
from zods.trajectory.log import START, LogFile, Trajectory, chained
from zods.trajectory.records import Header, ParameterRecord, RunRecord, Step
from zods.trajectory.replay import replay

TOKENIZER = json.dumps({"words": ["word"] * 3000})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base of two tensors with a configuration and a tokenizer."""
    tensors = {"matrix": torch.arange(6.0).view(3, 2), "bias": torch.ones(3)}
    folder = tmp_path / "base"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "opt", "torch_dtype": "float16"}')
    (folder / "tokenizer.json").write_text(TOKENIZER)
    return folder


@pytest.fixture
def log(base: Path, tmp_path: Path) -> Path:
    """A log of two steps from the base."""
    tensors = load_file(base / "model.safetensors")
    entries = tuple(
        ParameterRecord(name, tuple(value.shape), "float32", True, fingerprint(value.view(-1)))
        for name, value in tensors.items()
    )
    trajectory = Trajectory()
    trajectory.file = LogFile(tmp_path / "log")
    trajectory.add(Header("OPTForCausalLM", entries))
    trajectory.add(RunRecord(0, parse_section({"method": "mezo"}), 8, 1))
    for step in range(2):
        trajectory.add(Step(step, 0.5, 1e-2, (0.5,)))
    trajectory.wait()
    trajectory.file.close()
    return tmp_path / "log"


@pytest.fixture
def syncs() -> Iterator[Syncs]:
    syncs = Syncs()
    yield syncs
    syncs.close()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def command(name: str, base: Path, log: Path, out: Path) -> list[str]:
    return {
        "inspect": ["inspect", str(log)],
        "verify": ["verify", str(log)],
        "diff": ["diff", str(log), str(log)],
        "merge": ["merge", str(log), str(log), "--out", str(out)],
        "replay": ["replay", "--base", str(base), "--log", str(log), "--out", str(out)],
    }[name]


def errors_of(capsys: Any) -> list[str]:
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return [line for line in said.splitlines() if "error: " in line]


# --- written --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["merge", "replay"])
def test_what_a_command_writes_is_synced_with_its_folders(base, log, tmp_path, syncs, name):
    make_folder(tmp_path / "outs")
    out = tmp_path / "outs" / "new" / "out" if name == "replay" else tmp_path / "outs" / "merged"
    assert main(command(name, base, log, out)) == 0
    assert syncs.unsynced(tmp_path / "outs") == []


@pytest.mark.launched
@pytest.mark.parametrize("name", ["merge", "replay"])
def test_a_full_disk_is_one_error_that_names_it_and_leaves_whole_files(
    base, log, tmp_path, capsys, name
):
    (tmp_path / "whole").mkdir()
    assert main(command(name, base, log, tmp_path / "whole" / "out")) == 0
    whole = content(tmp_path / "whole" / "out" if name == "replay" else tmp_path / "whole")
    with small_disk(tmp_path / "disk", 256) as disk:
        full = 0
        for pages in range(20):
            fill(disk, pages)
            capsys.readouterr()
            code = main(command(name, base, log, disk / "out"))
            written = disk / "out" if name == "replay" else disk
            found = {} if not written.exists() else content(written)
            found.pop("filler", None)
            if code == 0:
                break
            full += 1
            (error,) = errors_of(capsys)
            assert "No space left" in error
            assert str(disk / "out") in error or str(disk / ".out") in error
            for path, data in found.items():
                assert data == whole[path], (pages, path)
            shutil.rmtree(disk / "out", ignore_errors=True)
        assert full >= 1
        assert found == whole


# --- the base -------------------------------------------------------------------------------------


def test_links_of_the_hubs_cache_become_files(base, log, tmp_path):
    blobs, snapshot = tmp_path / "models--a" / "blobs", tmp_path / "models--a" / "snapshots" / "1"
    base.rename(tmp_path / "plain")
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted((tmp_path / "plain").iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    replay(snapshot, log, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == TOKENIZER
    assert (tmp_path / "out" / "config.json").is_file()
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_links_to_other_places_and_pipes_are_left_out_with_the_reason(base, log, tmp_path, caplog):
    (tmp_path / "secret").write_text("a key")
    (base / "key.txt").symlink_to(tmp_path / "secret")
    (base / "loop.txt").symlink_to(base / "loop.txt")
    (base / "own.txt").symlink_to("tokenizer.json")
    os.mkfifo(base / "pipe.txt")
    with within(60):
        replay(base, log, tmp_path / "out")
    written = content(tmp_path / "out")
    assert set(written) == {"model.safetensors", "config.json", "tokenizer.json", "own.txt"}
    assert b"a key" not in written.values()
    for name, reason in (
        ("key.txt", f"a link to {tmp_path}/secret, outside"),
        ("loop.txt", "no regular file"),
        ("pipe.txt", "no regular file"),
    ):
        assert f"{base / name}: not copied: it is {reason}" in caplog.text


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000, "", "\xff"])
def test_a_damaged_configuration_is_an_error_before_anything_is_written(
    base, log, tmp_path, capsys, text
):
    (base / "config.json").write_bytes(text.encode("latin-1"))
    assert main(command("replay", base, log, tmp_path / "out")) == 2
    (error,) = errors_of(capsys)
    assert str(base / "config.json") in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{", '{"weight_map": 5}', '{"weight_map": {"x": 1}}']
)
def test_a_damaged_index_is_one_error(base, log, tmp_path, capsys, text):
    (base / "model.safetensors.index.json").write_text(text)
    assert main(command("replay", base, log, tmp_path / "out")) == 2
    (error,) = errors_of(capsys)
    assert f"--base {base}: damaged" in error


# --- hostile logs ---------------------------------------------------------------------------------


def log_of(*texts: str) -> bytes:
    """A log of these texts whose checksums are right."""
    lines, head = [], START
    for text in texts:
        head = chained(head, text)
        lines.append(f"{head} {text}\n")
    return "".join(lines).encode("latin-1")


def changed(log: Path, old: bytes, new: bytes) -> bytes:
    """The log's records with a change, and with the right checksums."""
    texts = [line.partition(b" ")[2] for line in log.read_bytes().splitlines()]
    replaced = [text.replace(old, new) for text in texts]
    assert replaced != texts, "nothing is changed"
    return log_of(*(text.decode("latin-1") for text in replaced))


HOSTILE: dict[str, Callable[[Path], bytes]] = {
    "empty": lambda log: b"",
    "zeros": lambda log: bytes(100_000),
    "binary": lambda log: bytes(range(256)) * 400,
    "text": lambda log: b"version https://git-lfs.github.com/spec/v1\n",
    "cut in its header": lambda log: log.read_bytes()[:50],
    "no newline": lambda log: log.read_bytes().replace(b"\n", b" "),
    "deep": lambda log: log_of("[" * 100_000),
    "deep in a record": lambda log: log_of(
        log.read_text().splitlines()[0].partition(" ")[2], "[" * 100_000
    ),
    "another version": lambda log: changed(log, b'{"header":', b'{"header":9'),
    "another definition": lambda log: changed(log, b'"definition":"', b'"definition":"x'),
    "an infinite step size": lambda log: changed(log, b'"lr":0.01', b'"lr":1e999'),
    "a huge loss": lambda log: changed(log, b'"loss":0.5', b'"loss":1' + b"0" * 400),
    "a loss of 5000 digits": lambda log: changed(log, b'"loss":0.5', b'"loss":1' + b"0" * 5000),
    "NaN": lambda log: changed(log, b'"loss":0.5', b'"loss":NaN'),
    "a huge batch": lambda log: changed(log, b'"batch":8', b'"batch":1' + b"0" * 300),
    "huge directions": lambda log: changed(
        log, b'"num_directions":1,', b'"num_directions":1000000000,'
    ),
    "a huge shape": lambda log: changed(log, b"[3,2]", b"[3" + b"0" * 300 + b",2]"),
    "a step of the far future": lambda log: changed(log, b'"step":1', b'"step":1' + b"0" * 30),
    "no object": lambda log: changed(log, b'{"run"', b'[],{"run"'),
    "half a character": lambda log: changed(log, b"OPTForCausalLM", b'\\ud800","x":"'),
}


@pytest.mark.parametrize("name", ["inspect", "verify", "diff", "merge", "replay"])
@pytest.mark.parametrize("damage", HOSTILE)
def test_a_log_that_is_none_is_one_error_and_nothing_is_written(
    base, log, tmp_path, capsys, damage, name
):
    log.write_bytes(HOSTILE[damage](log))
    with within(60):
        assert main(command(name, base, log, tmp_path / "out")) == 2
    (error,) = errors_of(capsys)
    assert str(log) in error
    assert len(error) < 1000
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["inspect", "verify", "diff", "merge", "replay"])
@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "device"])
def test_a_path_that_is_no_file_is_one_error(base, log, tmp_path, capsys, kind, name):
    path = Path("/dev/zero") if kind == "device" else tmp_path / "other"
    if kind == "folder":
        path.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    with within(60):
        assert main(command(name, base, path, tmp_path / "out")) == 2
    (error,) = errors_of(capsys)
    assert str(path) in error
    assert not (tmp_path / "out").exists()


def test_merge_into_a_missing_folder_names_the_file_that_was_asked_for(base, log, tmp_path, capsys):
    out = tmp_path / "nowhere" / "merged"
    assert main(command("merge", base, log, out)) == 2
    (error,) = errors_of(capsys)
    assert str(out) in error

"""The trajectory log: records are read back to the bit, and damage is never read as a record."""

import json
import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.mutation import rechained, with_a_record_mutated
from zods.config.schema import parse_section
from zods.trajectory import log as log_module
from zods.trajectory.__main__ import main
from zods.trajectory.compare import differences, longer
from zods.trajectory.log import START, LogFile, Trajectory, chained, parse_log, read_log
from zods.trajectory.records import (
    Evaluation,
    Header,
    ParameterRecord,
    Refresh,
    RunRecord,
    Step,
    SubBatch,
)

HEADER = Header(
    "Tiny",
    (
        ParameterRecord("embed.weight", (11, 7), "float32", True, 2**64 - 1),
        ParameterRecord("embed.bias", (7,), "float32", False, 0),
    ),
    {"head.weight": "embed.weight"},
    (24, "0123456789abcdef"),
)
SVRG = parse_section(
    {"method": "mezo_svrg", "anchor": {"point": "terms", "gradient": "nvme", "nvme_path": "/drive"}}
)
CONFIGURED = RunRecord(0, SVRG, 8, 2, {"zero_stage": 3})
RECORDS = [
    CONFIGURED,
    Evaluation(0, "stacked", 4),
    Evaluation(0, "sequential", 2, from_logits=True),
    Refresh(0, 1e-6, (0.5,)),
    Step(0, 0.1 + 0.2, 1e-6, (-1.5,), (0, 1)),
    Step(1, None, 1e-6, (), (0, 2)),
    Step(2, math.pi, 5e-324, (2.0**127,), (0, 3), SubBatch(13, (0, 5, 12), (1.0, 2.5, 3.0), -1e-3)),
]


def write(path: Path, records=RECORDS, header=HEADER) -> Path:
    trajectory = Trajectory()
    trajectory.file = LogFile(path)
    for record in [header, *records]:
        trajectory.add(record)
    trajectory.wait()
    trajectory.file.close()
    return path


def without_paths(records):
    """The records as they are read back: the path of the anchor's files is not recorded."""
    anchor = {"point": "terms", "gradient": "nvme", "nvme_path": "(not recorded)"}
    section = parse_section({"method": "mezo_svrg", "anchor": anchor})
    return tuple(
        RunRecord(r.step, section, r.batch, r.world_size, r.about)
        if isinstance(r, RunRecord)
        else r
        for r in records
    )


def test_records_come_back_as_they_were_to_the_bit(tmp_path):
    log = read_log(write(tmp_path / "log"))
    assert log.header == HEADER
    assert log.records == without_paths(RECORDS)
    assert (log.num_steps, log.torn) == (3, 0)
    assert "/drive" not in (tmp_path / "log").read_text()


def test_keys_that_a_log_of_an_earlier_version_lacks_have_their_meaning_there(tmp_path):
    section = parse_section(
        {
            "method": "mezo",
            "direction": "gaussian",
            "examples_per_direction": "all",
            "normalize": False,
            "lr": 1e-6,
        }
    )
    run = RunRecord(0, section, 8, 1, {})
    assert {"normalize", "examples_per_direction"}.isdisjoint(run.to_json()["zeroth_order"])
    assert read_log(write(tmp_path / "log", [run])).records == (run,)


def test_a_first_order_run_records_its_optimizer_and_no_zeroth_order_step_size(tmp_path):
    optimizer = {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.99]}}
    section = parse_section({"method": "mezo", "seed": 7})
    run = RunRecord(0, section, 8, 2, {"zero_stage": 3}, optimizer)
    path = write(tmp_path / "log", [run, Step(0, 0.5, 3e-4, None)])
    assert read_log(path).records[0] == run
    assert run.to_json()["optimizer"] == optimizer
    assert "updates" not in run.to_json(), "a record of an earlier version is written as it was"
    clipped = replace(run, updates={"gradient_clipping": 1.0})
    path = write(tmp_path / "clipped", [clipped, Step(0, 0.5, 3e-4, None)])
    assert read_log(path).records[0] == clipped
    assert clipped.describes() != run.describes()
    assert run.to_json()["zeroth_order"] == {"seed": 7, "selector": None, "loss_mean": "tokens"}
    assert (
        run.describes()
        != RunRecord(
            0, section, 8, 2, {"zero_stage": 3}, {"type": "AdamW", "params": {"lr": 1e-4}}
        ).describes()
    )


def test_random_numbers_come_back_to_the_bit(tmp_path):
    rng = random.Random(0)
    single = [
        float.fromhex(f"0x1.{rng.getrandbits(23) << 1:06x}p{rng.randint(-126, 127)}")
        for _ in range(500)
    ]
    double = [rng.uniform(-1, 1) * 10.0 ** rng.randint(-300, 300) for _ in range(2)]
    step = Step(0, double[0], abs(double[1]), tuple(single))
    assert read_log(write(tmp_path / "log", [CONFIGURED, step])).records[1] == step


@pytest.mark.parametrize("number", [1, 6, 16])
def test_a_step_takes_at_most_200_bytes(tmp_path, number):
    rng = random.Random(number)
    chosen = SubBatch(128, tuple(sorted(rng.sample(range(128), 64)))) if number < 16 else None
    steps = [
        Step(
            19_000 + k,
            2 + rng.random(),
            1e-6 * rng.random(),
            tuple([1 / 3] * number),
            (37, 1000 + k),
            chosen,
        )
        for k in range(50)
    ]
    lines = [json.dumps(step.to_json(), separators=(",", ":")) for step in steps]
    assert max(map(len, lines)) + len("0123456789abcdef \n") <= 200


@pytest.mark.parametrize("number", [16, 256])
def test_a_step_with_groups_takes_at_most_3_bytes_per_direction_and_150_more(number):
    rng = random.Random(number)
    steps = [
        Step(
            19_000 + k,
            2 + rng.random(),
            1e-6 * rng.random(),
            tuple(float(2.0 ** rng.randint(-9, 9)) for _ in range(number)),
            (37, 1000 + k),
            rms=rng.random(),
            in_16_bits=True,
        )
        for k in range(50)
    ]
    lines = [json.dumps(step.to_json(), separators=(",", ":")) for step in steps]
    assert max(map(len, lines)) + len("0123456789abcdef \n") <= 150 + 3 * number


def test_a_record_is_on_the_disk_when_wait_returns(tmp_path):
    trajectory = Trajectory()
    trajectory.file = LogFile(tmp_path / "log")
    for count, record in enumerate([HEADER, *RECORDS]):
        trajectory.add(record)
        trajectory.wait()
        assert len(read_log(tmp_path / "log").records) == count
        assert read_log(tmp_path / "log").heads[-1] == trajectory.head


def test_all_ranks_chain_the_same_head_without_a_file(tmp_path):
    written, other = read_log(write(tmp_path / "log")), Trajectory()
    for record in [HEADER, *RECORDS]:
        other.add(record)
    assert other.head == written.heads[-1]


def test_every_truncation_leaves_the_whole_records_and_says_what_is_torn(tmp_path):
    data = write(tmp_path / "log").read_bytes()
    whole = parse_log(data, "log")
    for length in range(len(data)):
        if length < whole.ends[0]:
            with pytest.raises(ValueError, match=r"^log(, line 1|: empty)"):
                parse_log(data[:length], "log")
            continue
        complete = sum(end <= length for end in whole.ends)
        cut = parse_log(data[:length], "log")
        assert cut.records == whole.records[: complete - 1]
        assert cut.torn == length - whole.ends[complete - 1]


def parsed(data: bytes):
    """(the log, "") or (None, what is wrong with it)."""
    try:
        return parse_log(data, "log"), ""
    except ValueError as error:
        return None, str(error)


@pytest.mark.parametrize("mask", [1, 0x20, 0x80, 0xFF])
def test_every_flipped_byte_is_an_error_with_its_place_or_a_torn_end(tmp_path, mask):
    data = write(tmp_path / "log").read_bytes()
    whole = parse_log(data, "log")
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= mask
        line = data[:position].count(b"\n")
        found, said = parsed(bytes(damaged))
        if found is None:
            assert f"line {line + 1} " in said, f"byte {position}: {said}"
            continue
        assert line == len(whole.records), f"byte {position}, not in the last line, went unnoticed"
        assert found.torn == len(data) - whole.ends[-2]
        assert found.records == whole.records[:-1]


@pytest.mark.parametrize("key", ["loss", "lr"])
def test_a_number_that_no_float_can_hold_is_an_error_with_its_place(key):
    run = RunRecord(0, parse_section({"method": "mezo"}), 8, 1, {}).to_json()
    step = {**Step(0, 0.5, 1e-6, (1.0,), (0, 1)).to_json(), key: 10**400}
    data, head = b"", START
    for record in (HEADER.to_json(), run, step):
        text = json.dumps(record, separators=(",", ":"))
        head = chained(head, text)
        data += f"{head} {text}\n".encode()
    with pytest.raises(ValueError, match=r"line 3 \(byte \d+\): not a record"):
        parse_log(data, "log")


def test_lost_doubled_and_moved_lines_are_found(tmp_path):
    lines = write(tmp_path / "log").read_bytes().splitlines(keepends=True)
    for k in range(1, len(lines) - 1):
        for changed in (
            lines[:k] + lines[k + 1 :],
            [*lines[: k + 1], *lines[k:]],
            [*lines[:k], lines[k + 1], lines[k]],
        ):
            rest = changed if len(changed) > k + 1 else [*changed, lines[-1]]
            with pytest.raises(ValueError, match=r"line \d+ .*checksum"):
                parse_log(b"".join([*rest, lines[-1]]), "log")


def test_4000_logs_of_wrong_records_with_right_checksums_are_clean_errors_or_logs(tmp_path, capsys):
    """`parse_log` reads every log, the command line every 50th: it costs 80 times as much."""
    data = write(tmp_path / "log").read_bytes()
    texts = [line.split(" ", 1)[1] for line in data.decode().splitlines()]
    rng = random.Random(7)
    accepted = 0
    for count in range(4000):
        changed = with_a_record_mutated(rng, data)
        if rng.random() < 0.1:
            odd = rng.choice(["[" * 5000, "NaN", "1e999", '{"step":0', "9" * 5000, ""])
            k = rng.randrange(len(texts))
            changed = rechained([*texts[:k], odd, *texts[k + 1 :]])
        log, error = parsed(changed)
        accepted += log is not None
        assert log is not None or error.startswith("log"), error
        if count % 50 == 0:
            (tmp_path / "changed").write_bytes(changed)
            code = main(["verify", str(tmp_path / "changed")])
            printed = capsys.readouterr().err
            assert code == (2 if log is None else 0), printed
            assert code == 0 or printed.startswith("zods.trajectory: error: "), printed
    assert accepted < 2000, "most changed logs are valid, so hardly any error is checked"


@pytest.mark.launched
def test_a_second_writer_is_told_that_the_log_is_in_use(tmp_path, monkeypatch):
    monkeypatch.setattr(log_module, "LOCK_SECONDS", 0.5)
    first = LogFile(tmp_path / "log")
    script = (
        "import sys; from zods.trajectory import log; log.LOCK_SECONDS = 0.3\n"
        "try: log.LogFile(sys.argv[1])\nexcept ValueError as error: print(error)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "log")]
    assert (
        "another run writes to it"
        in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    )
    first.close()
    assert (
        "another" not in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.launched
def test_a_full_disk_is_an_error_and_leaves_whole_records(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8k", "none", disk], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"no file system can be mounted here: {mount.stderr.strip()}")
    try:
        trajectory = Trajectory()
        trajectory.file = LogFile(disk / "log")
        for record in [HEADER, CONFIGURED]:
            trajectory.add(record)
        trajectory.wait()
        written = 0

        def write_on() -> None:
            nonlocal written
            for step in range(200):
                trajectory.add(Step(step, 0.5, 1e-6, (1.0,)))
                trajectory.wait()
                written += 1

        with pytest.raises(
            OSError, match=r"cannot be written .No space left.*steps before this one are safe"
        ):
            write_on()
        log = read_log(disk / "log")
        assert 0 < written < 200
        assert (log.num_steps, log.torn) == (written, 0)
        trajectory.file.close()
    finally:
        subprocess.run(["umount", disk], check=True)


# --- the command line -----------------------------------------------------------------------------


def test_verify_tells_whole_torn_and_damaged_logs_apart(tmp_path, capsys, caplog):
    path = write(tmp_path / "log")
    data = path.read_bytes()
    assert main(["verify", str(path)]) == 0
    assert "3 steps" in capsys.readouterr().out
    path.write_bytes(data[:-5])
    assert main(["verify", str(path)]) == 1
    assert "torn" in caplog.text
    path.write_bytes(data[:400] + b"?" + data[401:])
    assert main(["verify", str(path)]) == 2
    assert "line" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "none")]) == 2


def test_inspect_shows_the_run_and_single_records(tmp_path, capsys):
    path = write(tmp_path / "log")
    assert main(["inspect", str(path)]) == 0
    said = capsys.readouterr().out
    for part in ("Tiny", "on 2 ranks", '"method": "mezo_svrg"', "3, of these skipped 1", "stacked"):
        assert part in said
    assert main(["inspect", str(path), "--step", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["lr"] == 5e-324


def test_diff_names_the_first_difference(tmp_path, capsys):
    one = write(tmp_path / "one")
    other = write(
        tmp_path / "other", [*RECORDS[:5], Step(1, 0.5, 1e-6, (2.0,), (0, 2)), RECORDS[6]]
    )
    assert main(["diff", str(one), str(one)]) == 0
    assert capsys.readouterr().out == "the same\n"
    assert main(["diff", str(one), str(other)]) == 1
    assert capsys.readouterr().out.startswith("after 1 steps: c: ")
    third = write(
        tmp_path / "third", header=Header("Tiny", HEADER.parameters, {}, (25, "0123456789abcdef"))
    )
    assert [
        line
        for line in differences(read_log(one), read_log(third))
        if line.startswith("header: data: 24 and 25")
    ]


def test_merge_gives_the_longer_log_and_refuses_with_the_reason_what_does_not_commute(
    tmp_path, capsys
):
    short, whole = write(tmp_path / "short", RECORDS[:5]), write(tmp_path / "whole")
    for left, right in ((short, whole), (whole, short), (whole, whole)):
        assert main(["merge", str(left), str(right), "--out", str(tmp_path / "merged")]) == 0
        assert (tmp_path / "merged").read_bytes() == whole.read_bytes()
        (tmp_path / "merged").unlink()
    other = read_log(write(tmp_path / "other", [*RECORDS[:5], Step(1, 0.5, 1e-6, (2.0,), (0, 2))]))
    with pytest.raises(ValueError, match=r"have 1 steps in common.*rounds the weights to float32"):
        longer(other, read_log(whole))
    third = write(tmp_path / "third", header=Header("Other", HEADER.parameters))
    assert main(["merge", str(third), str(whole), "--out", str(tmp_path / "merged")]) == 2
    assert "do not start from the same" in capsys.readouterr().err
    assert main(["merge", str(whole), str(whole), "--out", str(whole)]) == 2

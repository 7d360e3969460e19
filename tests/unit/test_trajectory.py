"""The trajectory log: what is written is read back to the bit, and damage is never taken for a record."""

import math
import random
from pathlib import Path

import pytest

from zods.estimators import Term, Update
from zods.trajectory import TrajectoryLog, read_log

UPDATES = [
    ("anchor", 0, Update((Term(2**64 - 1, 1 / 3), Term(0, -5e-324)), rounding_seed=2**63), [0.1, 0.2], 1e-6),
    ("step", 0, Update((Term(7, -1.7976931348623157e308),), 1 - 1e-9, -0.1), [0.3, math.pi, 1e-300, 2.0], 0.1 + 0.2),
    ("step", 1, Update(()), [], 0.0),
]


def write(path: Path, updates=UPDATES) -> None:
    log = TrajectoryLog(path)
    for update in updates:
        log.append(*update)


def as_written(updates=UPDATES) -> list[dict]:
    return [
        {
            "kind": kind,
            "step": step,
            "terms": [list(term) for term in update.terms],
            "decay": update.decay,
            "anchor_grad": update.anchor_grad_coefficient,
            "rounding_seed": update.rounding_seed,
            "losses": losses,
            "gradient": [],
            "lr": lr,
        }
        for kind, step, update, losses, lr in updates
    ]


def intact_prefix(path: Path) -> tuple[list[dict], str | None]:
    """The records before the first that is damaged, and the error, if any."""
    records = []
    try:
        for record in read_log(path):
            records.append(record)  # those before the error count
    except ValueError as error:
        return records, str(error)
    return records, None


def test_records_come_back_as_they_were_to_the_bit(tmp_path):
    write(tmp_path / "log")
    assert list(read_log(tmp_path / "log")) == as_written()


def test_random_numbers_come_back_to_the_bit(tmp_path):
    rng = random.Random(0)
    numbers = [rng.uniform(-1, 1) * 10.0 ** rng.randint(-300, 300) for _ in range(500)]
    terms = tuple(Term(rng.getrandbits(64), number) for number in numbers)
    write(tmp_path / "log", [("step", 3, Update(terms, decay=numbers[0]), numbers, numbers[1])])
    (record,) = read_log(tmp_path / "log")
    assert [tuple(term) for term in record["terms"]] == list(terms)
    assert (record["losses"], record["decay"], record["lr"]) == (numbers, numbers[0], numbers[1])


def test_the_losses_of_a_skipped_step_come_back_non_finite(tmp_path):
    write(tmp_path / "log", [("step", 0, Update(()), [math.inf, math.nan], 1.0)])
    (record,) = read_log(tmp_path / "log")
    assert record["losses"][0] == math.inf
    assert math.isnan(record["losses"][1])


def test_a_record_is_in_the_file_when_append_returns(tmp_path):
    log = TrajectoryLog(tmp_path / "log")
    for count in range(1, 4):
        log.append(*UPDATES[0])
        assert len(list(read_log(tmp_path / "log"))) == count


def test_a_log_opened_again_goes_on_at_its_end(tmp_path):
    write(tmp_path / "log", UPDATES[:1])
    write(tmp_path / "log", UPDATES[1:])
    assert list(read_log(tmp_path / "log")) == as_written()


def test_an_empty_log_has_no_records(tmp_path):
    write(tmp_path / "log", [])
    assert list(read_log(tmp_path / "log")) == []


def test_every_torn_length_gives_the_whole_records_and_names_the_torn_one(tmp_path):
    path = tmp_path / "log"
    write(path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        complete = whole[:length].count(b"\n")
        records, error = intact_prefix(path)
        assert records == as_written()[:complete]
        if whole[:length].endswith(b"\n") or length == 0:
            assert error is None
        else:
            assert f"line {complete + 1}" in error


def test_every_flipped_byte_is_found_in_its_line(tmp_path):
    """Each byte in three ways: one bit (another one from byte to byte), its complement, and not ASCII."""
    path = tmp_path / "log"
    write(path, UPDATES[1:])
    whole = path.read_bytes()
    for position in range(len(whole)):
        line = whole[:position].count(b"\n")
        for mask in (1 << position % 8, 0xFF, 0x80):
            damaged = bytearray(whole)
            damaged[position] ^= mask
            path.write_bytes(damaged)
            records, error = intact_prefix(path)
            assert error is not None, f"byte {position}, flipped with {mask:#x}: not noticed"
            assert f"line {line + 1}" in error or mask == 1 << position % 8  # that may have made a new line
            assert records == as_written()[1:][:line], f"byte {position}, {mask:#x}: a damaged record was read"


@pytest.mark.parametrize("position", ["checksum", "space", "newline"])
def test_every_other_byte_in_the_frame_of_a_record_is_found(tmp_path, position):
    path = tmp_path / "log"
    write(path)
    whole = path.read_bytes()
    at = {"checksum": 0, "space": 8, "newline": whole.index(b"\n")}[position]
    for value in set(range(256)) - {whole[at]}:
        path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
        records, error = intact_prefix(path)
        assert error is not None, f"byte {at} = {value:#x}: not noticed"
        assert records == []


def test_the_end_of_one_record_joined_to_another_is_found(tmp_path):
    path = tmp_path / "log"
    write(path)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(lines[0] + lines[1][20:] + b"\n" + lines[2] + b"\n")
    assert intact_prefix(path)[0] == []

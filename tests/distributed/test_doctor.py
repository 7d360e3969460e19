"""The doctor on two ranks: through the launcher, and with ranks that disagree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import zods.doctor.__main__ as doctor
from tests.distributed.ranks import launch, run_ranks
from zods.comm.communicator import Communicator
from zods.doctor import rank_checks
from zods.kernels import direction


@pytest.mark.launched
def test_the_doctor_checks_all_ranks_and_a_drive_through_the_launcher(tmp_path: Path):
    code, output = launch(Path(doctor.__file__), "--nvme", tmp_path)
    lines = re.findall(r"^(ok|note|broken) +(.*)$", output, re.MULTILINE)
    assert code == 0, output
    assert all(state != "broken" for state, _ in lines), output
    said = "\n".join(text for _, text in lines)
    for words in (
        "deepspeed [0-9.]+",
        "kernels on cpu: built, and the bits of the reference",
        "no locks of killed builds",
        r"a test direction has the same bits on all ranks \(2\)",
        r"collectives: [0-9.]+ ms .* [0-9.]+ GB/s",
        r"256 MiB written with [0-9.]+ GB/s and read with [0-9.]+ GB/s.*rank 1",
    ):
        assert re.search(words, said), (words, output)
    assert list(tmp_path.iterdir()) == []


def _rank_with_other_bits(folder: str) -> tuple[list[str], int]:
    comm = Communicator(torch.device("cpu"))
    if comm.rank == 1:

        def other(numel: int, *, seed: int, **how: int) -> torch.Tensor:
            return direction(numel, seed=seed + 1, **how)  # type: ignore[arg-type]

        rank_checks.direction = other
    found = [*rank_checks.ranks(comm), rank_checks.nvme(folder)]
    return [finding.state for finding in found], doctor.report(found, comm)


def test_ranks_whose_directions_differ_and_a_missing_drive_end_with_exit_code_1(tmp_path: Path):
    ended = run_ranks(2, _rank_with_other_bits, str(tmp_path / "missing"))
    assert ended == [(["broken", "broken"], 1)] * 2

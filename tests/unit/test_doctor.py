"""The doctor's checks of a host: what is right gives "ok", and each fault is found."""

import resource
import time
from pathlib import Path

import pytest
import torch

import zods.doctor.__main__ as doctor
from zods.doctor import host_checks
from zods.doctor.__main__ import main
from zods.kernels import combine_, self_check


def test_the_kernels_of_this_machine_have_the_bits_of_the_reference():
    assert self_check.first_difference("cpu") is None


@pytest.mark.parametrize("dtype", self_check.DTYPES)
def test_one_wrong_bit_of_a_kernel_is_found(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    def wrong(out: torch.Tensor, **how: object) -> torch.Tensor:
        combine_(out, **how)  # type: ignore[arg-type]
        if out.dtype == dtype and how["distribution"] == "rademacher":
            out.view(torch.uint8)[17 * dtype.itemsize] ^= 1
        return out

    monkeypatch.setattr(self_check, "combine_", wrong)
    assert self_check.first_difference("cpu") == f"rademacher, {dtype}: element 17 of 5003"
    assert host_checks.kernels("cpu").state == "broken"


def test_a_lock_of_a_killed_build_ends_the_doctor_before_it_connects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"broken  {lock}: ")
    with lock.open():  # a build that goes on has its lock open
        assert [finding.state for finding in host_checks.locks()] == ["ok"]


@pytest.mark.parametrize("taken_again", [False, True])
def test_a_lock_that_is_released_while_it_is_looked_at_is_no_fault(
    taken_again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    time.sleep(0.05)  # more than the resolution of a file's times
    glob = Path.glob

    def release_and_glob(self: Path, pattern: str) -> object:
        if self == Path("/proc"):
            lock.unlink()
            if taken_again:
                lock.touch()
        return glob(self, pattern)

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(Path, "glob", release_and_glob)
    assert [finding.state for finding in host_checks.locks()] == ["ok"]


def test_a_version_that_is_not_the_pinned_one_is_noted():
    pins = "torch==0.1\ndeepspeed==0.1 ; sys_platform == 'linux'\n"
    states = {finding.text.split()[0]: finding.state for finding in host_checks.versions(pins)}
    assert states == {"torch": "note", "deepspeed": "note", "transformers": "ok"}


def test_the_tested_versions_are_the_pins_of_the_checkout():
    pins = host_checks.PINS.read_text()
    assert all(f"\n{package}==" in pins for package in host_checks.PACKAGES)


def test_the_findings_of_the_host_are_printed_where_the_ranks_cannot_connect(monkeypatch, capfd):
    def fails() -> None:
        raise RuntimeError("an operator cannot be built")

    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(doctor, "connect_ranks", fails)
    monkeypatch.setattr(doctor, "end_process", end)
    with pytest.raises(SystemExit) as ended:
        doctor.main([])
    assert ended.value.code == 1
    assert "broken  C++ compiler: 'no-such-compiler' is not found" in capfd.readouterr().out


def test_a_compiler_that_is_missing_is_found(monkeypatch: pytest.MonkeyPatch):
    assert host_checks.compiler().state == "ok"
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    found = host_checks.compiler()
    assert found.state == "broken"
    assert "'no-such-compiler' is not found" in found.text


@pytest.mark.parametrize(
    ("ranks", "state"), [(1, "ok"), (2, "broken")], ids=["one rank", "two ranks"]
)
def test_shared_memory_has_to_suffice_for_the_ranks_of_the_host(ranks: int, state: str):
    assert host_checks.shared_memory(host_checks.SHARED_BYTES, ranks).state == state


@pytest.mark.parametrize(("world_size", "state"), [(192, "ok"), (193, "broken")])
def test_open_files_have_to_suffice_for_all_ranks(world_size: int, state: str):
    assert host_checks.open_files(1024, world_size).state == state


def test_a_limit_of_locked_memory_is_noted_unless_the_user_is_root(monkeypatch):
    assert host_checks.locked_memory(resource.RLIM_INFINITY).state == "ok"
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    found = host_checks.locked_memory(8 << 20)
    assert found.state == "note"
    assert "at most 8 MiB" in found.text

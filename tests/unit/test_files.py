"""Writes and renames of files that a crash cannot leave incomplete."""

import os
from pathlib import Path

import pytest

from zods.files import atomic_write, rename, sync


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of `os` that rename or sync a file, in order."""
    events: list[str] = []

    def recorded(name: str) -> None:
        original = getattr(os, name)

        def operation(*args):
            subject = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else args[0]
            events.append(f"{name} {Path(subject).name}")
            return original(*args)

        monkeypatch.setattr(os, name, operation)

    for name in ("replace", "rename", "fsync"):
        recorded(name)
    return events


def test_a_file_is_synced_before_it_is_renamed_and_its_folder_afterwards(
    tmp_path: Path, events: list[str]
):
    path = tmp_path / "weights"
    path.write_text("old")
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert (temporary.parent, path.read_text()) == (tmp_path, "old")
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights"]
    assert events == [
        "fsync .weights.partial",
        "replace .weights.partial",
        f"fsync {tmp_path.name}",
    ]


def fill_the_disk(path: Path) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text("half")
        raise OSError("full")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, events: list[str]):
    path = tmp_path / "weights"
    path.write_text("old")
    with pytest.raises(OSError, match="full"):
        fill_the_disk(path)
    assert path.read_text() == "old"
    assert events == []
    with atomic_write(path) as temporary:
        temporary.write_text("new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights"]


def test_folders_are_renamed_and_open_files_synced(tmp_path: Path, events: list[str]):
    (tmp_path / "a").mkdir()
    rename(tmp_path / "a", tmp_path / "b")
    assert [entry.name for entry in tmp_path.iterdir()] == ["b"]
    with open(tmp_path / "log", "w") as file:
        sync(file.fileno())
    sync(tmp_path)
    assert events == ["rename a", "fsync log", f"fsync {tmp_path.name}"]

"""Writes and renames of files that a crash cannot leave incomplete."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.disks import Syncs, fill, small_disk, within
from zods.files import (
    atomic_files,
    atomic_write,
    check_regular,
    copy_file,
    make_folder,
    rename,
    sync,
    sync_tree,
)


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


@pytest.fixture
def syncs() -> Iterator[Syncs]:
    syncs = Syncs()
    yield syncs
    syncs.close()


def test_the_recorded_syncs_miss_what_is_not_synced(tmp_path: Path, syncs: Syncs):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "file").touch()
    assert syncs.unsynced(tmp_path / "a") == [".", "a", "a/b", "a/file"]


def test_new_folders_are_entries_of_synced_folders(tmp_path: Path, syncs: Syncs):
    make_folder(tmp_path / "a" / "b" / "c")
    # the last folder itself is empty
    assert syncs.unsynced(tmp_path / "a") == ["a/b/c"]


def library_saves(folder: Path) -> None:
    (folder / "weights").write_text("new")
    (folder / "inner").mkdir()
    (folder / "inner" / "config").write_text("new")


def test_files_that_a_library_names_are_whole_and_synced_under_their_final_names(
    tmp_path: Path, syncs: Syncs
):
    out = tmp_path / "new" / "out"
    with atomic_files(out) as temporary:
        library_saves(temporary)
        assert not (out / "weights").exists()
    assert sorted(path.name for path in out.rglob("*")) == ["config", "inner", "weights"]
    assert syncs.unsynced(tmp_path / "new") == []


def save_half_and_fail(folder: Path) -> None:
    with atomic_files(folder, ZeroDivisionError) as temporary:
        (temporary / "weights").write_text("half")
        raise ZeroDivisionError


def test_a_library_that_fails_changes_no_file_and_leaves_nothing(tmp_path: Path):
    (tmp_path / "weights").write_text("old")
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(OSError, match=f"{tmp_path}: cannot be written"):
        save_half_and_fail(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "weights": "old",
        "notes": "mine",
    }


def test_a_copy_is_whole_and_synced(tmp_path: Path, syncs: Syncs):
    (tmp_path / "source").write_text("content")
    make_folder(tmp_path / "out")
    copy_file(tmp_path / "source", tmp_path / "out" / "copy")
    assert (tmp_path / "out" / "copy").read_text() == "content"
    assert syncs.unsynced(tmp_path / "out") == []


def test_a_link_at_the_temporary_name_is_not_written_through(tmp_path: Path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".weights.partial").symlink_to(tmp_path / "precious")
    with atomic_write(tmp_path / "weights") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "weights").read_text() == "new"


def test_pipes_sockets_and_devices_are_refused_by_name_and_other_paths_pass(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for name, kind in (("pipe", "named pipe"), ("link", "named pipe"), ("socket", "socket")):
            with pytest.raises(OSError, match=f"{name}: it is a {kind}"):
                check_regular(tmp_path / name)
    with pytest.raises(OSError, match="/dev/zero: it is a device"):
        check_regular(tmp_path, Path("/dev/zero"))
    (tmp_path / "file").touch()
    check_regular(tmp_path / "file", tmp_path, tmp_path / "missing")


def test_a_folder_with_a_named_pipe_is_synced_without_waiting(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with within(10):
        sync_tree(tmp_path)


@pytest.mark.launched
def test_a_full_disk_is_named_and_leaves_old_files_and_the_free_space_as_they_were(tmp_path: Path):
    (tmp_path / "source").write_bytes(bytes(100_000))

    def write(path: Path) -> None:
        with atomic_write(path) as temporary:
            temporary.write_bytes(bytes(100_000))

    def write_several(path: Path) -> None:
        with atomic_files(path.parent) as temporary:
            (temporary / path.name).write_bytes(bytes(100_000))

    with small_disk(tmp_path / "disk", 256) as disk:
        (disk / "weights").write_text("old")
        for pages in range(3):
            fill(disk, pages)
            free = os.statvfs(disk).f_bavail
            for way in (write, write_several, lambda path: copy_file(tmp_path / "source", path)):
                with pytest.raises(OSError, match=f"No space left.*{disk}"):
                    way(disk / "weights")
                assert (disk / "weights").read_text() == "old"
                assert sorted(path.name for path in disk.iterdir()) == ["filler", "weights"]
                assert os.statvfs(disk).f_bavail == free

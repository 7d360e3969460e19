"""The scripts that set a machine up: one line where something is missing, a new environment for a
broken one, no stale lock.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from zods.comm.process import report_stale_locks

REPOSITORY = Path(__file__).parents[2]
NEEDED = (
    "bash",
    "cat",
    "cut",
    "dirname",
    "env",
    "grep",
    "head",
    "id",
    "mkdir",
    "rm",
    "sha256sum",
    "touch",
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The files that launch/setup.sh reads, of a package without dependencies."""
    (tmp_path / "launch").mkdir()
    for name in ("setup.sh", "lock.py"):
        shutil.copy(REPOSITORY / "launch" / name, tmp_path / "launch")
    (tmp_path / "launch" / "lock.txt").touch()
    (tmp_path / "constraints.txt").touch()
    (tmp_path / "pyproject.toml").write_text(
        "[project]\ndependencies = []\n[project.optional-dependencies]\nreport = []\n"
    )
    return tmp_path


def set_up(tree: Path, path: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run launch/setup.sh with these folders of programs alone, and no package index."""
    return subprocess.run(
        [shutil.which("bash") or "bash", "-c", ". launch/setup.sh report"],
        cwd=tree,
        env={"PATH": path, "HOME": str(tree), "PIP_NO_INDEX": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder with the programs that every system has: no compiler, no apt-get."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in NEEDED:
        found = shutil.which(name)
        assert found is not None, name
        (folder / name).symlink_to(found)
    (folder / "python3").symlink_to(Path(sys.executable).resolve())
    return folder


@pytest.mark.launched
def test_missing_system_packages_are_one_line_to_run_where_they_cannot_be_installed(tree, programs):
    told = set_up(tree, str(programs))
    assert told.returncode == 1
    (line,) = told.stderr.splitlines()
    assert "sudo apt-get install -y g++ libaio-dev" in line
    assert not (tree / ".venv").exists(), "nothing is made before the packages are there"


@pytest.mark.parametrize(
    ("python", "said"),
    [("no-such-python", "there is no no-such-python"), ("old-python", "is Python 3.9")],
)
@pytest.mark.launched
def test_a_python_that_will_not_do_is_one_line(tree, programs, python, said):
    old = programs / "old-python"  # answers as an older Python does: there is none here to ask
    old.write_text('#!/usr/bin/env bash\ncase "$2" in *print*) echo 3.9 ;; *) exit 1 ;; esac\n')
    old.chmod(0o755)
    told = set_up(tree, str(programs), PYTHON=python)
    assert told.returncode == 1
    (line,) = told.stderr.splitlines()
    assert said in line
    assert "PYTHON" in line


@pytest.mark.launched
def test_bytecode_is_kept_where_the_shell_says_otherwise(tree, programs):
    """Without it every process compiles all modules that it imports."""
    python = programs / "told"
    python.write_text(
        '#!/usr/bin/env bash\necho "kept: ${PYTHONDONTWRITEBYTECODE-yes}" >&2; exit 1\n'
    )
    python.chmod(0o755)
    told = set_up(tree, str(programs), PYTHON="told", PYTHONDONTWRITEBYTECODE="1")
    assert told.stderr.splitlines() == ["kept: yes"]


def interrupted(venv: Path) -> None:
    venv.mkdir()
    (venv / "zods-installing").touch()


def without_pip(venv: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)


def python_is_gone(venv: Path) -> None:
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to("/usr/bin/python-that-was-removed")


@pytest.mark.parametrize("leave", [interrupted, without_pip, python_is_gone])
@pytest.mark.launched
def test_a_broken_environment_is_made_anew(tree, leave):
    """The run ends in an error, because there is no index. By then the environment is complete."""
    leave(tree / ".venv")
    (tree / ".venv" / "leftover").touch()
    told = set_up(tree, os.environ["PATH"], PYTHON=sys.executable)
    assert "making .venv anew" in told.stderr
    assert not (tree / ".venv" / "leftover").exists()
    assert told.returncode == 1
    assert told.stderr.splitlines()[-1].startswith("zods: installing failed")
    assert (tree / ".venv" / "zods-installing").exists(), (
        "the next start knows that this one did not end"
    )
    subprocess.run(
        [tree / ".venv" / "bin" / "python", "-m", "pip", "--version"],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def locks(folder: Path) -> str:
    """The messages of build_ops about the locks in a folder."""
    script = f"""
import sys; from pathlib import Path
sys.path.insert(0, {str(REPOSITORY / "launch")!r})
from build_ops import remove_stale_locks
remove_stale_locks(Path({str(folder)!r}))
"""
    return subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stderr


@pytest.mark.launched
def test_a_lock_that_a_killed_build_left_is_reported_and_removed_and_that_of_a_living_one_stays(
    tmp_path: Path, monkeypatch, caplog
):
    """A run reports it, the setup removes it. The locks are taken as torch takes them."""
    from torch.utils.file_baton import FileBaton

    (tmp_path / "living_op").mkdir()
    (tmp_path / "killed_op").mkdir()
    living = FileBaton(str(tmp_path / "living_op" / "lock"))
    assert living.try_acquire()
    # as FileBaton does
    script = "import os, sys; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", script, tmp_path / "killed_op" / "lock"], check=False)
    assert (tmp_path / "killed_op" / "lock").exists()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    report_stale_locks()
    (told,) = caplog.messages  # of the killed build only
    assert told.startswith(
        f"{tmp_path / 'killed_op' / 'lock'}: no process of this machine holds it."
    )
    said = locks(tmp_path)
    assert f"removing {tmp_path / 'killed_op' / 'lock'}" in said
    assert f"waiting for process {os.getpid()}, which builds living_op" in said
    assert not (tmp_path / "killed_op" / "lock").exists()
    assert (tmp_path / "living_op" / "lock").exists()
    living.release()
    assert locks(tmp_path) == ""

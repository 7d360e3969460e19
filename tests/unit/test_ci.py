"""`.ci/run` on a small project: which parts it runs, what it prints, and which files it leaves.

The project has the scripts that `.ci/run` calls. They only print that they ran.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FILES = {
    "launch/setup.sh": "echo preparing >&2\n",
    # makes an environment whose programs do nothing
    "launch/quickstart.sh": "mkdir -p .venv/bin runs/quickstart "
    "&& echo x >runs/quickstart/curves.png\n"
    "echo 'python() { :; }; deepspeed() { :; }' >.venv/bin/activate\n"
    'echo "quickstart with $*"\n',
    "launch/test.sh": 'echo "ZODS_DATA=${ZODS_DATA:-}"; ls; echo "7 passed in 1.00s"\n',
    "launch/quickstart/make_data.py": "",
    ".ci/without_extras.py": "",
    ".ci/package.py": "",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    project = tmp_path / "project"
    for name, text in FILES.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(text)
    shutil.copy(REPOSITORY / ".ci" / "run", project / ".ci" / "run")
    git(project, "init", "--quiet")
    commit(project)
    return project


def git(project: Path, *arguments: str) -> None:
    identity = (
        "-c",
        "user.name=tests",
        "-c",
        "user.email=tests@localhost",
        "-c",
        "commit.gpgsign=false",
    )
    subprocess.run(["git", *identity, *arguments], cwd=project, check=True)


def commit(project: Path) -> None:
    git(project, "add", "-A")
    git(project, "commit", "--quiet", "-m", "a commit")


def run(project: Path) -> subprocess.CompletedProcess[str]:
    """Run `.ci/run` and check that it leaves no temporary folder."""
    temporary = project.parent / "tmp"
    temporary.mkdir(exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if key != "ZODS_DATA"}
    result = subprocess.run(
        ["bash", project / ".ci" / "run"],
        env={**environment, "TMPDIR": str(temporary)},
        cwd=project.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not list(temporary.iterdir())
    return result


@pytest.mark.launched
def test_all_parts_run_and_stdout_ends_with_the_summary_of_the_tests(project: Path):
    result = run(project)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "7 passed in 1.00s"
    assert "quickstart with --max_steps 3" in result.stderr
    assert "quickstart: passed" in result.stderr
    assert "zods without extras: passed" in result.stderr


@pytest.mark.launched
def test_the_commit_is_tested_and_not_the_working_tree(project: Path):
    (project / "launch" / "test.sh").write_text("exit 1\n")
    (project / "untracked").touch()
    (project / ".venv").mkdir()
    result = run(project)
    assert result.returncode == 0, result.stderr
    assert "uncommitted changes are not tested" in result.stderr
    assert "untracked" not in result.stdout.split()


@pytest.mark.parametrize(
    "script",
    ["launch/quickstart.sh", ".ci/without_extras.py", ".ci/package.py", "launch/test.sh"],
)
@pytest.mark.launched
def test_a_failure_of_any_part_is_printed_and_sets_the_exit_code(project: Path, script: str):
    if script.endswith(".py"):  # the environment's python fails on this script
        text = FILES["launch/quickstart.sh"].replace(
            "python() { :; }", f'python() {{ [ "$1" != {script} ]; }}'
        )
        (project / "launch" / "quickstart.sh").write_text(text)
    else:
        (project / script).write_text(f"{FILES[script]}exit 3\n")
    commit(project)
    result = run(project)
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1] == "7 passed in 1.00s", (
        "the tests must run even where another part fails"
    )
    assert script == "launch/test.sh" or "FAILED" in result.stderr


@pytest.mark.launched
def test_the_tests_get_the_folder_of_data_beside_the_project(project: Path):
    assert "ZODS_DATA=\n" in run(project).stdout
    data = project.parent / "shared" / "data"
    data.mkdir(parents=True)
    assert f"ZODS_DATA={data}\n" in run(project).stdout


@pytest.mark.launched
def test_an_interruption_ends_the_processes_that_prepare_the_tests(project: Path, tmp_path: Path):
    started, go_on = tmp_path / "started", tmp_path / "go on"
    (project / "launch" / "setup.sh").write_text(f'sleep 300 &\necho $! >"{started}"\nwait\n')
    (project / "launch" / "quickstart.sh").write_text(
        f'until [ -e "{go_on}" ]; do sleep 0.1; done\n'
    )
    commit(project)
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    process = subprocess.Popen(
        ["bash", project / ".ci" / "run"], env=environment, stderr=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: started.exists() and started.read_text().endswith("\n"))
        process.terminate()
    finally:
        go_on.touch()  # bash handles a signal only when its running command has ended
        assert process.wait(30) == 130
    status = Path("/proc", started.read_text().strip(), "stat")
    wait_until(
        lambda: not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"
    )
    assert not list((tmp_path / "tmp").iterdir())


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.05)

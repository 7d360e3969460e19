"""`.ci/run` on a small project with the same scripts, which only write down that they ran: what it
tests, says and leaves.
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
    # its environment has programs that do nothing
    "launch/quickstart.sh": "mkdir -p .venv/bin runs/quickstart && echo x >runs/quickstart/curves.png\n"
    "echo 'python() { :; }; deepspeed() { :; }' >.venv/bin/activate\n"
    'echo "quickstart with $*"\n',
    "launch/test.sh": 'echo "ZODS_DATA=${ZODS_DATA:-}"; ls; echo "7 passed in 1.00s"\n',
    "launch/quickstart/make_data.py": "",
    ".ci/without_extras.py": "",
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
    """Checks that no temporary folder is left."""
    temporary = project.parent / "tmp"
    temporary.mkdir(exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if key != "ZODS_DATA"}
    told = subprocess.run(
        ["bash", project / ".ci" / "run"],
        env={**environment, "TMPDIR": str(temporary)},
        cwd=project.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not list(temporary.iterdir())
    return told


@pytest.mark.launched
def test_all_parts_run_and_stdout_ends_with_the_summary_of_the_tests(project: Path):
    told = run(project)
    assert told.returncode == 0, told.stderr
    assert told.stdout.splitlines()[-1] == "7 passed in 1.00s"
    assert "quickstart with --max_steps 3" in told.stderr
    assert "quickstart: passed" in told.stderr
    assert "zods without extras: passed" in told.stderr


@pytest.mark.launched
def test_the_commit_is_tested_not_what_lies_in_the_folder(project: Path):
    (project / "launch" / "test.sh").write_text("exit 1\n")
    (project / "untracked").touch()
    (project / ".venv").mkdir()
    told = run(project)
    assert told.returncode == 0, told.stderr
    assert "uncommitted changes are not tested" in told.stderr
    assert "untracked" not in told.stdout.split()


@pytest.mark.parametrize(
    "script", ["launch/quickstart.sh", ".ci/without_extras.py", "launch/test.sh"]
)
@pytest.mark.launched
def test_any_part_that_fails_is_said_and_the_exit_code(project: Path, script: str):
    if script.endswith(".py"):  # the environment's python fails on it
        text = FILES["launch/quickstart.sh"].replace(
            "python() { :; }", 'python() { [ "$1" != .ci/without_extras.py ]; }'
        )
        (project / "launch" / "quickstart.sh").write_text(text)
    else:
        (project / script).write_text(f"{FILES[script]}exit 3\n")
    commit(project)
    told = run(project)
    assert told.returncode == 1
    assert told.stdout.splitlines()[-1] == "7 passed in 1.00s", (
        "the tests run whatever became of the other parts"
    )
    assert script == "launch/test.sh" or "FAILED" in told.stderr


@pytest.mark.launched
def test_the_data_beside_the_project_are_named_to_the_tests(project: Path):
    assert "ZODS_DATA=\n" in run(project).stdout
    data = project.parent / "shared" / "data"
    data.mkdir(parents=True)
    assert f"ZODS_DATA={data}\n" in run(project).stdout


@pytest.mark.launched
def test_nothing_that_prepares_the_tests_goes_on_after_an_interruption(
    project: Path, tmp_path: Path
):
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
        go_on.touch()  # bash looks at a signal when its command has ended
        assert process.wait(30) == 130
    status = Path("/proc", started.read_text().strip(), "stat")
    wait_until(
        lambda: not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"
    )
    assert not list((tmp_path / "tmp").iterdir())


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)

"""The commands that the documents show work: their files exist, and their options are known."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.unit.shown_commands import arguments_after, commands
from zods.cli.arguments import parse_arguments
from zods.config.deepspeed_json import load_json
from zods.trajectory.__main__ import main as trajectory

REPOSITORY = Path(__file__).parents[2]
RUN_FILES = "docs/command-line.md"
PAGES = sorted(f"docs/{page.name}" for page in (REPOSITORY / "docs").glob("*.md"))
DOCUMENTS = ("README.md", "launch/quickstart/README.md", *PAGES)
REQUIRED = ("--deepspeed_config", "c", "--model", "m", "--output_dir", "o", "--train_file", "t")


SHOWN = [
    pytest.param(command, id=f"{document}: {command[:60]}")
    for document in DOCUMENTS
    for command in commands(document)
]


def shown_run_file() -> str:
    """The YAML file of the page on run files, which its command calls run.yaml."""
    return (REPOSITORY / RUN_FILES).read_text().partition("```yaml\n")[2].partition("```")[0]


@pytest.mark.parametrize("document", ["README.md", RUN_FILES])
def test_the_shown_run_file_gives_the_same_arguments_as_the_first_shown_command(
    document: str, tmp_path: Path
):
    (tmp_path / "run.yaml").write_text(shown_run_file())
    command = next(shown for shown in commands(document) if "zods.finetune" in shown)
    given = arguments_after(shlex.split(command), "zods.finetune")
    assert parse_arguments([str(tmp_path / "run.yaml")]) == parse_arguments(given)


def test_the_documents_show_commands():
    assert len(commands("README.md")) >= 15
    assert len(commands("launch/quickstart/README.md")) >= 1
    assert sum(len(commands(page)) for page in PAGES) >= 40


def test_the_loop_of_the_readme_is_that_of_the_documentation():
    """The programs of the documentation are run (`test_docs.py`)."""
    readme, page = (
        (REPOSITORY / name).read_text().partition("```python\n")[2].partition("```")[0]
        for name in ("README.md", "docs/index.md")
    )
    assert readme == page


@pytest.mark.parametrize("command", SHOWN)
def test_files_of_shown_commands_exist(command: str):
    words = shlex.split(command)
    quickstart_files = {path.name for path in (REPOSITORY / "launch" / "quickstart").iterdir()}
    for word in words:
        # in capitals: a file of the reader
        if re.fullmatch(r"[a-z_0-9/]+\.(py|sh|json)", word) and not word.startswith("runs/"):
            assert (REPOSITORY / word).exists() or word in quickstart_files, word


@pytest.mark.parametrize(
    "command", [shown for shown in SHOWN if "zods.finetune" in shown.values[0]]
)
def test_options_of_shown_finetune_commands_are_parsed(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "run.yaml").write_text(shown_run_file())
    monkeypatch.chdir(tmp_path)
    given = arguments_after(shlex.split(command), "zods.finetune")
    if given in ([], ["--help"]):
        return
    shortened = "..." in command
    arguments = parse_arguments([*(REQUIRED if shortened else ()), *given])
    assert shortened or load_json(REPOSITORY / arguments.model.deepspeed_config)


@pytest.mark.parametrize(
    "command", [shown for shown in SHOWN if "zods.trajectory" in shown.values[0]]
)
def test_options_of_shown_trajectory_commands_are_parsed(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # In this folder the files of the command are missing, so main returns 2. An unknown option
    # would raise SystemExit.
    monkeypatch.chdir(tmp_path)
    given = arguments_after(shlex.split(command), "zods.trajectory")
    if not given:
        return
    assert trajectory(["1" if word == "STEP" else word for word in given]) == 2


def test_the_command_of_the_quickstart_is_parsed():
    text = (REPOSITORY / "launch" / "quickstart" / "train.sh").read_text().replace("\\\n", " ")
    command = re.search(r'zods\.finetune (.*) "\$@"', text)
    assert command is not None
    assert parse_arguments(shlex.split(command[1])).task.task == "prompted"


def test_the_example_of_the_help_is_parsed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", "10000")  # wide enough that argparse breaks no line
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    words = shlex.split(capsys.readouterr().out.partition("Example: ")[2])
    assert load_json(
        REPOSITORY
        / parse_arguments(words[words.index("zods.finetune") + 1 :]).model.deepspeed_config
    )


def test_the_readme_names_the_commands_that_ci_runs():
    ci = (REPOSITORY / ".ci" / "run").read_text()
    for command in ("launch/quickstart.sh", "launch/test.sh"):
        assert f"bash {command}" in (REPOSITORY / "README.md").read_text()
        assert f"bash {command}" in ci

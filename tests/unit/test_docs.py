"""The pages of docs/ and README.md: links, commands, options, configurations and programs work.

`test_readme.py` has the commands that train, and `test_figures.py` the figures.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.shown_commands import arguments_after, commands
from zods.cli.arguments import option_parser
from zods.config.schema import ZerothOrderConfig, parse_section
from zods.config.section import SECTION, Section
from zods.doctor.__main__ import _parser as doctor_parser
from zods.plan import _parser as plan_parser
from zods.report.__main__ import _parser as report_parser
from zods.trajectory.__main__ import _parser as trajectory_parser

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("*.md"))}
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
DOCUMENTS = {"README.md": README, **PAGES}
# of other programs: the launchers, docker, transformers' Trainer, pip, the scripts in launch/
OTHERS = {"--module", "--num_gpus", "--ulimit", "--learning_rate", "--help", "--hostfile", "--host"}
OTHERS |= {"--nnodes", "--node_rank", "--master_addr", "--nproc_per_node", "--max_restarts"}
OTHERS |= {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--bind_cores_to_rank", "--no_ssh"}
OTHERS |= {"--fast", "--all", "--smoke", "--quick", "--part", "--seeds", "--data", "--shm-size"}
OTHERS |= {"--strict"}
# written by the runs that a page shows, or the reader's own
NOT_OURS = ("runs/", "./", "replayed/", "../shared")
PARSERS = {
    "zods.doctor": doctor_parser,
    "zods.plan": plan_parser,
    "zods.report": report_parser,
    "zods.trajectory": trajectory_parser,
}
COMMANDS = [
    pytest.param(command, id=f"{name}: {command[:60]}")
    for name, document in {"README.md": "README.md", **{p: f"docs/{p}" for p in PAGES}}.items()
    for command in commands(document)
    if any(f"-m {module}" in command or f"--module {module}" in command for module in PARSERS)
]
PYTHON = {
    name: "\n".join(blocks)
    for name, text in PAGES.items()
    if (blocks := re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
}
# a model and a dataset for a page that has none of its own
PRELUDE = {
    "index.md": """
from transformers import AutoModelForCausalLM
import torch
model = AutoModelForCausalLM.from_pretrained("launch/quickstart/model")
ids = torch.arange(8 * 32).view(32, 8)
dataset = [{"input_ids": row, "labels": row} for row in ids]
"""
}


def prose(text: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as Python-Markdown makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    kept = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"[-\s]+", "-", heading) for heading in kept}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_relative_links_lead_to_pages_and_headings(name: str):
    folder = REPOSITORY if name == "README.md" else DOCS
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(DOCUMENTS[name])):
        if target.startswith("https://"):
            continue
        page, _, anchor = target.partition("#")
        assert not page or (folder / page).exists(), target
        if anchor:
            assert anchor in anchors(DOCUMENTS[Path(page).name or name]), target


def test_every_page_is_in_the_navigation():
    def pages(nav: list[dict[str, Any]]) -> Iterator[str]:
        for target in (target for entry in nav for target in entry.values()):
            yield from [target] if isinstance(target, str) else pages(target)

    shown = list(pages(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"]))
    assert sorted(shown) == sorted(PAGES)
    assert [page for page in shown if f"docs/{page}" not in README and page != "index.md"] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_named_on_a_page_exist(name: str):
    path = r"[`( ]((?:[\w.-]+/)+[\w.-]+\.(?:md|json|py|sh|png|txt|cpp|yaml|sbatch|Dockerfile))\b"
    for file in re.findall(path, re.sub(r"https://\S+|<!--.*?-->", "", DOCUMENTS[name])):
        places = (REPOSITORY / file, REPOSITORY / "zods" / file)
        assert file.startswith(NOT_OURS) or any(place.exists() for place in places), file


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {o for sub in action.choices.values() for o in options_of(sub)}
    return found


@pytest.mark.parametrize("name", DOCUMENTS)
def test_options_named_on_a_page_are_options_of_zods(name: str):
    known = OTHERS.union(options_of(option_parser()), *(options_of(p()) for p in PARSERS.values()))
    if name == "evaluation.md":  # of lm-evaluation-harness
        pytest.skip("its options are of another program")
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", DOCUMENTS[name]))
    assert named <= known, sorted(named - known)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_modules_named_on_a_page_exist(name: str):
    for module in re.findall(r"(?:python -m|--module) (zods[\w.]*)", DOCUMENTS[name]):
        assert importlib.util.find_spec(module) is not None, module


@pytest.mark.parametrize("command", COMMANDS)
def test_shown_commands_are_parsed(command: str):
    words = shlex.split(command)
    module = next(word for word in words if word in PARSERS)
    given = arguments_after(words, module)
    if given not in ([], ["--help"]):
        PARSERS[module]().parse_args(["1" if word == "STEP" else word for word in given])


@pytest.mark.parametrize("name", PAGES)
def test_shown_configurations_are_accepted(name: str):
    for block in re.findall(r"^```json\n(.*?)^```", PAGES[name], re.MULTILINE | re.DOTALL):
        parse_section(json.loads(block)[SECTION])


def test_the_configuration_page_is_that_of_the_code():
    made = runpy.run_path(str(REPOSITORY / "launch" / "reference.py"))["with_tables"]
    page = PAGES["configuration.md"]
    assert made(page) == page, "run python launch/reference.py"


def sections(section: type[Section]) -> list[type[Section]]:
    section_of = runpy.run_path(str(REPOSITORY / "launch" / "reference.py"))["section_of"]
    inner = filter(None, map(section_of, section.model_fields.values()))
    return [section, *(found for one in inner for found in sections(one))]


def test_every_key_of_the_section_has_a_text():
    comments = runpy.run_path(str(REPOSITORY / "launch" / "reference.py"))["comments"]
    for section in sections(ZerothOrderConfig):
        texts = comments(section)
        for key, field in section.model_fields.items():
            described = re.search(rf"\b{key}\b", section.__doc__ or "")
            assert texts[key] or described or "Config" in str(field.annotation), (
                f"{section.__name__}.{key}: write a comment above it or behind it"
            )


@pytest.mark.launched
@pytest.mark.parametrize("name", PYTHON)
def test_the_programs_of_a_page_run(name: str, tmp_path: Path):
    for folder in ("launch", "ds_configs"):
        (tmp_path / folder).symlink_to(REPOSITORY / folder)
    (tmp_path / "page.py").write_text(PRELUDE.get(name, "") + PYTHON[name])
    told = subprocess.run(
        [sys.executable, "page.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr[-4000:]


@pytest.mark.launched
def test_mkdocs_builds_the_pages_without_a_warning(tmp_path: Path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", tmp_path / "site"]
    told = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr


def test_messages_in_troubleshooting_are_those_of_the_code():
    source = "".join(file.read_text() for file in (REPOSITORY / "zods").rglob("*.py"))
    source = re.sub(r"""["']\s*\n\s*f?["']""", "", source)  # a text over several lines
    tables = [part for part in PAGES["troubleshooting.md"].split("\n\n") if "| message" in part]
    assert len(tables) >= 4
    for row in (row for table in tables for row in table.splitlines() if row.startswith("| `")):
        if "mlock" not in row:  # a message of DeepSpeed
            for part in re.findall(r"`([^`]+)`", row.split(" | ")[0]):
                assert part in source, part

"""Every imported package is declared in pyproject.toml and pinned in constraints.txt.

A package that one feature needs is declared by the extra of that feature.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import runpy
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from zods.config import optional_packages

REPOSITORY = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
OWNERS = {  # folder: the extra whose packages its files may import, besides the dependencies
    "zods": None,
    "launch": None,
    "benchmarks": "benchmark",
    "tests": "test",
}
# In zods, imported inside a function only, where a user has asked for it: the extra that brings it
LAZY = {"matplotlib": "report", "mpi4py": "mpi", "peft": "lora"}
UNDECLARED = {"triton"}  # comes with torch's builds for GPUs, and is used nowhere else
# where the name is not that of the import
DISTRIBUTIONS = {
    "apricot": "apricot-select",
    "submodlib": "submodlib-py",
}


@functools.cache
def declared(extra: str | None) -> set[str]:
    """Packages of the dependencies and of `extra`, with the extras that it names."""
    requirements = [Requirement(text) for text in PROJECT["dependencies"]]
    waiting = [] if extra is None else [extra]
    while waiting:
        for requirement in map(Requirement, PROJECT["optional-dependencies"][waiting.pop()]):
            if requirement.name == "zods":
                waiting += requirement.extras
            else:
                requirements.append(requirement)
    return {canonicalize_name(requirement.name) for requirement in requirements}


def imports(folder: str) -> Iterator[tuple[Path, ast.Import | ast.ImportFrom, str, bool]]:
    """(file, statement, package outside the standard library and the project, whether at the file's
    top level).
    """
    files = sorted((REPOSITORY / folder).rglob("*.py"))
    own = {"zods", "tests"} | {file.stem for file in files if file.parent.name != "zods"}
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            else:
                continue
            for package in (
                {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names) - own
            ):
                yield file, node, package, node in tree.body


INSTALLED = packages_distributions()  # by the name that is imported


def distribution(package: str) -> str:
    installed = INSTALLED.get(package, [])
    return canonicalize_name(DISTRIBUTIONS.get(package) or (installed[0] if installed else package))


@pytest.mark.parametrize("folder", OWNERS)
def test_every_imported_package_is_declared(folder: str):
    found = declared(OWNERS[folder])
    for file, node, package, _ in imports(folder):
        allowed = found | declared(LAZY.get(package) if folder == "zods" else None)
        place = f"{file.relative_to(REPOSITORY)}:{node.lineno}"
        assert package in UNDECLARED or distribution(package) in allowed, (
            f"{place} imports {package}: declare {distribution(package)} in pyproject.toml"
        )


def test_the_citation_names_the_version_and_the_license():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])


def test_packages_of_extras_are_imported_only_where_they_are_used():
    at_top = {package for _, _, package, top_level in imports("zods") if top_level}
    assert not at_top & set(LAZY), "zods must import without its extras"


def test_what_transformers_requires_to_load_a_model_under_zero3_is_declared():
    """transformers looks for these packages when its HfDeepSpeedConfig is made, and imports some
    nowhere else.
    """
    from transformers.integrations import HfDeepSpeedConfig

    tree = ast.parse(textwrap.dedent(inspect.getsource(HfDeepSpeedConfig.__init__)))
    required = {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "dep_version_check"
    }
    assert "accelerate" in required, (
        "transformers checks its packages elsewhere now: find out where"
    )
    assert required <= declared(None)


def test_packages_that_features_ask_for_come_with_the_extra_that_the_message_names():
    needed = [optional_packages.PLOTS, optional_packages.LORA, *optional_packages.MONITORS.values()]
    for package, install in needed:
        requirement = Requirement(install)
        if requirement.name == "zods":
            assert package in declared(*requirement.extras), install
        else:
            assert canonicalize_name(requirement.name) == canonicalize_name(package)


def test_features_whose_package_is_missing_are_told_at_once(monkeypatch):
    monkeypatch.setattr(optional_packages, "LORA", ("no_such_adapters", "zods[lora]"))
    monkeypatch.setitem(optional_packages.MONITORS, "comet", ("no_such_monitor", "no_such_monitor"))
    config = {"comet": {"enabled": True}, "wandb": {"enabled": False}}
    with pytest.raises(
        ValueError,
        match=r"comet\.enabled: needs the package no_such_monitor.*--lora_rank: .*zods\[lora\]",
    ):
        optional_packages.check_packages(config, plot=True, new_adapter="--lora_rank")
    optional_packages.check_packages(
        {"comet": {"enabled": False}, "tensorboard": "wrong"}, plot=True
    )


def test_every_package_that_is_installed_with_the_tests_is_pinned():
    """The metadata of the installed packages tells them, for this Python and platform."""
    closure = runpy.run_path(str(REPOSITORY / ".ci" / "without_extras.py"))["closure"]
    requirements = [*PROJECT["dependencies"]]
    for of_extra in PROJECT["optional-dependencies"].values():
        requirements += [text for text in of_extra if not text.startswith("zods")]
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(line.split("==")[0]) for line in lines if "==" in line}
    # of torch's builds for GPUs: torch pins them itself
    on_gpus = re.compile(r"nvidia-|cuda-|triton$")
    missing = {name for name in closure(requirements) - pinned if not on_gpus.match(name)}
    assert not missing, f"constraints.txt does not pin {sorted(missing)}"


def test_pins_satisfy_the_declared_bounds():
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = {
        canonicalize_name(name): version
        for name, _, version in (line.partition("==") for line in lines if "==" in line)
    }
    requirements = [
        *PROJECT["dependencies"],
        *(text for texts in PROJECT["optional-dependencies"].values() for text in texts),
    ]
    for requirement in map(Requirement, requirements):
        if requirement.name != "zods":
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), (
                requirement
            )


def test_the_lock_file_has_hashes_of_all_pinned_packages_but_torch():
    lock = runpy.run_path(str(REPOSITORY / "launch" / "lock.py"))
    blocks = lock["blocks"]((REPOSITORY / "launch" / "lock.txt").read_text())
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = {line.lower().replace("_", "-") for line in lines if "==" in line}
    locked = {re.match(r"\S+", block)[0] for block in blocks}
    assert pins - locked == {f"torch=={version('torch').partition('+')[0]}"}
    assert locked <= pins, "run: python launch/lock.py write"
    for block in blocks:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), block


@pytest.mark.parametrize("extras", ["report", "report,monitor,lora,mpi", "test"])
def test_the_lock_file_selects_what_the_extras_need(extras):
    """The metadata of the installed packages tells it, for this Python and platform."""
    closure = runpy.run_path(str(REPOSITORY / ".ci" / "without_extras.py"))["closure"]
    requirements = [*PROJECT["dependencies"], f"zods[{extras}]"]
    wanted = {
        name for name in closure(requirements) if not re.match(r"nvidia-|cuda-|triton$", name)
    }
    lock = runpy.run_path(str(REPOSITORY / "launch" / "lock.py"))
    selected = {
        lock["name_of"](block) for block in lock["blocks"](lock["select"](extras.split(",")))
    }
    assert wanted - selected == {"torch", "zods"}


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_image_installs_what_the_scripts_install(kind):
    image = (REPOSITORY / "docker" / f"{kind}.Dockerfile").read_text()
    installed = re.search(r"launch/setup.sh ([\w,]+) --async_io", image)
    assert installed is not None
    extras_of_cli = {"report", "monitor", "lora", "mpi"}
    assert set(installed[1].split(",")) == extras_of_cli, "what the command line's options need"
    for package in ("g++", "libaio-dev"):
        assert package in image
        assert package in (REPOSITORY / "launch" / "setup.sh").read_text()
    for source in re.findall(r"^COPY (.+) \S+$", image, re.MULTILINE):
        for name in source.split():
            assert (REPOSITORY / name).exists(), name

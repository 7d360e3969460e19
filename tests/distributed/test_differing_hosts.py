"""Hosts with different versions, weights or configurations are named before the model is loaded."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.command_line import LAUNCHED, MODEL, launched_options, write_inputs
from tests.distributed.hosts import Hosts, by_mpirun, hosts
from tests.distributed.ranks import REPOSITORY

LOADING = "Loading weights"  # transformers says so


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with hosts(2, tmp_path_factory.mktemp("hosts") / "shared") as started:
        yield started


@contextlib.contextmanager
def seen_by_node2(two: Hosts, path: Path, content: Path) -> Iterator[None]:
    """The second host sees the content of another file in the place of one of its files."""
    assert two.run(2, ["mount", "--bind", str(content), str(path)])[0] == 0
    try:
        yield
    finally:
        assert two.run(2, ["umount", str(path)])[0] == 0


def metadata_of(package: str) -> Path:
    """The file in which a package's version is."""
    files = importlib.metadata.distribution(package).files or []
    return Path(next(file for file in files if file.name == "METADATA").locate())


def other_version(package: str) -> str:
    """A version that other packages accept, too."""
    major, minor, *_ = importlib.metadata.version(package).split(".")
    return f"{major}.{minor}.99"


def metadata_of_other_version(package: str, folder: Path) -> Path:
    """A copy of the package's metadata with another version."""
    version, text = f"Version: {other_version(package)}", metadata_of(package).read_text()
    text, count = re.subn(r"(?m)^Version: .*$", version, text)
    assert count == 1
    copy = folder / f"{package}-metadata"
    copy.write_text(text)
    return copy


def check_of_hosts(two: Hosts) -> tuple[int, str]:
    hostfile = two.folder / "hostfile"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
    return two.run(1, ["python", "-m", "zods.cli.hosts", str(hostfile)])


def test_a_host_with_other_files_of_zods_is_named(two, tmp_path):
    """The second host sees an older file in the place of one of zods's."""
    other = tmp_path / "other.py"
    other.write_text("# an older version\n")
    with seen_by_node2(two, REPOSITORY / "zods/core/step_size.py", other):
        code, output = check_of_hosts(two)
    assert code == 2
    assert re.search(r"error: node2: zods's files is \w+, but \w+ on node1\. Install", output)


@pytest.mark.parametrize("package", ["torch", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_a_host_with_another_version_of_a_package_is_named(package, two, tmp_path):
    other = metadata_of_other_version(package, tmp_path)
    with seen_by_node2(two, metadata_of(package), other):
        code, output = check_of_hosts(two)
    here = importlib.metadata.version(package)
    assert code == 2
    assert output.splitlines() == [
        f"zods: error: node2: {package} is {other_version(package)}, but {here} on node1. "
        "Install the same."
    ]


def changed_json(path: Path, copy: Path, **changed: Any) -> Path:
    copy.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    return copy


def other_weights(path: Path, copy: Path) -> Path:
    """A copy of a file of weights whose last weight is another."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(content)
    return copy


CODE = "the code (of zods or the model, or a version of torch, "
SAID = {
    "torch": CODE,
    "deepspeed": CODE,
    "weights": "a file of weights in ",
    "configuration": "the configuration differs",
    "model configuration": "the model's configuration differs",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", SAID)
def test_a_rank_whose_host_has_something_else_is_named_before_the_model_is_loaded(
    what, two, tmp_path
):
    """mpirun, unlike deepspeed.sh with a hostfile, starts ranks without a look at the hosts."""
    write_inputs(tmp_path, LAUNCHED)
    model, config = tmp_path / "model", tmp_path / "config.json"
    shutil.copytree(MODEL, model)
    weights, of_model = model / "model.safetensors", model / "config.json"
    other = tmp_path / "other"
    if what == "weights":
        path, content = weights, other_weights(weights, other)
    elif what == "configuration":
        path, content = config, changed_json(config, other, train_batch_size=16)
    elif what == "model configuration":
        path, content = of_model, changed_json(of_model, other, hidden_act="gelu")
    else:
        path, content = metadata_of(what), metadata_of_other_version(what, tmp_path)
    with seen_by_node2(two, path, content):
        code, output = by_mpirun(two, launched_options(tmp_path, "run", model=model))
    lines = [line for line in output.splitlines() if "zods.finetune: error: " in line]
    assert len(lines) == 1, output[-4000:]
    assert f"error: rank 1 (on node2): {SAID[what]}" in lines[0]
    assert LOADING not in output
    assert "Traceback" not in output
    assert code not in (0, 75)

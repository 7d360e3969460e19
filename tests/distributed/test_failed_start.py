"""A failure while a run starts, on one rank or on all: all ranks end soon, and one of them says why
in one line.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import zods
import zods.finetune
from tests.distributed.command_line import MODEL, prompted_options, write_inputs, write_rows
from tests.distributed.models import Tiny, configuration, tiny_data, tiny_opt
from tests.distributed.ranks import launch, options_of, run_command, run_ranks
from tests.helpers import sampled
from zods.cli.arguments import parse_arguments
from zods.comm.communicator import Communicator, RankFailure
from zods.comm.process import RANKS, SIZES, TORCH, connect_ranks

SCRIPT = Path(__file__).parent / "scripts" / "failed_start.py"
UNFORESEEN = [RuntimeError, KeyError, ImportError, AttributeError, AssertionError, MemoryError]
FOR_USERS = [ValueError, OSError, FileNotFoundError, UnicodeError]
ENDED = [KeyboardInterrupt, SystemExit]
BLOCKS: list[dict[int, type[BaseException]]] = [  # rank: what it raises
    *({1: kind} for kind in (*UNFORESEEN, *FOR_USERS, *ENDED)),
    {0: KeyError, 1: KeyError},
    {0: KeyError, 1: AttributeError},
]


def rank_of_blocks() -> list[tuple[str, str, str | None]]:
    """Of each of BLOCKS, what this rank raises: (type, text, type of the cause)."""
    comm = Communicator(torch.device("cpu"))
    found = []
    for raised in BLOCKS:
        try:
            with comm.same_on_all_ranks():
                if comm.rank in raised:
                    raise raised[comm.rank]("this is why")
        except BaseException as error:
            cause = None if error.__cause__ is None else type(error.__cause__).__name__
            found.append((type(error).__name__, str(error), cause))
    return found


@pytest.fixture(scope="module")
def raised() -> list[tuple[Any, Any]]:
    """Per block, what each of the two ranks raised."""
    first, second = run_ranks(2, rank_of_blocks)
    return list(zip(first, second, strict=True))


@pytest.mark.parametrize("kind", UNFORESEEN)
def test_an_exception_of_any_type_on_one_rank_is_raised_on_all_with_the_name_of_that_rank(
    raised, kind
):
    text = f"rank 1: {kind.__name__}: {kind('this is why')}"
    name = RankFailure.__name__
    # the traceback stays on the rank where it was raised
    assert raised[BLOCKS.index({1: kind})] == ((name, text, None), (name, text, kind.__name__))


@pytest.mark.parametrize("kind", FOR_USERS)
def test_bad_input_of_one_rank_keeps_its_type_for_those_who_handle_it(raised, kind):
    expected = "ValueError" if kind is UnicodeError else kind.__name__
    assert raised[BLOCKS.index({1: kind})] == ((expected, "rank 1: this is why", None),) * 2


@pytest.mark.parametrize("kind", ENDED)
def test_a_rank_that_is_asked_to_end_takes_the_others_along(raised, kind):
    first, second = raised[BLOCKS.index({1: kind})]
    assert first[:2] == (RankFailure.__name__, f"rank 1: {kind.__name__}: this is why")
    assert second[0] == kind.__name__


def test_an_exception_that_all_ranks_raise_stays_as_it_is(raised):
    assert (
        raised[BLOCKS.index({0: KeyError, 1: KeyError})]
        == (("KeyError", "'this is why'", None),) * 2
    )
    first, second = raised[BLOCKS.index({0: KeyError, 1: AttributeError})]
    text = "rank 0: KeyError: 'this is why'"
    assert (first, second) == (("RankFailure", text, "KeyError"), ("RankFailure", text, None))


class Rows:
    """Training data of which one method fails on rank 1."""

    def __init__(self, failing: str) -> None:
        self._failing = failing
        self._rows = tiny_data()

    def _fail_on_rank_1(self, method: str) -> None:
        if method == self._failing and torch.distributed.get_rank() == 1:
            raise AttributeError(f"no {method} here")

    def __len__(self) -> int:
        self._fail_on_rank_1("length")
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        self._fail_on_rank_1("row")
        return self._rows[index]


def rank_of_failing_data() -> dict[str, str]:
    said = {}
    for failing in ("length", "row"):
        with pytest.raises(RankFailure) as error:
            zods.initialize(
                model=Tiny(), config=configuration(8, method="mezo"), training_data=Rows(failing)
            )
        said[failing] = str(error.value)
    return said


def test_training_data_that_fail_on_one_rank_end_the_start_on_all_with_the_name_of_that_rank():
    for said in run_ranks(2, rank_of_failing_data):
        assert said == {
            what: f"rank 1: AttributeError: no {what} here" for what in ("length", "row")
        }


WAYS = {  # way: (what is said, exit code, exception of the traceback)
    "disagreement": ("rank 1: the model differs from rank 0's. The run stops here.", 1, None),
    "one rank, and the other waits for it": (
        "AttributeError: no attribute 'rotary'",
        1,
        "AttributeError",
    ),
    "one rank, before they are connected": ("rank 1: no such device", 2, None),
    "one rank, in a block that ranks agree on": (
        "rank 1: ImportError: no module for this model",
        1,
        "ImportError",
    ),
    "the same on all": ("KeyError: 'gate'", 1, "KeyError"),
}


DEFAULT = {"one rank, and the other waits for it"}


@pytest.mark.parametrize("way", sampled(WAYS, DEFAULT))
def test_a_failed_start_is_reported_in_one_line_by_one_rank(way):
    said, code, traceback = WAYS[way]
    returned, output = launch(SCRIPT, way)
    assert returned == code, output[-4000:]
    reported = [line for line in output.splitlines() if "a program: error:" in line]
    assert reported == [f"a program: error: {said}"]
    assert output.count("Traceback (most recent call last)") == (traceback is not None), output[
        -4000:
    ]
    if traceback is not None:
        assert re.search(rf"^{traceback}: ", output, re.MULTILINE)


@pytest.mark.slow
def test_a_port_in_use_is_one_line_that_names_it(tmp_path):
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    with socket.create_server(("", 0)) as other:
        port = str(other.getsockname()[1])
        command = [sys.executable, str(SCRIPT), "disagreement"]
        returned, output = run_command(command, tmp_path, **variables, MASTER_PORT=port)
    assert returned == 2, output[-4000:]
    assert f"a program: error: rank 0: MASTER_PORT: {port}, where another process" in output
    assert "Traceback" not in output


def test_a_rank_that_is_killed_at_the_start_leaves_no_traceback_of_the_others():
    returned, output = launch(SCRIPT, "one rank is killed, and the other waits for it")
    assert returned != 0
    reported = [line for line in output.splitlines() if "a program: error:" in line]
    assert [line for line in reported if "peer" not in line] == []
    assert "Traceback (most recent call last)" not in output, output[-4000:]


def test_a_models_code_that_fails_on_one_rank_ends_the_run_with_the_name_of_that_rank(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    settings = {
        "model_type": "own",
        "auto_map": {
            "AutoConfig": "own_settings.OwnConfig",
            "AutoModelForSequenceClassification": "own.Own",
        },
    }
    (model / "config.json").write_text(json.dumps(settings))
    (model / "own_settings.py").write_text(
        "import os\nfrom transformers import PretrainedConfig\n\n\nclass "
        "OwnConfig(PretrainedConfig):\n"
        "    model_type = 'own'\n    if os.environ['RANK'] == '1':\n        raise TypeError('a "
        "driver is missing')\n"
    )
    rows = [{"text": f"row {i}", "label": "ab"[i % 2]} for i in range(16)]
    write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "config.json").write_text(
        json.dumps({"train_batch_size": 4, "zeroth_order": {"method": "mezo"}})
    )
    code, output = launch(
        Path(zods.finetune.__file__),
        *options_of(
            deepspeed_config=tmp_path / "config.json",
            model=model,
            tokenizer=MODEL,
            trust_remote_code=True,
            train_file=tmp_path / "rows.jsonl",
            output_dir=tmp_path / "run",
        ),
    )
    assert code == 2, output[-4000:]
    reported = [line for line in output.splitlines() if "zods.finetune: error:" in line]
    assert reported == [
        f"zods.finetune: error: rank 1: --model {model}: TypeError: a driver is missing"
    ]
    assert not (tmp_path / "run").exists()


def rank_of_other_weights(folder: Path) -> str:
    rank = torch.distributed.get_rank()
    arguments = parse_arguments(
        list(map(str, prompted_options(folder, folder / "run", model=folder / f"model{rank}")))
    )
    with pytest.raises(RuntimeError, match=r".") as error:
        zods.finetune.start(arguments)
    return str(error.value)


def rank_of_another_configuration() -> str:
    model = tiny_opt()
    model.config.dropout = 0.1 * torch.distributed.get_rank()
    with pytest.raises(RuntimeError, match=r".") as error:
        zods.initialize(model=model, config=configuration(8, method="mezo"))
    return str(error.value)


def test_models_that_differ_in_their_configuration_alone_are_refused():
    for said in run_ranks(2, rank_of_another_configuration):
        assert said.startswith("rank 1: the model's configuration")


def test_other_base_weights_on_one_rank_are_refused_before_they_are_loaded(tmp_path):
    config = {"train_batch_size": 8, "zero_optimization": {"stage": 3}, "zeroth_order": {}}
    write_inputs(tmp_path, config)
    for rank in range(2):
        shutil.copytree(MODEL, tmp_path / f"model{rank}")
    weights = tmp_path / "model1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    for said in run_ranks(2, rank_of_other_weights, tmp_path):
        assert said.startswith("rank 1: a file of weights in ")
        assert "differs from rank 0's" in said


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "mpi4py"),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}, "mpi4py"),
        ({"RANK": "0", "LOCAL_RANK": "0"}, "but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
    ],
)
def test_incomplete_variables_of_a_launcher_are_refused_with_a_remedy(monkeypatch, variables, said):
    for name in (*TORCH, *SIZES, *RANKS):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # as where it is not installed
    before = dict(os.environ)
    with pytest.raises(ValueError, match=said) as caught:
        connect_ranks()
    assert "deepspeed or torchrun" in str(caught.value)
    assert dict(os.environ) == before


def test_one_rank_without_a_launcher_does_not_look_for_the_address_that_an_earlier_run_left(
    tmp_path,
):
    left = {"MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "1"}
    unset = [f"--unset={name}" for name in (*TORCH, *SIZES, *RANKS) if name not in left]
    code = (
        "from zods.comm.process import connect_ranks; print('ranks:', connect_ranks().world_size)"
    )
    returned, output = run_command(["env", *unset, sys.executable, "-c", code], tmp_path, **left)
    assert returned == 0, output[-4000:]
    assert "ranks: 1" in output

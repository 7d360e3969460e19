"""A failure while a run starts, on one rank or on all: all ranks end soon, and one of them says why in one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import zods.finetune
from tests.distributed.ranks import ENVIRONMENT, REPOSITORY, launch, run_ranks
from zods.comm import Communicator, RankFailure

SCRIPT = Path(__file__).parent / "scripts" / "failed_start.py"
MODEL = Path(__file__).parents[2] / "launch" / "quickstart" / "model"


def rank_of_block(raised: dict[int, type[BaseException]]) -> tuple[str, str, str | None]:
    """(type, text, type of the cause) of what a rank raises when the ranks in `raised` fail in a block."""
    comm = Communicator(torch.device("cpu"))
    try:
        with comm.same_on_all_ranks():
            if comm.rank in raised:
                raise raised[comm.rank]("this is why")
    except BaseException as error:
        comm.check_agreement(b"", "nothing: the ranks can still communicate")
        cause = None if error.__cause__ is None else type(error.__cause__).__name__
        return type(error).__name__, str(error), cause
    return "none", "", None


UNFORESEEN = [
    RuntimeError,
    KeyError,
    ImportError,
    AttributeError,
    AssertionError,
    MemoryError,
    torch.cuda.OutOfMemoryError,
]


@pytest.mark.parametrize("kind", UNFORESEEN)
def test_an_exception_of_any_type_on_one_rank_ends_all_of_them(kind):
    first, second = run_ranks(2, rank_of_block, {1: kind})
    described = str(kind("this is why"))
    for name, text, _ in (first, second):
        assert name == RankFailure.__name__
        assert text == f"rank 1: {kind.__name__}: {described}"
    assert (first[2], second[2]) == (None, kind.__name__), "the traceback is where it was raised"


def test_an_exception_on_all_ranks_stays_as_it_is():
    assert run_ranks(2, rank_of_block, {0: KeyError, 1: KeyError}) == [("KeyError", "'this is why'", None)] * 2


@pytest.mark.parametrize("kind", [ValueError, OSError, FileNotFoundError, UnicodeError])
def test_bad_input_of_one_rank_keeps_its_type_for_those_who_handle_it(kind):
    expected = "ValueError" if kind is UnicodeError else kind.__name__
    assert run_ranks(2, rank_of_block, {0: kind}) == [(expected, "rank 0: this is why", None)] * 2


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_a_rank_that_is_asked_to_end_takes_the_others_along(kind):
    first, second = run_ranks(2, rank_of_block, {1: kind})
    assert first[:2] == (RankFailure.__name__, f"rank 1: {kind.__name__}: this is why")
    assert second[0] == kind.__name__


WAYS = {  # way: (what is said, exit code, exception of the traceback)
    "disagreement": ("rank 1: the model differs from rank 0's. The run stops here.", 1, None),
    "one rank, and the other waits for it": ("AttributeError: no attribute 'rotary'", 1, "AttributeError"),
    "one rank, in a block that ranks agree on": ("rank 1: ImportError: no module for this model", 1, "ImportError"),
    "bad input of one rank": ("rank 1: --train_file rows.jsonl: found nothing", 2, None),
    "the same on all": ("KeyError: 'gate'", 1, "KeyError"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_failed_start_is_told_in_one_line_by_one_rank(way):
    said, code, traceback = WAYS[way]
    returned, output = launch(SCRIPT, way)
    assert returned == code, output[-4000:]
    told = [line for line in output.splitlines() if "a program: error:" in line]
    assert told == [f"a program: error: {said}"]
    assert output.count("Traceback (most recent call last)") == (traceback is not None), output[-4000:]
    if traceback is not None:
        assert re.search(rf"^{traceback}: ", output, re.MULTILINE)


def test_code_of_a_model_that_fails_on_one_rank_ends_the_run_with_the_name_of_that_rank(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    settings = {"model_type": "own", "auto_map": {"AutoConfig": "own_settings.OwnConfig"}}
    (model / "config.json").write_text(json.dumps(settings))
    (model / "own_settings.py").write_text(
        "import os\nfrom transformers import PretrainedConfig\n\n\nclass OwnConfig(PretrainedConfig):\n"
        "    model_type = 'own'\n    if os.environ['RANK'] == '1':\n        raise TypeError('a driver is missing')\n"
    )
    rows = [{"text": f"row {i}", "label": "ab"[i % 2]} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.json").write_text(json.dumps({"train_batch_size": 4, "zeroth_order": {"method": "mezo"}}))
    code, output = launch(
        Path(zods.finetune.__file__),
        *(
            "--deepspeed_config",
            tmp_path / "config.json",
            "--model",
            model,
            "--tokenizer",
            MODEL,
            "--trust_remote_code",
        ),
        *("--train_file", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "run"),
    )
    assert code == 1, output[-4000:]
    told = [line for line in output.splitlines() if "zods.finetune: error:" in line]
    assert told == ["zods.finetune: error: rank 1: TypeError: a driver is missing"]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "mpi4py"),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}, "mpi4py"),
        ({"RANK": "0", "LOCAL_RANK": "0"}, "but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
    ],
)
def test_a_launcher_that_cannot_be_understood_is_told_in_one_line(variables, said):
    known = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in known}
    environment |= {**ENVIRONMENT, "PYTHONPATH": str(REPOSITORY), **variables}
    command = [sys.executable, SCRIPT, "disagreement"]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert told.returncode == 2, told.stderr
    lines = [line for line in told.stderr.splitlines() if "a program: error:" in line]
    assert len(lines) == 1
    assert said in lines[0]
    assert "Traceback" not in told.stderr

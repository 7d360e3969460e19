"""A run under torch's elastic agent: a dead rank is started again with the others.

The run ends as the undisturbed one. DeepSpeed 0.19.8 has no elastic agent any more ("Elastic
training has been removed"), so torchrun is used.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.distributed.command_line import finetune_on_ranks, prompted_options, write_inputs
from tests.distributed.models import OF_THE_PAPER
from tests.distributed.ranks import run_command

CONFIG = {
    "train_batch_size": 8,
    "zero_optimization": {"stage": 3},
    "zeroth_order": {
        **OF_THE_PAPER,
        "lr": 1e-4,
        "anchor_interval": 3,
        "anchor": {"point": "terms", "gradient": "cpu"},
    },
}
# Runs zods.finetune. If the marker does not exist, rank 1 makes it and kills itself before the
# record of the third step.
DYING = """
import os, runpy, signal, sys
from pathlib import Path
from zods.training.training_run import TrainingRun
marker, commit = Path(sys.argv.pop(1)), TrainingRun.commit
def dying(self, record):
    if os.environ["RANK"] == "1" and self.state.global_steps == 2 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    commit(self, record)
TrainingRun.commit = dying
runpy.run_module("zods.finetune", run_name="__main__")
"""


def options_of_run(folder: Path, output: str) -> list[str]:
    others = {"max_steps": 5, "resume": "auto", "save_model": True}
    return prompted_options(folder, folder / output, **others)


def torchrun(folder: Path, output: str, marker: Path) -> str:
    """Run DYING on two ranks, which the agent may start twice. Returns the output."""
    (folder / "dying.py").write_text(DYING)
    elastic = ["--standalone", "--nproc_per_node=2", "--max_restarts=1"]
    command = [sys.executable, "-m", "torch.distributed.run", *elastic]
    command += [str(folder / "dying.py"), str(marker), *options_of_run(folder, output)]
    # Without this variable torch 2.13 gives the second start the store of the first one, which
    # still has the addresses of the first start's ranks.
    variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TMPDIR": str(folder)}
    code, said = run_command(command, folder, **variables)
    assert code == 0, said[-4000:]
    return said


def test_torchs_agent_starts_a_dead_rank_again_and_the_run_ends_as_the_undisturbed_one(
    tmp_path: Path,
):
    write_inputs(tmp_path, CONFIG)
    finetune_on_ranks(2, options_of_run(tmp_path, "undisturbed"))
    said = torchrun(tmp_path, "disturbed", tmp_path / "once")
    assert (tmp_path / "once").exists()
    assert re.search(r"at step [23], [23] of them from the log", said), said[-4000:]
    for name in ("trajectory.log", "model/model.safetensors"):
        assert (tmp_path / "disturbed" / name).read_bytes() == (
            tmp_path / "undisturbed" / name
        ).read_bytes()

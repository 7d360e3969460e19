"""A run under torch's elastic agent: a dead rank is started again with the others.

The run ends as the undisturbed one. DeepSpeed 0.19.8 has no elastic agent any more ("Elastic
training has been removed"), so torchrun is used.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.distributed.ranks import REPOSITORY, options_of, run_command

MODEL = REPOSITORY / "launch" / "quickstart" / "model"
CONFIG = {
    "train_batch_size": 8,
    "zero_optimization": {"stage": 3},
    "zeroth_order": {
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


def torchrun(folder: Path, output: str, marker: Path, nproc: int = 2) -> str:
    (folder / "dying.py").write_text(DYING)
    elastic = ["--standalone", f"--nproc_per_node={nproc}", "--max_restarts=1"]
    options = options_of(
        deepspeed_config=folder / "config.json",
        model=MODEL,
        output_dir=folder / output,
        task="prompted",
        template=r"{text}\nKind: {label}",
        train_file=folder / "train.jsonl",
        max_length=48,
        max_steps=5,
        resume="auto",
        save_model=True,
    )
    command = [sys.executable, "-m", "torch.distributed.run", *elastic]
    command += [str(folder / "dying.py"), str(marker), *options]
    # Without this variable torch 2.13 gives the second start the store of the first one, which
    # still has the addresses of the first start's ranks.
    variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TMPDIR": str(folder)}
    code, said = run_command(command, folder, **variables)
    assert code == 0, said[-4000:]
    return said


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [
        {"text": f"return the value of {i}", "label": ("code", "text")[i % 2]} for i in range(24)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_torchs_agent_starts_a_dead_rank_again_and_the_run_ends_as_the_undisturbed_one(folder):
    (folder / "never").touch()
    torchrun(folder, "undisturbed", folder / "never")
    said = torchrun(folder, "disturbed", folder / "once")
    assert (folder / "once").exists()
    assert re.search(r"at step [23], [23] of them from the log", said), said[-4000:]
    for name in ("trajectory.log", "model/model.safetensors"):
        assert (folder / "disturbed" / name).read_bytes() == (
            folder / "undisturbed" / name
        ).read_bytes()

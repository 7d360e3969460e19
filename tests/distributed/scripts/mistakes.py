"""Wrong input for zods on two ranks, for test_launcher.py.

Usage: mistakes.py OUTPUT_FOLDER NAME

The script makes one mistake, and its error ends the run. `rank_of_mistakes` tries all of them.
"""

import sys
from pathlib import Path

import torch
from torch import nn

import zods
from tests.distributed.models import Tiny, collate, configuration, tiny_data
from zods.config import optional_packages

MEZO = {"method": "mezo"}
NVME = {"method": "mezo_svrg", "anchor": {"point": "nvme", "gradient": "nvme"}}


class Silent(nn.Module):
    """Returns neither a loss nor logits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 5)

    def forward(self, ids, labels):
        return {"hidden": self.layer(ids.float())}


def start(config, model=None, data=None):
    return zods.initialize(
        model=model or Tiny(), config=config, training_data=tiny_data() if data is None else data
    )[0]


def step(engine):
    loss = engine(collate(tiny_data()[:4]))
    engine.backward(loss)
    engine.step()
    return engine


def mistakes(output):
    checkpoint = output / "checkpoint"
    truncated = output / "truncated"

    class Wider(Tiny):
        def __init__(self):
            super().__init__()
            self.hidden = nn.Linear(7, 13, bias=False)

    def wrong_batch():
        return start({**configuration(8, **MEZO), "train_micro_batch_size_per_gpu": 3})

    return {
        "unknown key": lambda: start(configuration(8, **MEZO, epss=1e-3)),
        "unknown anchor key": lambda: start(
            configuration(8, method="mezo_svrg", anchor={"points": "cpu"})
        ),
        "stage 2": lambda: start(configuration(8, stage=2, **MEZO)),
        "stage 1": lambda: start(configuration(8, stage=1, **MEZO)),
        "optimizer": lambda: start(configuration(8, top={"optimizer": {"type": "AdamW"}}, **MEZO)),
        "batch sizes": wrong_batch,
        "nvme_path": lambda: start(configuration(8, nvme_path=output / "nowhere", **NVME)),
        "no nvme_path": lambda: start(
            configuration(8, method="mezo_svrg", anchor={"gradient": "nvme", "nvme_path": None})
        ),
        "offload nvme_path": lambda: start(
            configuration(8, offload="nvme", nvme_path=output / "nowhere", **MEZO)
        ),
        "no loss": lambda: step(start(configuration(8, **MEZO), model=Silent())),
        "empty dataset": lambda: start(configuration(8, **MEZO), data=[]),
        "too few examples": lambda: start(configuration(8, **MEZO), data=tiny_data()[:5]),
        "no dataset": lambda: zods.initialize(
            model=Tiny(), config=configuration(8, method="mezo_svrg")
        ),
        "no package": lambda: start(configuration(8, top={"comet": {"enabled": True}}, **MEZO)),
        "no such file": lambda: start(str(output / "no.json")),
        "another model": lambda: start(configuration(8, **MEZO), model=Wider()).load_checkpoint(
            checkpoint
        ),
        "truncated checkpoint": lambda: start(configuration(8, **MEZO)).load_checkpoint(truncated),
    }


def prepare(output):
    """Write a checkpoint, and a truncated one."""
    engine = step(start(configuration(8, **MEZO)))
    engine.save_checkpoint(output / "checkpoint")
    engine.save_checkpoint(output / "truncated")
    if engine.global_rank == 0:
        file = output / "truncated" / "global_step1" / "parameters-rank00001-of-00002.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
    torch.distributed.barrier()


def rank_of_mistakes(output):
    """The error of each mistake: (type, text)."""
    optional_packages.MONITORS["comet"] = ("no_such_monitor", "no_such_monitor")
    prepare(output)
    errors = {}
    for mistake, make in mistakes(output).items():
        try:
            make()
            errors[mistake] = ("nothing", "")
        except Exception as error:
            errors[mistake] = (type(error).__name__, str(error))
    return errors


if __name__ == "__main__":
    given = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    mistakes(Path(given[0]))[given[1]]()

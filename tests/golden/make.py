"""Write files of this folder: `python -m tests.golden.make [RUN ...]`, in the repository's root.

With names of runs it adds those runs. Without a name it writes all files again.

Every later version must read the files of today. To write them again means to break the format or
the definition of a direction: the logs and checkpoints that users have are then no longer read, or
give other weights. Do it only together with a new `FORMAT` or `DEFINITION` in the package and an
entry in CHANGELOG.md. To cover a new format, add files beside the old ones.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import save_file

from tests.distributed.models import whole
from tests.distributed.ranks import run_ranks
from tests.golden.cases import (
    AFTER,
    BASE,
    DIRECTIONS,
    RUNS,
    RUNS_FOLDER,
    SAVED_AT,
    STEPS,
    Small,
    build,
    digest_of_words,
    digests_of_directions,
)
from zods.training.resume import CHECKPOINTS


def rank_of_run(name: str, folder: Path) -> None:
    """Make the run `name`. Write its log, its last weights, and a checkpoint where one is kept."""
    engine = build(name)
    engine.resume(folder)
    while engine.global_steps < STEPS:
        engine.train_batch()
        if RUNS[name].is_saved and engine.global_steps == SAVED_AT:
            engine.save_checkpoint(folder / CHECKPOINTS, client_state={"note": name})
    weights = whole(engine)
    if engine.global_rank == 0:
        save_file({key: value.contiguous() for key, value in weights.items()}, folder / AFTER)
    engine.close()


def main(names: list[str]) -> None:
    if not names:
        write_common()
    for name in names or RUNS:
        (RUNS_FOLDER / name).mkdir(parents=True)
        run_ranks(RUNS[name].num_ranks, rank_of_run, name, RUNS_FOLDER / name)


def write_common() -> None:
    """Write the directions and the base weights, and remove the runs."""
    DIRECTIONS.write_text(
        json.dumps({"words": digest_of_words(), "directions": digests_of_directions()}, indent=1)
        + "\n"
    )
    for folder in (BASE, RUNS_FOLDER):
        shutil.rmtree(folder, ignore_errors=True)
    BASE.mkdir()
    save_file(dict(Small().named_parameters()), BASE / "model.safetensors")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Save and load the first values of weights that the base model lacks: a new head, or adapters.

They are kept beside the trajectory log, because another version of a library or another number of
ranks may draw other values. Called by `zods.training.resume`.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError, safe_open

from zods.files import atomic_write, check_regular, make_folder, save_tensors
from zods.params.shards import Shard
from zods.params.zero3_adapter import gathered, release_gathered
from zods.training.training_run import TrainingRun
from zods.trajectory.records import Header


def _shards_named(run: TrainingRun, names: Collection[str]) -> list[Shard]:
    return [
        shard for shard in [*run.parameters.shards, *run.parameters.frozen] if shard.name in names
    ]


def save_initial_weights(run: TrainingRun, path: Path, names: Collection[str]) -> None:
    """Write the parameters of these names, whole, to `path`. All ranks call it together."""
    state = {}
    for shard in _shards_named(run, names):
        with gathered([shard.param]):
            if run.comm.rank == 0:
                state[shard.name] = shard.param.detach().to("cpu", copy=True)
    release_gathered(run.deepspeed)
    with run.comm.same_on_all_ranks():
        if run.comm.rank == 0:
            make_folder(path.parent)
            with atomic_write(path) as temporary:
                save_tensors(state, temporary)


def load_initial_weights(run: TrainingRun, path: Path, header: Header) -> None:
    """Set the parameters that `save_initial_weights` has kept.

    Raises ValueError, the same on all ranks, where the file is damaged or does not fit the log.
    """
    with run.comm.same_on_all_ranks():
        check_regular(path)
        if not path.is_file():
            return
        shapes = {parameter.name: list(parameter.shape) for parameter in header.parameters}
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                odd = [
                    name for name in names if file.get_slice(name).get_shape() != shapes.get(name)
                ]
                if odd:
                    raise ValueError(f"{path}: {odd[0]} is not as in the log.")
                shards = _shards_named(run, names)
                for shard, local in run.parameters.iterate_with_read_ahead(
                    write=True, shards=shards
                ):
                    values = file.get_tensor(shard.name).to(shard.dtype).view(-1)
                    local.copy_(values[shard.offset : shard.offset + shard.numel])
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged or truncated: {error}") from error

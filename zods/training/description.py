"""The header of a run's log: a description of the model and of the training data.

A log can be continued by a run whose description is equal (`zods.training.log_checks`).
"""

from __future__ import annotations

import json
from typing import Any

from zods.comm.communicator import Communicator
from zods.kernels import fingerprint
from zods.params.zero3_adapter import is_sharded, release_gathered
from zods.training.rank_agreement import describe_data
from zods.training.training_run import TrainingRun
from zods.trajectory.records import Header, ParameterRecord

# keys of a model's configuration on which no loss depends
NOT_COMPARED = (
    *("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype"),
    *("use_cache", "id2label", "label2id", "return_dict"),
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
)


def describe(run: TrainingRun, logged: Header | None = None) -> Header:
    """Describe the model as it is now, and the training data. All ranks call it together.

    logged: the header of the log that the run continues, if any. As many examples are digested as
    there.
    """
    run.flush()
    release_gathered(run.deepspeed)
    parameters, comm = run.parameters, run.comm
    shards = sorted([*parameters.shards, *parameters.frozen], key=lambda shard: shard.ordinal)
    own = [
        fingerprint(local, shard.offset)
        for shard, local in parameters.iterate_with_read_ahead(write=False, shards=shards)
    ]
    by_rank = comm.gather_integers([value - (value >> 63 << 64) for value in own])
    trained = {shard.ordinal for shard in parameters}
    records = []
    for shard, *values in zip(shards, *by_rank, strict=True):
        whole = sum(values) % 2**64 if is_sharded(shard.param) else values[0] % 2**64
        odd = [rank for rank, value in enumerate(values) if value != values[0]]
        if odd and not is_sharded(shard.param):
            raise RuntimeError(
                f"rank {', '.join(map(str, odd))}: the weights of {shard.name} differ from rank "
                "0's."
            )
        dtype = str(shard.dtype).removeprefix("torch.")
        records.append(
            ParameterRecord(shard.name, shard.shape, dtype, shard.ordinal in trained, whole)
        )
    names = {id(shard.param): shard.name for shard in shards}
    tied = {
        name: names[id(param)]
        for name, param in run.deepspeed.module.named_parameters(remove_duplicate=False)
        if names[id(param)] != name
    }
    module = run.deepspeed.module
    data = describe_data(run.loader, comm, num_digested(logged))
    return Header(type(module).__name__, tuple(records), tied, data, configuration_of(module))


def num_digested(header: Header | None) -> int | None:
    """The number of examples that a log's digest covers; None where it has no such digest."""
    data = None if header is None else header.data
    number, _, digest = ("" if data is None else data[1]).partition(":")
    return int(number) if digest and number.isdigit() else None


def configuration_of(module: Any) -> dict[str, Any] | None:
    """The configuration of a model of transformers, and of its adapters of PEFT, as JSON.

    None for other models. Keys that do not change what the model computes are left out.
    module: the model, or another object with its `config`.
    """
    config = getattr(module, "config", None)
    if not hasattr(config, "to_dict"):
        return None
    parts = {"": config, **getattr(module, "peft_config", {})}
    whole = {
        (f"adapter {name}: {key}" if name else key): value
        for name, part in parts.items()
        for key, value in part.to_dict().items()
        if key not in NOT_COMPARED
    }
    return json.loads(json.dumps(whole, sort_keys=True, default=_as_json))


def check_configurations(comm: Communicator, module: Any) -> None:
    """Raise Disagreement, on all ranks, where a rank's model has another configuration.

    Collective. module: as of `configuration_of`.
    """
    with comm.same_on_all_ranks():
        configuration = _compared(configuration_of(module))
    comm.check_agreement(json.dumps(configuration).encode(), "the model's configuration")


def _compared(settings: Any) -> Any:
    """Settings without the keys of NOT_COMPARED, those of inner models included."""
    if not isinstance(settings, dict):
        return settings
    return {key: _compared(of) for key, of in settings.items() if key not in NOT_COMPARED}


def _as_json(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    # the text of a function has its address, which differs between processes
    return getattr(value, "__qualname__", None) or str(value)

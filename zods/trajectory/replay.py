"""Replay of a log: from base weights and a log to the weights of the run.

It works parameter by parameter and applies all steps in one pass over each parameter. It reads a
folder of safetensors files, as transformers stores a model, and writes another folder. No model is
built, so that the model may be larger than memory. Each process of N writes its own files, without
communication. Every parameter's base weights are checked against the log's fingerprint before any
update is applied to them. Called by `python -m zods.trajectory replay`.
"""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from zods.core.directions import Direction
from zods.files import atomic_write
from zods.kernels import fingerprint
from zods.trajectory.log import Log, read_log
from zods.trajectory.records import Header, ParameterRecord
from zods.trajectory.updates import Change, History, direction_of, num_terms, replay_

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.index.json")
SHARD_BYTES = 1 << 30  # size of a written file, which is held in memory until it is written


class Unfit(ValueError):
    """Error: the keys in the base's files are not the names of the model's parameters."""


@dataclass(frozen=True)
class StoredTensor:
    """Location of a parameter's base weights. key: in this file and in the written file."""

    key: str
    file: Path
    parameter: ParameterRecord | None  # None: not a parameter of the model; copied unchanged
    ordinal: int
    nbytes: int


@dataclass(frozen=True)
class Done:
    """Result of a replay. element_terms: number of elements times terms that were applied."""

    steps: int
    element_terms: int
    seconds: float


@dataclass(frozen=True)
class _Parameter:
    ordinal: int
    shape: tuple[int, ...]


def replay(
    base: str | Path,
    log_path: str | Path,
    out: str | Path,
    *,
    until: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    shard_bytes: int = SHARD_BYTES,
) -> Done:
    """Write the weights after `until` steps to the folder `out`, for `from_pretrained`.

    base: a model's folder or its name on the hub. Weights that the base does not have (a new head,
    LoRA) are read from the folder `initial` beside the log. For a run with LoRA, `out` holds the
    adapters only. until: number of steps; None: all steps of the log. rank, world_size: index of
    this process and number of processes that share the work. shard_bytes: size of a written file.

    Raises ValueError or OSError: a damaged log, other base weights, weights in `out` already.
    """
    log = read_log(log_path)
    log.warn_if_torn()
    records = log.records if until is None else log.until(until)
    history = History()
    changes = [change for record in records if (change := history.change(record)) is not None]
    run = log.run_at_end()  # all run records have the same direction
    direction = Direction() if run is None else direction_of(run.section)
    steps = log.num_steps if until is None else until
    folder, initial = _folder_of(base), Path(log_path).parent / "initial"
    try:
        found = _stored_tensors(log.header, folder, initial)
    except Unfit as error:
        if world_size > 1:
            raise ValueError(f"{error} One process has to load the model whole.") from None
        logger.warning("%s The model is loaded whole instead.", error)
        return _replay_in_memory(
            log, folder, initial, Path(out), changes, direction, steps, str(error)
        )
    adapters = (initial / ADAPTER_CONFIG).is_file()
    written = [
        s for s in found if not adapters or (s.parameter is not None and s.parameter.trained)
    ]
    checked = [s for s in found if s not in written]
    shards = _shards(written, min(shard_bytes, -(-sum(s.nbytes for s in written) // world_size)))
    stem = "adapter_model" if adapters else "model"
    names = [f"{stem}.safetensors"] if len(shards) == 1 else [
        f"{stem}-{k + 1:05d}-of-{len(shards):05d}.safetensors" for k in range(len(shards))
    ]  # fmt: skip
    mine = [(names[k], shard) for k, shard in enumerate(shards) if k % world_size == rank]
    own = {name for name, _ in mine} | ({INDEX} if rank == 0 else set())
    _refuse_existing(Path(out), {*names, INDEX} - own)
    began = time.perf_counter()
    trained = sum(
        s.parameter.numel for _, shard in mine for s in shard if s.parameter and s.parameter.trained
    )
    total = trained * num_terms(changes)
    with tqdm(
        total=total, unit="terms", unit_scale=True, desc="replay", disable=rank != 0
    ) as progress:
        for stored in checked[rank::world_size]:
            _base_weights(stored)
        for name, shard in mine:
            tensors = {
                _written_key(s, adapters): _replayed(s, changes, direction, progress.update)
                for s in shard
            }
            with atomic_write(Path(out) / name) as temporary:
                save_file(tensors, temporary, {"format": "pt"})
    if rank == 0:
        _write_rest(log.header, folder, initial, Path(out), names, shards, adapters)
    return Done(steps, total, time.perf_counter() - began)


def _folder_of(base: str | Path) -> Path:
    if Path(base).is_dir():
        if (Path(base) / ADAPTER_CONFIG).is_file() and not (Path(base) / "config.json").is_file():
            raise ValueError(
                f"--base {base}: holds an adapter; give its base model, which the file "
                f"{ADAPTER_CONFIG} names."
            )
        return Path(base)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                str(base), ignore_patterns=["*.bin", "*.pt", "*.h5", "*.msgpack", "*.onnx"]
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"--base {base}: neither a folder nor a model that the hub gives ({error})."
        ) from None


def _keys(folder: Path) -> dict[str, Path]:
    """Map the key of every tensor in a model's folder to the tensor's file."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / INDEX
    try:
        if index.is_file():
            names = json.loads(index.read_text())["weight_map"]
            files = sorted({folder / Path(name).name for name in names.values()})
        found: dict[str, Path] = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        return found
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"--base {folder}: damaged: {error}") from error


def _stored_tensors(header: Header, folder: Path, initial: Path) -> list[StoredTensor]:
    """Find the file of every tensor; tied parameters have one entry."""
    ordinals = {parameter.name: ordinal for ordinal, parameter in enumerate(header.parameters)}
    names = {name: name for name in ordinals} | {
        alias: name for alias, name in header.tied.items() if name in ordinals
    }
    by_file_name = {name_in_files(name): of for name, of in names.items()}
    found: dict[str, StoredTensor] = {}
    others = []
    own = _keys(initial) if initial.is_dir() else {}
    for key, file in [*own.items(), *_keys(folder).items()]:
        name = names.get(key) if key in own else _parameter_of(key, by_file_name)
        if name in found:
            continue
        if name is None:
            others.append(StoredTensor(key, file, None, -1, _size(file, key)))
            continue
        parameter = header.parameters[ordinals[name]]
        size = parameter.numel * _dtype(parameter).itemsize
        found[name] = StoredTensor(key, file, parameter, ordinals[name], size)
    missing = sorted(set(ordinals) - set(found))
    if missing:
        raise Unfit(
            f"--base {folder}: {len(missing)} parameters of the log are not in its safetensors "
            f"files, e.g. {missing[0]}."
        )
    return [found[name] for name in ordinals] + others


def name_in_files(name: str) -> str:
    """A parameter's name in the base's files: without the parts that peft adds to it.

    >>> name_in_files("base_model.model.lm_head.base_layer.weight")
    'lm_head.weight'
    """
    return (
        name.removeprefix("base_model.model.")
        .replace(".base_layer.", ".")
        .replace(".original_module.", ".")
    )


def _parameter_of(key: str, names: dict[str, str]) -> str | None:
    """The parameter that a file's key refers to; None if there is none.

    The key may lack the first part of the parameter's name (`bert.`, `model.`), or have one more.
    """
    firsts = sorted({name.partition(".")[0] for name in names})
    for candidate in (key, *(f"{first}.{key}" for first in firsts), key.partition(".")[2]):
        if candidate in names:
            return names[candidate]
    return None


def _size(file: Path, key: str) -> int:
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(key).nbytes


def _dtype(parameter: ParameterRecord) -> torch.dtype:
    dtype = getattr(torch, parameter.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"the log says that {parameter.name} is of dtype {parameter.dtype!r}, which torch does "
            "not know."
        )
    return dtype


def _shards(tensors: Sequence[StoredTensor], size: int) -> list[list[StoredTensor]]:
    shards: list[list[StoredTensor]] = [[]]
    held = 0
    for stored in tensors:
        if shards[-1] and held + stored.nbytes > size:
            shards.append([])
            held = 0
        shards[-1].append(stored)
        held += stored.nbytes
    return shards


def _base_weights(stored: StoredTensor) -> torch.Tensor:
    """Read a parameter's base weights; check their shape and fingerprint against the log."""
    with safe_open(stored.file, framework="pt") as file:
        values = file.get_tensor(stored.key)
    parameter = stored.parameter
    if parameter is None:
        return values
    if tuple(values.shape) != parameter.shape:
        raise ValueError(
            f"{stored.file}: {stored.key} is of shape {tuple(values.shape)}, {parameter.shape} in "
            "the log. Give the base that the run started from."
        )
    values = values.to(_dtype(parameter), copy=True).contiguous()
    if fingerprint(values.view(-1)) != parameter.fingerprint:
        raise ValueError(
            f"{stored.file}: {stored.key} has other weights than the run started from. Give the "
            "base that it started from."
        )
    return values


def _replayed(
    stored: StoredTensor,
    changes: Sequence[Change],
    direction: Direction,
    progress: Callable[[int], object],
) -> torch.Tensor:
    values = _base_weights(stored)
    if stored.parameter is not None and stored.parameter.trained:
        replay_(
            values.view(-1),
            _Parameter(stored.ordinal, stored.parameter.shape),
            0,
            changes,
            direction,
            progress,
        )
    return values


def _written_key(stored: StoredTensor, adapters: bool) -> str:
    """The key in the written file.

    peft's files leave out the adapter's name (`default`), which is part of the names in the model.
    """
    return (
        stored.key.replace(".modules_to_save.default.", ".").replace(".default.", ".")
        if adapters
        else stored.key
    )


def _refuse_existing(out: Path, of_others: Collection[str] = ()) -> None:
    """Create the folder `out`.

    of_others: names of the files that other processes write. Raises ValueError if the folder holds
    other files with weights.
    """
    out.mkdir(parents=True, exist_ok=True)
    held = sorted(
        path.name for path in out.iterdir() if any(path.match(pattern) for pattern in WEIGHTS)
    )
    taken = [name for name in held if name not in of_others]
    if taken:
        raise ValueError(f"--out {out}: holds {taken[0]} already. Give another folder.")


def _write_rest(
    header: Header,
    folder: Path,
    initial: Path,
    out: Path,
    names: list[str],
    shards: list[list[StoredTensor]],
    adapters: bool,
) -> None:
    """Write the files beside the weights: configurations, tokenizer, index."""
    if adapters:
        shutil.copy(initial / ADAPTER_CONFIG, out)
        return
    for path in sorted(folder.iterdir()):
        if path.is_file() and not any(path.match(pattern) for pattern in WEIGHTS):
            shutil.copy(path, out)
    config = (
        initial / "config.json" if (initial / "config.json").is_file() else folder / "config.json"
    )
    if config.is_file():
        values = json.loads(config.read_text())
        values.pop("torch_dtype", None)
        dtype = next((p.dtype for p in header.parameters if p.trained), None)
        values |= {"dtype": dtype, "architectures": [header.model]}
        (out / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    if len(names) > 1:
        placed = {
            stored.key: name for name, shard in zip(names, shards, strict=True) for stored in shard
        }
        total = sum(stored.nbytes for shard in shards for stored in shard)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": placed}, indent=2)
        (out / INDEX).write_text(text + "\n")


def _replay_in_memory(
    log: Log,
    folder: Path,
    initial: Path,
    out: Path,
    changes: list[Change],
    direction: Direction,
    steps: int,
    unfit: str,
) -> Done:
    """Build the model and apply the log to its parameters.

    Used when the keys in the base's files are not the names of the model's parameters. unfit: the
    message that says so.
    """
    import transformers

    kind = getattr(transformers, log.header.model, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(
            f"{unfit} Nor can it be loaded whole: {log.header.model} is no model of transformers."
        )
    _refuse_existing(out)
    trained = [p for p in log.header.parameters if p.trained]
    dtype = _dtype(trained[0]) if trained else torch.float32
    config = initial if (initial / "config.json").is_file() else folder
    try:
        model = kind.from_pretrained(
            folder,
            config=transformers.AutoConfig.from_pretrained(config),
            dtype=dtype,
            weights_only=True,
        )
    except Exception as error:  # a file that holds no model can raise almost any exception
        harm = isinstance(error, pickle.UnpicklingError)
        wrong = (
            "a file of it is damaged or holds more than data; no code of it was run"
            if harm
            else str(error)
        )
        raise ValueError(f"{unfit} Nor can it be loaded whole: {wrong.splitlines()[0]}") from error
    live = dict(model.named_parameters())
    if list(live) != [p.name for p in log.header.parameters]:
        raise ValueError(
            f"--base {folder}: its {log.header.model} has other parameters than the log names."
        )
    for key, file in (_keys(initial) if initial.is_dir() else {}).items():
        with safe_open(file, framework="pt") as opened:
            live[key].data = opened.get_tensor(key).to(live[key].dtype)
    began = time.perf_counter()
    total = sum(p.numel for p in trained) * num_terms(changes)
    with (
        torch.no_grad(),
        tqdm(total=total, unit="terms", unit_scale=True, desc="replay") as progress,
    ):
        for ordinal, parameter in enumerate(log.header.parameters):
            values = live[parameter.name].data.contiguous()
            if fingerprint(values.view(-1)) != parameter.fingerprint:
                raise ValueError(
                    f"--base {folder}: {parameter.name} has other weights than the run started "
                    "from."
                )
            if parameter.trained:
                replay_(
                    values.view(-1),
                    _Parameter(ordinal, parameter.shape),
                    0,
                    changes,
                    direction,
                    progress.update,
                )
                live[parameter.name].data.copy_(values)
    model.save_pretrained(out)
    return Done(steps, total, time.perf_counter() - began)

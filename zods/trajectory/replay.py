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
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from zods.core.directions import Direction
from zods.files import (
    atomic_files,
    atomic_write,
    copy_file,
    make_folder,
    save_tensors,
)
from zods.kernels import fingerprint
from zods.trajectory.base_weights import (
    ADAPTER_CONFIG,
    INDEX,
    StoredTensor,
    Unfit,
    base_weights,
    copyable_files,
    dtype_of,
    files_of_keys,
    folder_of,
    stored_tensors,
)
from zods.trajectory.log import Log, read_log
from zods.trajectory.records import Header
from zods.trajectory.updates import Change, History, direction_of, num_terms, replay_

logger = logging.getLogger(__name__)

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.index.json")
CONFIG = "config.json"
SHARD_BYTES = 1 << 30  # size of a written file, which is held in memory until it is written


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
    changes, direction = _changes_of(log, until)
    steps = log.num_steps if until is None else until
    folder, initial = folder_of(base), Path(log_path).parent / "initial"
    try:
        found = stored_tensors(log.header, folder, initial)
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
    size = min(shard_bytes, -(-sum(s.nbytes for s in written) // world_size))
    files = _files_to_write(written, size, adapters)
    mine = files[rank::world_size]
    config = None if adapters else _read_config(log.header, folder, initial)
    own = {name for name, _ in mine} | ({INDEX} if rank == 0 else set())
    _refuse_existing(Path(out), {*(name for name, _ in files), INDEX} - own)
    began = time.perf_counter()
    trained = sum(
        s.parameter.numel for _, shard in mine for s in shard if s.parameter and s.parameter.trained
    )
    total = trained * num_terms(changes)
    with tqdm(
        total=total, unit="terms", unit_scale=True, desc="replay", disable=rank != 0
    ) as progress:
        for stored in checked[rank::world_size]:
            base_weights(stored)
        for name, shard in mine:
            tensors = {
                _written_key(s, adapters): _replayed(s, changes, direction, progress.update)
                for s in shard
            }
            with atomic_write(Path(out) / name) as temporary:
                save_tensors(tensors, temporary, {"format": "pt"})
    if rank == 0:
        _write_rest(config, folder, initial, Path(out), files, adapters)
    return Done(steps, total, time.perf_counter() - began)


def _changes_of(log: Log, until: int | None) -> tuple[list[Change], Direction]:
    """The changes of the parameters in the first `until` steps, and the form of the directions."""
    records = log.records if until is None else log.until(until)
    history = History()
    changes = [change for record in records if (change := history.change(record)) is not None]
    run = log.run_at_end()  # all run records have the same direction
    return changes, Direction() if run is None else direction_of(run.section)


def _files_to_write(
    tensors: Sequence[StoredTensor], size: int, adapters: bool
) -> list[tuple[str, list[StoredTensor]]]:
    """Divide tensors among files: (name, tensors) of each file.

    size: bytes per file. A larger tensor has a file of its own.
    """
    shards = _shards(tensors, size)
    stem = "adapter_model" if adapters else "model"
    names = [f"{stem}.safetensors"] if len(shards) == 1 else [
        f"{stem}-{k + 1:05d}-of-{len(shards):05d}.safetensors" for k in range(len(shards))
    ]  # fmt: skip
    return list(zip(names, shards, strict=True))


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


def _replayed(
    stored: StoredTensor,
    changes: Sequence[Change],
    direction: Direction,
    progress: Callable[[int], object],
) -> torch.Tensor:
    values = base_weights(stored)
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
    make_folder(out)
    held = sorted(
        path.name for path in out.iterdir() if any(path.match(pattern) for pattern in WEIGHTS)
    )
    taken = [name for name in held if name not in of_others]
    if taken:
        raise ValueError(f"--out {out}: holds {taken[0]} already. Give another folder.")


def _write_rest(
    config: dict[str, Any] | None,
    folder: Path,
    initial: Path,
    out: Path,
    files: Sequence[tuple[str, list[StoredTensor]]],
    adapters: bool,
) -> None:
    """Write the files beside the weights: configurations, tokenizer, index.

    config: the content of config.json; None: there is none to write.
    """
    folder = initial if adapters else folder
    for path, reason in sorted(copyable_files(folder).items()):
        if not (path.name == ADAPTER_CONFIG if adapters else _is_beside_weights(path)):
            continue
        if reason:
            logger.warning("%s: not copied: it is %s.", path, reason)
        elif path.name != CONFIG:
            copy_file(path, out / path.name)
    if adapters:
        return
    if config is not None:
        with atomic_write(out / CONFIG) as temporary:
            temporary.write_text(json.dumps(config, indent=2) + "\n")
    if len(files) > 1:
        file_of_key = {stored.key: name for name, shard in files for stored in shard}
        total = sum(stored.nbytes for _, shard in files for stored in shard)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": file_of_key}, indent=2)
        with atomic_write(out / INDEX) as temporary:
            temporary.write_text(text + "\n")


def _is_beside_weights(path: Path) -> bool:
    return not any(path.match(pattern) for pattern in WEIGHTS)


def _read_config(header: Header, folder: Path, initial: Path) -> dict[str, Any] | None:
    """The content of config.json for the replayed model; None where the model has none of its own."""
    path = next((path for path in (initial / CONFIG, folder / CONFIG) if path.is_file()), None)
    if path is None or copyable_files(path.parent)[path]:
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected {{...}}, found {type(values).__name__}.")
    values.pop("torch_dtype", None)
    dtype = next((p.dtype for p in header.parameters if p.trained), None)
    return {**values, "dtype": dtype, "architectures": [header.model]}


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
    message of the error `Unfit`.
    """
    kind = _model_class(log.header.model, unfit)
    _refuse_existing(out)
    model = _model_of_log(kind, log.header, folder, initial, unfit)
    live = dict(model.named_parameters())
    began = time.perf_counter()
    total = sum(p.numel for p in log.header.parameters if p.trained) * num_terms(changes)
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
    with atomic_files(out, SafetensorError) as temporary:
        model.save_pretrained(temporary)
    return Done(steps, total, time.perf_counter() - began)


def _model_class(name: str, unfit: str) -> Any:
    """The class of transformers that the log names. Raises ValueError where there is none."""
    import transformers

    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(f"{unfit} Nor can it be loaded whole: {name} is no model of transformers.")
    return kind


def _model_of_log(kind: Any, header: Header, folder: Path, initial: Path, unfit: str) -> Any:
    """Load the base model whole, with the weights in `initial`.

    Raises ValueError where it cannot be loaded, or has other parameters than the log.
    """
    trained = [p for p in header.parameters if p.trained]
    dtype = dtype_of(trained[0]) if trained else torch.float32
    model = _load_whole(kind, folder, initial, dtype, unfit)
    live = dict(model.named_parameters())
    if list(live) != [p.name for p in header.parameters]:
        raise ValueError(
            f"--base {folder}: its {header.model} has other parameters than the log names."
        )
    for key, file in (files_of_keys(initial) if initial.is_dir() else {}).items():
        with safe_open(file, framework="pt") as opened:
            live[key].data = opened.get_tensor(key).to(live[key].dtype)
    return model


def _load_whole(kind: Any, folder: Path, initial: Path, dtype: torch.dtype, unfit: str) -> Any:
    """Load a model of the class `kind`.

    Its configuration is in `initial`, or in the base's folder. Raises ValueError where it cannot be
    loaded.
    """
    import transformers

    config = initial if (initial / CONFIG).is_file() else folder
    try:
        return kind.from_pretrained(
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

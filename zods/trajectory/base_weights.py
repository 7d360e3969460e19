"""The base weights that a replay starts from: files of a model's folder, and their tensors.

Parameters are found by the names in the log's header. Their shapes and fingerprints are checked
against it when they are read. Callers: `zods.trajectory.replay`, and `zods.cli` for
`name_in_files`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from zods.files import check_regular
from zods.kernels import fingerprint
from zods.trajectory.records import Header, ParameterRecord

INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"


class Unfit(ValueError):
    """The keys in the base's files are not the names of the model's parameters."""


@dataclass(frozen=True)
class StoredTensor:
    """Location of a tensor's base weights.

    key: key of the tensor in `file`. ordinal: the parameter's position in `named_parameters()`; -1
    where the tensor is no parameter. nbytes: size in the dtype of the log.
    """

    key: str
    file: Path
    parameter: ParameterRecord | None  # None: not a parameter of the model; copied unchanged
    ordinal: int
    nbytes: int


def folder_of(base: str | Path) -> Path:
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


def files_of_keys(folder: Path) -> dict[str, Path]:
    """Map the key of every tensor in a model's folder to the tensor's file."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / INDEX
    check_regular(*files, index)
    try:
        if index.is_file():
            names = json.loads(index.read_text())["weight_map"]
            files = sorted({folder / Path(name).name for name in names.values()})
        check_regular(*files)
        found: dict[str, Path] = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        return found
    except (
        *(SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError),
        RecursionError,
    ) as error:
        raise ValueError(
            f"--base {folder}: damaged: {error}. Copy or download the model again."
        ) from error


def copyable_files(folder: Path) -> dict[Path, str]:
    """Map each file of a model's folder to the reason why it may not be copied; "" where it may.

    In a snapshot of the hub's cache all files are links to the cache's blobs, and their content may
    be copied. That of a link to any other place may not: it is not of the model.
    """
    root = folder.resolve()
    roots = [root]
    if root.parent.name == "snapshots":
        roots.append(root.parent.parent / "blobs")
    found = {}
    for path in folder.iterdir():
        target = Path(os.path.realpath(path))
        inside = any(target.is_relative_to(allowed) for allowed in roots)
        if not path.is_dir():
            found[path] = (
                "no regular file"
                if not path.is_file()
                else ""
                if inside
                else f"a link to {target}, outside of the model's folder"
            )
    return found


def stored_tensors(header: Header, folder: Path, initial: Path) -> list[StoredTensor]:
    """Find the file of every tensor; tied parameters have one entry."""
    ordinals = {parameter.name: ordinal for ordinal, parameter in enumerate(header.parameters)}
    names = {name: name for name in ordinals} | {
        alias: name for alias, name in header.tied.items() if name in ordinals
    }
    by_file_name = {name_in_files(name): of for name, of in names.items()}
    found: dict[str, StoredTensor] = {}
    others = []
    own = files_of_keys(initial) if initial.is_dir() else {}
    for key, file in [*own.items(), *files_of_keys(folder).items()]:
        name = names.get(key) if key in own else _parameter_of(key, by_file_name)
        if name in found:
            continue
        if name is None:
            others.append(StoredTensor(key, file, None, -1, _size(file, key)))
            continue
        parameter = header.parameters[ordinals[name]]
        size = parameter.numel * dtype_of(parameter).itemsize
        found[name] = StoredTensor(key, file, parameter, ordinals[name], size)
    missing = sorted(set(ordinals) - set(found))
    if missing:
        raise Unfit(
            f"--base {folder}: {len(missing)} parameters of the log are not in its safetensors "
            f"files, e.g. {missing[0]}."
        )
    return [found[name] for name in ordinals] + others


def name_in_files(name: str) -> str:
    """A parameter's name in the base's files, without the parts that peft adds.

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

    The key may be without the first part of the parameter's name (`bert.`, `model.`), or have an
    additional first part.
    """
    firsts = sorted({name.partition(".")[0] for name in names})
    for candidate in (key, *(f"{first}.{key}" for first in firsts), key.partition(".")[2]):
        if candidate in names:
            return names[candidate]
    return None


def _size(file: Path, key: str) -> int:
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(key).nbytes


def dtype_of(parameter: ParameterRecord) -> torch.dtype:
    dtype = getattr(torch, parameter.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"the log says that {parameter.name} is of dtype {parameter.dtype!r}, which torch does "
            "not know."
        )
    return dtype


def base_weights(stored: StoredTensor) -> torch.Tensor:
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
    values = values.to(dtype_of(parameter), copy=True).contiguous()
    if fingerprint(values.view(-1)) != parameter.fingerprint:
        raise ValueError(
            f"{stored.file}: {stored.key} has other weights than the run started from. Give the "
            "base that it started from."
        )
    return values

"""Check at the start that all ranks run the same: configuration, model, code and training data.

Called by `zods.initialize` before anything is sharded.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
from pathlib import Path
from typing import Any

import torch

from zods.comm.communicator import Communicator
from zods.comm.package_digest import package_digest
from zods.config.deepspeed_json import FirstOrderConfig, RunConfig
from zods.data.loader import TrainingLoader
from zods.kernels import fingerprint
from zods.params.zero3_adapter import is_sharded
from zods.selection.loaders import SelectingLoader

PACKAGES = ("torch", "deepspeed", "transformers")
# packages whose version, or whose digest, stands for the code of their modules
VERSIONED = (*PACKAGES, "peft", "zods")


def check_ranks_agree(
    comm: Communicator,
    run: RunConfig,
    model: torch.nn.Module,
    code: dict[str, str],
    loader: TrainingLoader | None,
) -> None:
    """Raise Disagreement, on all ranks, where a rank differs from rank 0.

    code: what computes the model, besides `code_in_use`.
    """
    check_code_and_configuration(comm, run, {**code_in_use(), **code})
    comm.check_agreement(
        _description(model), "the model (parameter names, shapes, dtypes, trainable or not)"
    )
    if loader is not None:
        comm.check_agreement(repr(describe_data(loader, comm)).encode(), "the training data")
    if not any(map(is_sharded, model.parameters())):
        _check_weights(model, comm)


def check_code_and_configuration(
    comm: Communicator, run: RunConfig | FirstOrderConfig, code: dict[str, str]
) -> None:
    """Raise Disagreement, on all ranks, where a rank's code or configuration differs from rank 0's.

    code: names and versions of the code in use.
    """
    configuration = _without_folders(run.to_dict())
    comm.check_agreement(json.dumps(configuration, sort_keys=True).encode(), "the configuration")
    comm.check_agreement(
        repr(code).encode(),
        f"the code (of zods or the model, or a version of {', '.join(PACKAGES)}, peft)",
    )


def _without_folders(config: Any) -> Any:
    """A configuration without the folders on NVMe, which may be a rank's own."""
    if not isinstance(config, dict):
        return config
    return {key: _without_folders(of) for key, of in config.items() if key != "nvme_path"}


def _description(model: torch.nn.Module) -> bytes:
    described = [
        (name, tuple(getattr(p, "ds_shape", p.shape)), str(p.dtype), p.requires_grad)
        for name, p in model.named_parameters()
    ]
    return repr(described).encode()


@functools.cache
def code_in_use() -> dict[str, str]:
    """The versions of the packages that compute a step, a digest of all files of zods, and, where
    there are, the name of the container image and a digest of the lock file of a checkout.
    """
    image = os.environ.get("ZODS_IMAGE")
    lock = Path(__file__).parents[2] / "launch" / "lock.txt"
    return {
        "zods": package_digest(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        **({"image": image} if image else {}),
        **({"lock": hashlib.sha256(lock.read_bytes()).hexdigest()[:16]} if lock.is_file() else {}),
    }


def code_of_model(model: torch.nn.Module) -> dict[str, str]:
    """The version of peft where the model has adapters, and a digest of the source files of its
    modules that are not of a package above.

    A module whose source cannot be found, as of a class that was typed in, is left out.
    """
    sources = set()
    for kind in {type(module) for module in model.modules()}:
        if kind.__module__.partition(".")[0] not in VERSIONED:
            with contextlib.suppress(OSError, TypeError):
                sources.add(Path(inspect.getsourcefile(kind) or "").read_bytes())
    code = {}
    if hasattr(model, "peft_config"):
        code["peft"] = importlib.metadata.version("peft")
    if sources:
        digest = hashlib.blake2b(digest_size=8)
        for source in sorted(sources):
            digest.update(source)
        code["model"] = digest.hexdigest()
    return code


def describe_data(
    loader: TrainingLoader | SelectingLoader | None,
    comm: Communicator,
    count: int | None = None,
) -> tuple[int, str] | None:
    """(number of examples, their digest) of the training data.

    None where there is no loader, or where an example differs when it is read again. All ranks call
    it together. count: the number of examples to digest; None: as many as rank 0 can read within
    `SECONDS` of `zods.data.digest`.
    """
    if loader is None:
        return None
    affordable = comm.gather_objects(loader.examples.affordable)[0]
    digest = loader.examples.digest(affordable if count is None else count)
    return None if digest is None else (len(loader.examples), digest)


def _check_weights(model: torch.nn.Module, comm: Communicator) -> None:
    """Check that all ranks were given the same weights.

    DeepSpeed would silently take rank 0's weights. But a run whose base weights differ between
    ranks can be neither resumed nor replayed.
    """
    own = [fingerprint(p.detach().contiguous().view(-1)) for p in model.parameters()]
    comm.check_agreement(
        repr(own).encode(),
        "the model (its weights: load the same files, and seed torch before a new layer is made)",
    )

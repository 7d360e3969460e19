"""Check at the start that all ranks run the same: configuration, model, code and training data.

Called by `zods.initialize` before anything is sharded.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path

import torch

from zods.comm.communicator import Communicator
from zods.config.deepspeed_json import RunConfig
from zods.data.loader import TrainingLoader
from zods.kernels import fingerprint
from zods.params.zero3_adapter import is_sharded

PACKAGES = ("torch", "deepspeed", "transformers")
PACKAGE = Path(__file__).parents[1]  # the folder of zods


def check_ranks_agree(
    comm: Communicator, run: RunConfig, model: torch.nn.Module, loader: TrainingLoader | None
) -> None:
    """Raise Disagreement, on all ranks, where a rank differs from rank 0."""
    comm.check_agreement(json.dumps(run.to_dict(), sort_keys=True).encode(), "the configuration")
    comm.check_agreement(
        _description(model), "the model (parameter names, shapes, dtypes, trainable or not)"
    )
    comm.check_agreement(
        _code_digest(), f"the code (of zods, or a version of {', '.join(PACKAGES)})"
    )
    if loader is not None:
        data = f"{len(loader.dataset)} {loader.data_digest}"  # type: ignore[arg-type]
        comm.check_agreement(data.encode(), "the training data")
    if not any(map(is_sharded, model.parameters())):
        _check_weights(model, comm)


def _description(model: torch.nn.Module) -> bytes:
    described = [
        (name, tuple(getattr(p, "ds_shape", p.shape)), str(p.dtype), p.requires_grad)
        for name, p in model.named_parameters()
    ]
    return repr(described).encode()


def _code_digest() -> bytes:
    """A digest of all files of zods, and of the versions of the packages that it computes with."""
    digest = hashlib.sha256(
        repr({name: importlib.metadata.version(name) for name in PACKAGES}).encode()
    )
    for path in sorted(p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".cpp")):
        digest.update(path.read_bytes())
    return digest.digest()


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

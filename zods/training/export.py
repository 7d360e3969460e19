"""The whole model, gathered from the ranks: as a state dict, and as a folder that `from_pretrained`
reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from zods.comm.communicator import Communicator
from zods.files import atomic_files, atomic_write, make_folder, save_tensors, write_errors
from zods.params.zero3_adapter import gathered, release_gathered

WEIGHTS = "model*.safetensors*"  # files of transformers: weights, and their index


def whole_state(deepspeed_engine: Any, comm: Communicator) -> dict[str, Any]:
    """The state dict of the engine's module with whole tensors in host memory, on rank 0; an empty
    dict on the other ranks.

    Its names are those of the module's own `state_dict()`. A parameter with two names is under
    both, as one tensor. One module is gathered at a time. The host memory of rank 0 must hold the model.
    All ranks call it together.
    """
    module = deepspeed_engine.module
    values: dict[int, torch.Tensor] = {}
    for submodule in module.modules():
        own = list(submodule.parameters(recurse=False))
        with gathered(own):
            if comm.rank == 0:
                values |= {
                    id(p): p.detach().to("cpu", copy=True) for p in own if id(p) not in values
                }
    release_gathered(deepspeed_engine)
    if comm.rank != 0:
        return {}
    state = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, torch.Tensor):
            if id(value) not in values:
                values[id(value)] = value.detach().to("cpu", copy=True)
            value = values[id(value)]
        state[name] = value
    return state


def save_16bit_model(deepspeed_engine: Any, comm: Communicator, path: Path) -> None:
    """Write `whole_state` by torch.save.

    All ranks call it together; OSError on all where it fails.
    """
    state = whole_state(deepspeed_engine, comm)
    with comm.same_on_all_ranks():
        if comm.rank == 0:
            make_folder(path.parent)
            with atomic_write(path) as temporary, write_errors(path, RuntimeError):
                torch.save(state, temporary)


def save_pretrained(deepspeed_engine: Any, comm: Communicator, save_dir: str | Path) -> None:
    """Export the whole model as a folder that `from_pretrained` reads, in the dtype of the run.

    Gathers one module at a time to rank 0, whose host memory must hold the model. A module that is
    not of transformers or peft is written as `model.safetensors`. Files of weights that an earlier
    export left are removed. All ranks call it together; ValueError or OSError on all where it
    fails.
    """
    state, module = whole_state(deepspeed_engine, comm), deepspeed_engine.module
    with runs_alone(getattr(module, "prompt_encoder", None)), comm.same_on_all_ranks():
        if comm.rank == 0:
            with atomic_files(Path(save_dir), SafetensorError, RuntimeError) as folder:
                if hasattr(module, "save_pretrained"):
                    module.save_pretrained(folder, state_dict=state)
                else:
                    tensors = {
                        name: value.clone(memory_format=torch.contiguous_format)
                        for name, value in state.items()
                        if isinstance(value, torch.Tensor)
                    }
                    save_tensors(tensors, folder / "model.safetensors")
                written = {path.name for path in folder.iterdir()}
            for path in Path(save_dir).glob(WEIGHTS):
                # from_pretrained would prefer an older model.safetensors to new shards
                if path.name not in written:
                    path.unlink()


@contextmanager
def runs_alone(module: torch.nn.Module | None) -> Iterator[None]:
    """Let rank 0 run a module without the other ranks: peft runs its prompt encoders to save their
    outputs.

    Inside, the module's parameters are gathered, and its hooks are removed, because ZeRO-3's hooks
    would start another gather.
    """
    modules = [] if module is None else list(module.modules())
    hooks = [hooks for m in modules for hooks in (m._forward_pre_hooks, m._forward_hooks)]
    with gathered([p for m in modules for p in m.parameters(recurse=False)]):
        kept = [dict(of_module) for of_module in hooks]
        for of_module in hooks:
            of_module.clear()
        try:
            yield
        finally:
            for of_module, before in zip(hooks, kept, strict=True):
                of_module.update(before)

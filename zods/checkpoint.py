"""Save and load a run, on any number of ranks, and export the model.

A checkpoint is a folder: `state.json` (counters, schedules, the anchor's terms, the loader's place) and per rank one
safetensors file of its slices of the trainable parameters, and one of the anchor point where that is stored. Slices
follow one another in rank order, so that another number of ranks cuts them anew. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from zods.estimators import Annealing
from zods.sharding import Slice, gathered, is_sharded, release_gathered

FORMAT = 1


def save_checkpoint(engine: Any, save_dir: str | Path, tag: str | None, client_state: dict[str, Any]) -> Path:
    """Write `save_dir`/`tag` under a temporary name, rename it when whole, then point `latest` to it.

    engine: a ZerothOrderEngine. tag: default `global_step<N>`. client_state: JSON. `save_dir` is shared by all ranks.
    """
    comm = engine.comm
    tag = tag or f"global_step{engine.global_steps}"
    final = Path(save_dir) / tag
    partial = Path(save_dir) / f".{tag}.partial"
    release_gathered(engine.deepspeed)
    with comm.same_on_all_ranks():
        if comm.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    with comm.same_on_all_ranks():
        owner = comm.rank == 0 or is_sharded(engine.parameters.slices[0].param)
        if owner:
            slices = {p.name: local.detach().cpu().clone() for p, local in engine.parameters.visit(write=False)}
            save_file(slices, partial / _file_name("parameters", comm.rank, comm.world_size))
            if engine.anchor is not None and engine.anchor.point is not None and engine.anchor_step is not None:
                slices = {
                    p.name: engine.anchor.stored_point(p, torch.device("cpu"))[: p.numel] for p in engine.parameters
                }
                save_file(slices, partial / _file_name("anchor_point", comm.rank, comm.world_size))
        if comm.rank == 0:
            (partial / "state.json").write_text(_state_text(engine, client_state))
    with comm.same_on_all_ranks():
        if comm.rank == 0:
            replaced = Path(save_dir) / f".{tag}.replaced"
            if final.exists():
                shutil.rmtree(replaced, ignore_errors=True)
                final.rename(replaced)
            partial.rename(final)
            shutil.rmtree(replaced, ignore_errors=True)
            pointer = Path(save_dir) / ".latest.partial"
            pointer.write_text(tag)
            os.replace(pointer, Path(save_dir) / "latest")
    return final


def load_checkpoint(engine: Any, load_dir: str | Path, tag: str | None) -> tuple[Path, dict[str, Any]]:
    """Bring `engine` to where the checkpoint stands; returns its folder and the client state.

    tag: default what `latest` says. Everything is checked before anything is changed: ValueError or OSError, the same on
    all ranks, for a missing, damaged or truncated checkpoint, and for one of another model or method.
    """
    comm = engine.comm
    with comm.same_on_all_ranks():
        folder = _find(Path(load_dir), tag)
        state = _read_state(folder)
        _check_fits(engine, folder, state)
        parameters = _SliceFiles(folder, "parameters", engine.parameters.slices)
        has_point = engine.anchor is not None and state["anchor_step"] is not None and state["anchor_point_stored"]
        point = _SliceFiles(folder, "anchor_point", engine.parameters.slices) if has_point else None
    release_gathered(engine.deepspeed)
    with comm.same_on_all_ranks():
        if engine.training_dataloader is not None and state["loader"] is not None:
            engine.training_dataloader.load_state_dict(state["loader"])
            engine.restart_loader()
        for piece, local in engine.parameters.visit(write=True):
            local.copy_(parameters.read(piece))
        if engine.anchor is not None and state["anchor_step"] is not None:
            _load_anchor(engine, state, None if point is None else point.read)
        _load_counters(engine, state)
    return folder, state["client_state"]


def save_pretrained(engine: Any, save_dir: str | Path) -> None:
    """Export the whole model as a folder that `from_pretrained` reads, in the dtype of the run.

    Gathers one module at a time to rank 0, whose host memory must hold the model. A module that is not of transformers
    or peft is written as `model.safetensors`.
    """
    state: dict[str, torch.Tensor] = {}
    first_name: dict[int, str] = {}
    for prefix, module in engine.module.named_modules():
        own = dict(module.named_parameters(recurse=False))
        with gathered(list(own.values())):
            if engine.comm.rank != 0:
                continue
            for name, param in own.items():
                key = f"{prefix}.{name}" if prefix else name
                tied = first_name.setdefault(id(param), key)
                state[key] = state[tied] if tied != key else param.detach().to("cpu", copy=True)
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    state[f"{prefix}.{name}" if prefix else name] = buffer.detach().cpu().clone()
    release_gathered(engine.deepspeed)
    with engine.comm.same_on_all_ranks():
        if engine.comm.rank == 0:
            Path(save_dir).mkdir(parents=True, exist_ok=True)
            if hasattr(engine.module, "save_pretrained"):
                engine.module.save_pretrained(save_dir, state_dict=state)
            else:
                save_file({k: v.clone() for k, v in state.items()}, Path(save_dir) / "model.safetensors")


def _file_name(role: str, rank: int, world_size: int) -> str:
    return f"{role}-rank{rank:05d}-of-{world_size:05d}.safetensors"


def _state_text(engine: Any, client_state: dict[str, Any]) -> str:
    anchor = engine.anchor
    state = {
        "format": FORMAT,
        "parameters": [[p.name, list(p.shape), str(p.dtype)] for p in engine.parameters],
        "zeroth_order": engine.config.zeroth_order.to_dict(),
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "skipped_steps": engine.skipped_steps,
        "digest": engine.digest.hex(),
        "annealing": asdict(engine.annealing),
        "lr": [group["lr"] for group in engine.optimizer.param_groups],
        "scheduler": None if engine.lr_scheduler is None else engine.lr_scheduler.state_dict(),
        "loader": None if engine.training_dataloader is None else engine.training_dataloader.state_dict(),
        "anchor_step": engine.anchor_step,
        "anchor_point_stored": anchor is not None and anchor.point is not None,
        "anchor": None if anchor is None else anchor.state_dict(),
        "client_state": client_state,
    }
    try:
        return json.dumps({**state, "checksum": _checksum(state)}, indent=1)
    except TypeError as error:
        raise ValueError(f"checkpoint: client_state and the scheduler's state must be JSON: {error}") from error


def _checksum(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _find(load_dir: Path, tag: str | None) -> Path:
    if tag is None:
        latest = load_dir / "latest"
        if not latest.is_file():
            raise FileNotFoundError(f"checkpoint {load_dir}: no file `latest`. Give a folder of checkpoints, or a tag.")
        tag = latest.read_text().strip()
    folder = load_dir / tag
    if not (folder / "state.json").is_file():
        raise FileNotFoundError(
            f"checkpoint {folder}: no state.json. It is not a checkpoint of zods, or is incomplete."
        )
    return folder


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / "state.json").read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"checkpoint {folder}/state.json: damaged or truncated: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"checkpoint {folder}: not of format {FORMAT}, which this version of zods reads.")
    if state.pop("checksum", None) != _checksum(state):
        raise ValueError(f"checkpoint {folder}/state.json: damaged: its checksum is wrong.")
    return state


def _check_fits(engine: Any, folder: Path, state: dict[str, Any]) -> None:
    ours = [[p.name, list(p.shape), str(p.dtype)] for p in engine.parameters]
    if state["parameters"] != ours:
        odd = [pair for pair in zip(state["parameters"], ours, strict=False) if pair[0] != pair[1]]
        found, expected = odd[0] if odd else (f"{len(state['parameters'])} parameters", f"{len(ours)}")
        raise ValueError(
            f"checkpoint {folder}: it is of another model: found {found}, this model has {expected}. Load the model and "
            "the set of trainable parameters that it was made with."
        )
    saved, here = state["zeroth_order"], engine.config.zeroth_order.to_dict()
    for key in ("method", "direction"):
        if saved[key] != here[key]:
            raise ValueError(
                f"checkpoint {folder}: made with zeroth_order.{key} = {saved[key]!r}, this run has {here[key]!r}. "
                "Resume with the same."
            )
    if (state["scheduler"] is None) != (engine.lr_scheduler is None):
        raise ValueError(
            f"checkpoint {folder}: made {'without' if state['scheduler'] is None else 'with'} a scheduler."
        )


def _load_anchor(engine: Any, state: dict[str, Any], stored: Callable[[Slice], torch.Tensor] | None) -> None:
    anchor = engine.anchor
    anchor.load_state_dict(state["anchor"])
    anchor.set_gradient(anchor.gradient_terms)
    if anchor.point is None:
        return
    for piece, local in engine.parameters.visit(write=False):
        anchor.point.write(piece, anchor.reconstruct(piece, local) if stored is None else stored(piece))


def _load_counters(engine: Any, state: dict[str, Any]) -> None:
    engine.global_steps = state["global_steps"]
    engine.global_samples = state["global_samples"]
    engine.skipped_steps = state["skipped_steps"]
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    engine.digest = bytes.fromhex(state["digest"])
    engine.annealing = Annealing(**state["annealing"])
    engine.anchor_step = state["anchor_step"]
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(state["scheduler"])
        for group, lr in zip(engine.optimizer.param_groups, state["lr"], strict=True):
            group["lr"] = lr


class _SliceFiles:
    """The files of one role, all ranks' slices of a parameter taken as one whole. Checked when opened."""

    def __init__(self, folder: Path, role: str, pieces: Sequence[Slice]) -> None:
        paths = sorted(folder.glob(f"{role}-rank*-of-*.safetensors"))
        if not paths:
            raise ValueError(f"checkpoint {folder}: no file of the {role}. It is incomplete.")
        try:
            self._files: list[Any] = [safe_open(path, framework="pt") for path in paths]
            for piece in pieces:
                found = sum(f.get_slice(piece.name).get_shape()[0] for f in self._files)
                if found != piece.whole_numel:
                    raise ValueError(
                        f"checkpoint {folder}: {piece.name} has {found} of {piece.whole_numel} elements in the "
                        f"{len(paths)} files of the {role}. A rank's file is missing."
                    )
        except SafetensorError as error:
            raise ValueError(f"checkpoint {folder}: a file of the {role} is damaged or truncated: {error}") from error

    def read(self, piece: Slice) -> torch.Tensor:
        """This rank's elements of `piece`."""
        parts, start = [], 0
        for file in self._files:
            saved = file.get_slice(piece.name)
            end = start + saved.get_shape()[0]
            low, high = max(piece.offset, start), min(piece.offset + piece.numel, end)
            if low < high:
                parts.append(saved[low - start : high - start])
            start = end
        return torch.cat(parts) if parts else torch.empty(0, dtype=piece.dtype)

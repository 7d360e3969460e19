"""Compute the final figures of a run and format them as a table. Caller: `zods.finetune`."""

from __future__ import annotations

import resource
import statistics
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.comm.comm import comms_logger

from zods.training.engine import ZerothOrderEngine
from zods.training.first_order import FirstOrderEngine


def summarise(
    engine: ZerothOrderEngine | FirstOrderEngine,
    before: dict[str, float],
    after: dict[str, float],
    in_context: dict[str, float],
    *,
    seconds: list[float],
    sent: int,
    gathered: int,
) -> dict[str, Any]:
    """Compute the figures of a run as a flat dict. Figures that do not apply to the run are absent.

    All ranks must call it: peak memory is gathered from them.

    before, after: means over the held-out data. in_context: those before training, with solved
    examples before the prompts; may be empty. seconds: time of each step. sent: bytes that zods
    sent in all steps. gathered: bytes that ZeRO-3 gathered.
    """
    steps = max(len(seconds), 1)
    peaks = engine.comm.gather_scalars([float(_peak_memory_bytes(engine.device))])
    summary: dict[str, Any] = {
        **{f"{name}_before": value for name, value in before.items()},
        **{f"{name}_after": value for name, value in after.items()},
        **{f"{name}_in_context": value for name, value in in_context.items()},
        "steps": engine.global_steps,
        "step_seconds_median": statistics.median(seconds) if seconds else None,
        "train_seconds": sum(seconds),
        "zods_bytes_per_step": sent / steps,
        "zero3_bytes_per_step": gathered / steps if comms_logger.enabled else None,
        "peak_memory_bytes": [int(row[0]) for row in peaks],
    }
    loader = engine.training_dataloader
    if loader is not None and loader.mixture is not None:
        drawn = engine.global_steps * engine.config.deepspeed["train_batch_size"]
        summary["mixture_passes"] = loader.mixture.passes(drawn)
    if isinstance(engine, ZerothOrderEngine) and engine.global_steps:
        summary["evaluation"] = engine.evaluation
        summary |= engine.noise.summary()
    if engine.anchor:
        summary["anchor_gather_bytes_per_step"] = engine.comm.gather_bytes / steps
        summary["anchor_device_bytes"] = engine.anchor.device_bytes
        summary["anchor_offloaded_bytes"] = engine.anchor.offloaded_bytes
    return summary


def table(summary: dict[str, Any]) -> str:
    """Format the summary as a short table."""
    mib = 1 << 20
    seconds, zero3 = summary["step_seconds_median"], summary["zero3_bytes_per_step"]
    anchor = "anchor_device_bytes" in summary
    rows = [
        _measured(summary, key.removesuffix("_after")) for key in summary if key.endswith("_after")
    ]
    rows += [
        (f"held-out {key.removesuffix('_in_context')}, examples in context", f"{value:.3f}")
        for key, value in summary.items()
        if key.endswith("_in_context")
    ]
    refreshes = " (anchor refreshes in them)" if anchor else ""
    rows += [
        ("steps", f"{summary['steps']} in {summary['train_seconds']:.0f} s{refreshes}"),
        ("time per step (median)", "-" if seconds is None else f"{seconds * 1e3:.0f} ms"),
    ]
    if "mixture_passes" in summary:
        passes = summary["mixture_passes"].items()
        rows.append(("passes over each source", ", ".join(f"{n} {v:.2f}" for n, v in passes)))
    if summary.get("evaluation") is not None:
        rows.append(("evaluation", summary["evaluation"]))
    rows.append(("sent per step and rank by zods", f"{summary['zods_bytes_per_step']:.0f} bytes"))
    if anchor:
        rows.append(
            (
                "  gathered of the anchor point",
                f"{summary['anchor_gather_bytes_per_step'] / mib:.1f} MiB",
            )
        )
    counted = "not counted (enable comms_logger)" if zero3 is None else f"{zero3 / mib:.1f} MiB"
    rows += [
        ("  gathered by ZeRO-3", counted),
        (
            "peak memory per rank",
            ", ".join(f"{b / mib:.0f} MiB" for b in summary["peak_memory_bytes"]),
        ),
    ]
    if anchor:
        rows += [
            ("anchor per rank, on the device", f"{summary['anchor_device_bytes'] / mib:.1f} MiB"),
            ("anchor per rank, offloaded", f"{summary['anchor_offloaded_bytes'] / mib:.1f} MiB"),
        ]
    if "advice" in summary:
        rows += _noise(summary)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _measured(summary: dict[str, Any], name: str) -> tuple[str, str]:
    """A metric of the held-out data before and after training, as texts; once without training."""
    before, after = summary.get(f"{name}_before"), f"{summary[f'{name}_after']:.3f}"
    if not summary["steps"]:
        return f"held-out {name}", after
    return f"held-out {name}", f"{'-' if before is None else f'{before:.3f}'} -> {after}"


def _noise(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The noise of the estimates, and the advice that follows from it."""
    scale = summary.get("noise_scale")
    shares = {
        name: summary[key]
        for name, key in (
            ("direction", "direction_noise"),
            ("batch", "batch_noise"),
            ("anchor staleness", "staleness"),
        )
        if key in summary
    }
    return [
        ("noise scale (variance / square)", "not known" if scale is None else f"{scale:.3g}"),
        ("  shares of noise", ", ".join(f"{n} {v:.0%}" for n, v in shares.items()) or "not known"),
        ("  advice", summary["advice"]),
    ]


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return get_accelerator().max_memory_allocated()

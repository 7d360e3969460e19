"""The cost of a step over the bare forwards it needs, in one process, interleaved: `python benchmarks/step_time.py`.

floor: the bare forwards of the same model on the same batch. published: MeZO's published procedure (Malladi et al. 2023,
algorithm 1), written from its description: perturb in place with torch.normal by +eps, -2 eps, +eps, then update.
Prints one JSON object; ratios are medians over rounds of (step / floor of the same round).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from common import machine, opt_125m, single_rank_engine, token_batch


def published_mezo_step(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], seed: int, eps: float, lr: float
) -> None:
    """One MeZO step as published: the direction is drawn anew from the seed for each of four in-place passes."""

    def walk(scale: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            z = torch.normal(mean=0.0, std=1.0, size=parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data.add_(z, alpha=scale)

    walk(eps)
    loss_plus = model(**batch).loss.item()
    walk(-2 * eps)
    loss_minus = model(**batch).loss.item()
    walk(eps)
    walk(-lr * (loss_plus - loss_minus) / (2 * eps))


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    arguments = parser.parse_args()

    batch = token_batch(arguments.batch_size, arguments.length)
    bare = opt_125m()
    steps: dict[str, tuple[int, Callable[[], object]]] = {
        "published_mezo gaussian": (2, lambda: published_mezo_step(bare, batch, seed=7, eps=1e-3, lr=0.0))
    }
    anchor = {"point": "terms", "gradient": "cpu"}
    sections = {
        f"mezo {direction}": (2, {"method": "mezo", "direction": direction}) for direction in ("gaussian", "rademacher")
    } | {"mezo_svrg gaussian": (4, {"method": "mezo_svrg", "anchor_interval": 10**6, "anchor": anchor})}
    for name, (num_forwards, section) in sections.items():
        engine = single_rank_engine(opt_125m(), {"lr": 1e-9, **section})

        def step(engine=engine) -> None:
            engine.backward(engine(batch))
            engine.step()

        steps[name] = (num_forwards, step)
    for _, step in steps.values():
        step()  # builds, first-batch check, anchor

    floors: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        floors.append(seconds(lambda: (bare(**batch), bare(**batch))))
        for name, (_, step) in steps.items():
            times[name].append(seconds(step))
    rows = [
        {
            "step": name,
            "forwards": num,
            "dtype": "float32",
            "ratio_to_floor": statistics.median(t / (f * num / 2) for t, f in zip(times[name], floors, strict=True)),
            "step_s": statistics.median(times[name]),
            "floor_s": statistics.median(floors) * num / 2,
        }
        for name, (num, _) in steps.items()
    ]
    print(json.dumps({"benchmark": "step_time", "arguments": vars(arguments), "machine": machine(), "rows": rows}))


if __name__ == "__main__":
    main()

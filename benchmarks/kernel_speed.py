"""Measure how fast directions are applied on the CPU, beside torch's own in-place addition.

    python benchmarks/kernel_speed.py [--numel 67108864] [--rounds 9] [--replay-numel 4194304]

Prints one JSON object. Rates are in elements per second. A replay makes 64 sweeps of one term over
--replay-numel elements, and its rate counts an element once for each sweep. So it is the rate at
which the directions are made.

In every round each candidate runs once, so that other jobs on the machine slow all candidates down
alike. Medians are compared. Memory's speed can hide the time of arithmetic, but arithmetic does not
hide the time of memory: on a machine whose cores are shared, the ratios are lower.
"""

import argparse
import datetime
import json
import os
import statistics
import time
from collections.abc import Callable

import torch
from common import add_smoke_option, machine

from zods.kernels import DISTRIBUTIONS, Sweep, backend, combine_, fingerprint, replay_

SWEEPS = 64


def candidates(x: torch.Tensor, y: torch.Tensor) -> dict[str, Callable[[], object]]:
    def apply(distribution: str, num_terms: int, rounding_seed: int | None) -> Callable[[], object]:
        terms = {
            "seeds": list(range(num_terms)),
            "coefficients": [1e-3] * num_terms,
            "distribution": distribution,
        }
        return lambda: combine_(
            x, weight=x, parameter=1, offset=0, rounding_seed=rounding_seed, **terms
        )

    def copies(distribution: str) -> Callable[[], object]:
        terms = {"seeds": [1], "coefficients": [1e-3], "distribution": distribution}
        return lambda: combine_(plus, weight=x, mirror=minus, parameter=1, offset=0, **terms)

    plus, minus = torch.empty_like(x), torch.empty_like(x)
    found: dict[str, Callable[[], object]] = {
        "copy_": lambda: y.copy_(x),
        "copy_ twice": lambda: (plus.copy_(x), minus.copy_(x)),
        "add_ of a tensor": lambda: x.add_(y, alpha=1e-3),
        "add_ of a scalar": lambda: x.add_(1e-3),
        "normal_ and add_": lambda: x.add_(torch.empty_like(x).normal_(), alpha=1e-3),
    }
    for distribution in DISTRIBUTIONS:
        found[f"{distribution}, both copies"] = copies(distribution)
        for num_terms in (1, 4):
            found[f"{distribution}, {num_terms} term(s)"] = apply(distribution, num_terms, None)
        if x.dtype == torch.bfloat16:
            found[f"{distribution}, 1 term(s), stochastic rounding"] = apply(distribution, 1, 7)
    return found


def replays(x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Replays of SWEEPS sweeps over x, (rows, 1024), by name."""

    def replay(rounding_seed: int | None, distribution: str | None) -> Callable[[], object]:
        common = {"distribution": distribution or "gaussian", "parameter": 1, "offset": 0}
        if distribution is None:
            common["factors"] = (
                torch.zeros(SWEEPS, x.shape[0], 1),
                torch.zeros(SWEEPS, 1, x.shape[1]),
            )
        seeds = [] if distribution is None else [1]
        sweeps = [Sweep(1.0, seeds, [1e-3] * len(seeds), rounding_seed=rounding_seed)] * SWEEPS
        return lambda: replay_(x, sweeps, **common)

    roundings = {"": None, ", stochastic rounding": 7} if x.dtype == torch.bfloat16 else {"": None}
    return {
        f"replay, {distribution or 'rank 1'}{rounding}": replay(seed, distribution)
        for distribution in (*DISTRIBUTIONS, None)
        for rounding, seed in roundings.items()
    }


def measure(
    numel: int, replay_numel: int, rounds: int, dtype: torch.dtype
) -> dict[str, dict[str, float]]:
    x = torch.zeros(numel, dtype=dtype)
    functions = candidates(x, torch.ones(numel, dtype=dtype)) | {
        "fingerprint": lambda: fingerprint(x)
    }
    work = dict.fromkeys(functions, numel)
    again = replays(torch.zeros(replay_numel // 1024, 1024, dtype=dtype))
    functions |= again
    work |= dict.fromkeys(again, replay_numel // 1024 * 1024 * SWEEPS)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if round_number > 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    rate = {name: work[name] / statistics.median(times) for name, times in seconds.items()}
    return {
        name: {
            "elements_per_s": round(rate[name] / 1e6) * 1e6,
            "best_elements_per_s": round(work[name] / min(seconds[name]) / 1e6) * 1e6,
            "of_add_tensor": round(rate[name] / rate["add_ of a tensor"], 3),
            "of_add_scalar": round(rate[name] / rate["add_ of a scalar"], 3),
        }
        for name in functions
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--numel", type=int, default=2**26)
    parser.add_argument("--replay-numel", type=int, default=2**22)
    parser.add_argument("--rounds", type=int, default=9)
    add_smoke_option(parser)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.numel, arguments.replay_numel, arguments.rounds = 2**14, 2**12, 1
    report = {
        "benchmark": "kernel_speed",
        "date": datetime.date.today().isoformat(),
        "machine": {
            **machine(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "load": os.getloadavg()[0],
        },
        "backend": backend(),
        "numel": arguments.numel,
        "replay_numel": arguments.replay_numel,
        "rounds": arguments.rounds,
        "float32": measure(
            arguments.numel, arguments.replay_numel, arguments.rounds, torch.float32
        ),
        "bfloat16": measure(
            arguments.numel, arguments.replay_numel, arguments.rounds, torch.bfloat16
        ),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()

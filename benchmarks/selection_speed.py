"""The selector's speed, beside other libraries, and scaling: parts of `benchmarks/selection.py`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import deepspeed
import torch
from common import launcher
from selection_models import Row
from torch import Tensor

from zods.comm.communicator import Communicator
from zods.comm.process import end_process
from zods.config.selector_section import SelectorConfig
from zods.selection import facility_location as fl
from zods.selection.selector import CandidateBatch, Selector


def clustered(n: int, d: int = 64) -> Tensor:
    """Features of 200 overlapping clusters, (n, d)."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(200, d, generator=generator)
    return centres[torch.randint(0, 200, (n,), generator=generator)] + torch.randn(
        n, d, generator=generator
    )


# --- speed ----------------------------------------------------------------------------------------


def objective(features: Tensor, ids: Sequence[int]) -> float:
    """sum_i (D - distance of i to the nearest of ids) in float64, with D the largest distance."""
    nearest, largest = torch.empty(0, dtype=torch.float64), 0.0
    for block in features.double().split(1000):
        distances = torch.cdist(block, features.double())
        nearest = torch.cat([nearest, distances[:, list(ids)].min(1).values])
        largest = max(largest, float(distances.max()))
    return float((largest - nearest).sum())


def ours(features: Tensor, k: int) -> list[int]:
    return fl.lazy_greedy(fl.from_features(features), k).ids


def apricot(optimizer: str) -> Callable[[Tensor, int], list[int]]:
    from apricot import FacilityLocationSelection

    def choose(features: Tensor, k: int) -> list[int]:
        selection = FacilityLocationSelection(k, metric="euclidean", optimizer=optimizer)
        return selection.fit(features.double().numpy()).ranking.tolist()

    return choose


def submodlib(features: Tensor, k: int) -> list[int]:
    from submodlib import FacilityLocationFunction

    function = FacilityLocationFunction(
        n=len(features), mode="dense", data=features.numpy(), metric="euclidean"
    )
    quiet = {"stopIfZeroGain": False, "stopIfNegativeGain": False, "show_progress": False}
    return [i for i, _ in function.maximize(budget=k, optimizer="LazyGreedy", **quiet)]


def speed(rounds: int, sizes: Sequence[int]) -> list[Row]:
    libraries = {
        "zods": ours,
        "apricot-select, lazy": apricot("lazy"),
        "apricot-select, two-stage": apricot("two-stage"),
    }
    if importlib.util.find_spec("submodlib") is not None:
        libraries["submodlib-py, lazy"] = submodlib
    else:
        print(
            "submodlib-py is left out: it has no wheel for this Python or machine", file=sys.stderr
        )
    rows = []
    for n in sizes:
        features, k = clustered(n), n // 10
        seconds: dict[str, list[float]] = {name: [] for name in libraries}
        # the first call is not timed: some libraries compile code in it
        ids = {name: choose(features, k) for name, choose in libraries.items()}
        for _ in range(rounds):
            for name, choose in libraries.items():
                began = time.perf_counter()
                choose(features, k)
                seconds[name].append(time.perf_counter() - began)
        for name in libraries:
            row = {"part": "speed", "n": n, "k": k, "d": 64, "library": name}
            rows.append(
                {
                    **row,
                    "seconds": statistics.median(seconds[name]),
                    "objective": objective(features, ids[name]),
                }
            )
            print(rows[-1], file=sys.stderr)
    return rows


# --- scaling --------------------------------------------------------------------------------------


def scaling_on_this_rank(n: int, k: int) -> Row:
    """Select on one rank of several.

    At the start each rank has the features of its own candidates. At the end each rank has all
    chosen candidates.
    """
    comm = Communicator(torch.device("cpu"))
    own = torch.arange(comm.rank, n, comm.world_size)
    mine = clustered(n)[own]
    began = time.perf_counter()
    largest = max(row[0] for row in comm.gather_scalars([float(mine.abs().max())]))
    of_ranks = comm.gather_rows(fl.quantised(mine, largest))
    features = torch.empty(n, 64, dtype=torch.int16)
    for rank, rows in enumerate(of_ranks):
        features[rank :: comm.world_size] = rows
    batch = CandidateBatch(range(n), [1] * n, features=features, largest=largest, owned=own)
    exchange = comm.gather_integers if comm.world_size > 1 else None
    selector = Selector(SelectorConfig(candidates=n, num_clusters=1), k, seed=0, exchange=exchange)
    chosen, _, report = selector.select(batch)
    seconds = time.perf_counter() - began
    comm.check_agreement(json.dumps(chosen).encode(), "what was chosen")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peaks = comm.gather_scalars([float(peak)])
    return {
        "part": "scaling",
        "n": n,
        "k": k,
        "d": 64,
        "ranks": comm.world_size,
        "seconds": seconds,
        "objective": report.objective,
        "peak_memory_gib": max(row[0] for row in peaks) / 2**30,
        "selection_bytes_per_rank": comm.selection_bytes,
    }


def scaling(sizes: Sequence[int], world_sizes: Sequence[int]) -> list[Row]:
    rows = []
    for n in sizes:
        for ranks in world_sizes:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "row.json"
                command = [*launcher(ranks), __file__]
                command += ["--candidates", str(n), "--row", str(file)]
                threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
                subprocess.run(command, check=True, stdout=sys.stderr, env=os.environ | threads)
                rows.append(json.loads(file.read_text()))
            print(rows[-1], file=sys.stderr)
    return rows


def main() -> None:
    """Run one rank of `scaling`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--candidates", type=int, required=True)
    parser.add_argument("--row", type=Path, required=True)
    parser.add_argument("--local_rank", type=int, default=0)
    arguments = parser.parse_args()
    deepspeed.init_distributed("gloo", verbose=False)
    row = scaling_on_this_rank(arguments.candidates, min(1000, arguments.candidates // 10))
    if torch.distributed.get_rank() == 0:
        arguments.row.write_text(json.dumps(row))
    end_process(0)


if __name__ == "__main__":
    main()

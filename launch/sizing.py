"""Write the tables of launch/README.md between their markers: `python launch/sizing.py`.

With `--check` nothing is written; exit status 1 if the tables are not those of the code.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from zods.planning.model_shape import BUILT_IN, ModelShape, model_shape, read_model_config
from zods.planning.proposal import configuration
from zods.planning.report import GB, plan
from zods.planning.setup import read_setup

PAGE = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- sizing: begin -->", "<!-- sizing: end -->"
GPUS, NODES = 8, (1, 2, 8, 64)
BATCH, LENGTH = 8, 512  # examples of a forward per GPU, tokens of an example


def planned(model: ModelShape, gpus: int, nodes: int, memory: int, **how: Any) -> dict[str, Any]:
    setup = read_setup(
        model,
        configuration(BATCH, **how),
        world_size=gpus * nodes,
        length=LENGTH,
        gpu_memory=memory,
    )
    return plan(setup, gpus)


def tables() -> str:
    shapes = [
        model_shape(name.upper(), read_model_config(name), torch.bfloat16) for name in BUILT_IN
    ]
    return "\n".join([*_on_clusters(shapes), "", *_on_one_gpu(shapes)])


def _on_clusters(shapes: Sequence[ModelShape]) -> Iterator[str]:
    yield _row(
        *("model", "nodes", "weights", "gathered and copies", "activations", "**MeZO**"),
        *("**MeZO-SVRG**", "its anchor, host per node", "received per step", "scalars sent"),
    )
    yield _row(*["---"] * 10)
    for shape in shapes:
        for nodes in NODES:
            mezo = planned(shape, GPUS, nodes, 80 * GB)
            svrg = planned(shape, GPUS, nodes, 80 * GB, method="mezo_svrg")
            device = {kind: of_kind["device"] for kind, of_kind in mezo["memory"].items()}
            moved = svrg["traffic_per_step"]
            yield _row(
                *(shape.name, str(nodes), _gb(device["weights"])),
                *(_gb(device["gathered and copies"]), _gb(device["activations"])),
                *(_total(mezo), _total(svrg), _gb(svrg["per_node"]["host"])),
                f"{_gb(mezo['traffic_per_step']['gathered'])}; "
                f"{_gb(moved['gathered'] + moved['anchor_gathered'])}",
                f"{mezo['traffic_per_step']['scalars'] / 1000:.1f} kB",
            )


def _on_one_gpu(shapes: Sequence[ModelShape]) -> Iterator[str]:
    yield _row(
        *("model", "**GPU**", "host", "of it locked", "NVMe", "read per step", "written per step"),
        *("NVMe with MeZO-SVRG", "read per step"),
    )
    yield _row(*["---"] * 9)
    for shape in shapes:
        mezo = planned(shape, 1, 1, 24 * GB, offload="nvme")
        svrg = planned(shape, 1, 1, 24 * GB, offload="nvme", method="mezo_svrg", anchor="nvme")
        node, moved = mezo["per_node"], mezo["traffic_per_step"]
        yield _row(
            *(shape.name, _total(mezo), _gb(node["host"]), _gb(node["locked"]), _gb(node["nvme"])),
            *(_gb(moved["nvme_read"]), _gb(moved["nvme_written"])),
            *(_gb(svrg["per_node"]["nvme"]), _gb(svrg["traffic_per_step"]["nvme_read"])),
        )


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _gb(size: int) -> str:
    return f"{size / GB:.1f}" if size >= 10 * GB else f"{size / GB:.2f}"


def _total(found: dict[str, Any]) -> str:
    size = _gb(found["memory"]["total"]["device"])
    return f"**{size}**" if found["fits"] else f"{size}, does not fit"


def with_tables(page: str, made: str) -> str:
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}"


def main() -> int:
    page = PAGE.read_text(encoding="utf-8")
    made = with_tables(page, tables())
    if "--check" in sys.argv[1:]:
        return int(made != page)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

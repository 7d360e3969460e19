"""`python -m zods.plan`: what a run will take on a cluster, from the model's configuration alone.

Memory of each kind, traffic and time of a step, first-order training beside it, and a configuration
that fits. No weights are read. docs/planning.md has the formulae.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from pathlib import Path
from typing import Any, get_args

import torch

from zods.comm.communicator import is_connected
from zods.comm.process import connect_ranks, end_process, environment_rank, report_failure
from zods.config.anchor_section import Storage
from zods.config.schema import Method
from zods.planning.calibration import measured_step_time, rates_of_step
from zods.planning.first_order import first_order
from zods.planning.model_shape import BUILT_IN, ModelShape, model_shape, read_model_config
from zods.planning.proposal import Cluster, propose
from zods.planning.rates import GPUS, Rates, rates_of_gpu
from zods.planning.report import plan, plot_nodes, table, with_times
from zods.planning.setup import Setup, read_setup
from zods.planning.step_time import Replicas, StepTime, step_time

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
OFFLOADS = ("none", "cpu", "nvme")
ANCHORS: tuple[Storage, ...] = ("device", "cpu", "nvme", "terms")
LINKS = {
    "link": "of a node to the others",
    "node-link": "between GPUs of a node",
    "host-link": "between a GPU and host memory",
    "nvme-read": "of a rank's drive",
    "nvme-write": "of a rank's drive",
}
NODES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 10_000)  # of a plot
_UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        planned, config = make_plan(arguments)
    except (ValueError, OSError) as error:
        if arguments.calibrate:
            return report_failure(error, "zods.plan")
        print(f"zods.plan: error: {error}", file=sys.stderr)
        return 2
    if environment_rank() != 0:
        return 0
    print(json.dumps(planned | {"config": config}) if arguments.json else table(planned))
    if not arguments.json:
        print("\n" + json.dumps(config, indent=2))
    return 0


def make_plan(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Plan what the command's arguments ask for. Returns (figures, DeepSpeed JSON).

    With `--calibrate` collective, over the ranks that run the command.
    """
    if arguments.gpu == "cpu" and not arguments.calibrate:
        raise ValueError("--gpu cpu: rates of CPUs are not listed. Measure them by --calibrate.")
    config, setup = _proposal(arguments)
    gpus, measured = arguments.gpus, None
    if arguments.calibrate:
        measured, rates = _calibrated(arguments, config, setup)
    else:
        rates = rates_of_gpu(arguments.gpu, bf16=arguments.dtype == "bf16", **_links(arguments))
    time = step_time(
        setup,
        rates,
        gpus,
        replicas=_replicas(arguments),
        examples=arguments.examples,
        measured=measured,
    )
    if arguments.plot:
        plot_nodes(_times_by_nodes(arguments, setup, config, rates, measured), arguments.plot)
    planned = with_times(
        plan(setup, gpus),
        time,
        first_order(setup, rates, gpus),
        tokens_per_step=setup.config.deepspeed["train_batch_size"] * setup.length,
        tokens=arguments.tokens,
    )
    return planned, config


def _times_by_nodes(
    arguments: argparse.Namespace,
    setup: Setup,
    config: dict[str, Any],
    rates: Rates,
    measured: float | None,
) -> dict[int, StepTime]:
    """The time of a step of the same configuration on 1 to 10,000 nodes."""
    return {
        nodes: step_time(
            _on_ranks(setup, config, arguments.gpus * nodes),
            rates,
            arguments.gpus,
            replicas=_replicas(arguments),
            examples=arguments.examples,
            measured=measured,
        )
        for nodes in NODES
    }


def _on_ranks(setup: Setup, config: dict[str, Any], world_size: int) -> Setup:
    """The setup's configuration on another number of ranks."""
    return read_setup(
        setup.model,
        config,
        world_size=world_size,
        length=setup.length,
        on_gpu=setup.on_gpu,
        gpu_memory=setup.gpu_memory,
    )


def _calibrated(
    arguments: argparse.Namespace, config: dict[str, Any], setup: Setup
) -> tuple[float, Rates]:
    """Seconds of a step on one node, and rates that follow from it. Collective."""
    comm = connect_ranks()
    if comm.world_size != arguments.gpus:
        raise ValueError(
            f"--calibrate: {comm.world_size} ranks run here, but --gpus is {arguments.gpus}. Start "
            f"one node's ranks: deepspeed --num_gpus {arguments.gpus} --module zods.plan ..."
        )
    of_node = _on_ranks(setup, config, comm.world_size)
    measured = measured_step_time(of_node, config, comm)
    return measured, rates_of_step(of_node, measured, **_links(arguments))


def _proposal(arguments: argparse.Namespace) -> tuple[dict[str, Any], Setup]:
    model = _shape(arguments.model, arguments.dtype)
    cluster = _cluster(arguments)
    read = functools.partial(
        read_setup,
        model,
        world_size=cluster.ranks,
        length=arguments.length,
        on_gpu=arguments.gpu != "cpu",
        gpu_memory=cluster.gpu_memory,
    )
    return propose(
        read,
        cluster,
        arguments.batch * arguments.replicas,
        dtype=arguments.dtype,
        method=arguments.method,
        offloads=OFFLOADS if arguments.offload == "auto" else (arguments.offload,),
        anchors=ANCHORS if arguments.anchor == "auto" else (arguments.anchor,),
        nvme_path=arguments.nvme_path,
    )


def _shape(name: str, dtype: str) -> ModelShape:
    return model_shape(name, read_model_config(name), DTYPES[dtype])


def _cluster(arguments: argparse.Namespace) -> Cluster:
    of_sheet = GPUS[arguments.gpu][3] if arguments.gpu in GPUS else None
    return Cluster(
        gpus=arguments.gpus,
        nodes=arguments.nodes,
        gpu_memory=arguments.gpu_memory or of_sheet,
        host_memory=arguments.host_memory,
        nvme=arguments.nvme,
    )


def _links(arguments: argparse.Namespace) -> dict[str, float]:
    names = ("link", "node_link", "host_link", "nvme_read", "nvme_write")
    return {
        name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None
    }


def _replicas(arguments: argparse.Namespace) -> Replicas | None:
    if arguments.replicas == 1:
        return None
    number = max(1.0, arguments.replicas * (1 - arguments.dropout))
    return Replicas(number, arguments.delay, arguments.replica_link)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m zods.plan", description=__doc__, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help=f"{', '.join(BUILT_IN)} (shapes of Llama 2), a config.json or its folder, or a name on "
        "the hub",
    )
    add("--gpus", type=_count, default=8, help="GPUs of a node, one rank each (8)")
    add("--nodes", type=_count, default=1, help="(1)")
    add("--gpu", choices=(*GPUS, "cpu"), default="H100", help="rates of its data sheet (H100)")
    add("--gpu-memory", type=size, metavar="SIZE", help="of one GPU, such as 80GB or 24GiB")
    add("--host-memory", type=size, metavar="SIZE", help="of a node (not bounded)")
    add("--nvme", type=size, metavar="SIZE", help="of a node's drives (not bounded)")
    add("--nvme-path", default="/nvme{local_rank}", metavar="PATH", help="(%(default)s)")
    add("--dtype", choices=tuple(DTYPES), default="bf16", help="(bf16)")
    add("--batch", type=_count, default=8, help="examples of a step and GPU, of all replicas (8)")
    add("--length", type=_count, default=512, help="tokens of an example (512)")
    add("--method", choices=get_args(Method), default="mezo", help="(mezo)")
    add(
        "--offload",
        choices=("auto", *OFFLOADS),
        default="auto",
        help="of the parameters; auto takes the first that fits (auto)",
    )
    add("--anchor", choices=("auto", *ANCHORS), default="auto", help="of mezo_svrg (auto)")
    add("--tokens", type=_tokens, metavar="NUMBER", help="of the whole training, for its time")
    add("--examples", type=_count, help="of the training set, for the anchor's refreshes")
    for name, what in LINKS.items():
        add(f"--{name}", type=rate, metavar="RATE", help=f"{what}, such as 25GB/s")
    add("--replicas", type=_count, default=1, help="launches of so many nodes each (1)")
    add("--delay", type=_seconds, default=0.05, metavar="S", help="one way between replicas (0.05)")
    add("--replica-link", type=rate, default=12.5e6, metavar="RATE", help="(12.5MB/s)")
    add("--dropout", type=_share, default=0.0, help="share of the replicas that is away (0)")
    add(
        "--calibrate",
        action="store_true",
        help="measure steps here instead of using data sheets: about two minutes; start it with "
        "`deepspeed --num_gpus N --module zods.plan` on N GPUs",
    )
    # passed by the launcher of DeepSpeed
    add("--local_rank", type=int, help=argparse.SUPPRESS)
    add("--json", action="store_true", help="print one JSON object, in bytes and seconds")
    add("--plot", type=Path, metavar="FILE", help="step time against nodes, as PNG")
    return parser


def rate(text: str) -> float:
    """Parse a rate such as 25GB/s, in bytes per second."""
    return float(size(text.removesuffix("/s")))


def size(text: str) -> int:
    """Parse a size such as 80GB (10^9 bytes) or 24GiB (2^30 bytes), in bytes.

    >>> size("80GB")
    80000000000
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text)
    if found is None or found[2] not in _UNITS or float(found[1]) <= 0:
        units = ", ".join(filter(None, _UNITS))
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number with one of {units}")
    if (number := int(float(found[1]) * _UNITS[found[2]])) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a byte or more")
    return number


def _tokens(text: str) -> int:
    return int(_number(text, 1, float("inf")))


def _seconds(text: str) -> float:
    return _number(text, 0, float("inf"))


def _share(text: str) -> float:
    return _number(text, 0, 1)


def _number(text: str, least: float, most: float) -> float:
    try:
        found = float(text)
    except ValueError:
        found = float("nan")
    if not least <= found <= most or found == float("inf"):
        bounds = f"{least} to {most}" if most < float("inf") else f"{least} or more"
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number, {bounds}")
    return found


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number, 1 or more")
    return int(text)


if __name__ == "__main__":
    code = main()
    if is_connected():
        end_process(code)
    sys.exit(code)

"""`python -m zods.planning`: the memory and the traffic of a run, from the model's configuration."""

from __future__ import annotations

import argparse
import json
import re
import sys
from typing import Any, get_args

import torch

from zods.config.schema import Method, Storage
from zods.planning.model_shape import BUILT_IN, model_shape, read_model_config
from zods.planning.report import plan, table
from zods.planning.setup import Setup, read_setup

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        planned = plan(_setup_of(arguments), arguments.gpus)
    except (ValueError, OSError) as error:
        print(f"zods.planning: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(planned) if arguments.json else table(planned))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m zods.planning", description=__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "--model",
        required=True,
        help=f"{', '.join(BUILT_IN)} (shapes of Llama 2), a config.json or its folder, or a name on "
        "the hub; no weights are read",
    )
    parser.add_argument("--gpus", type=_count, default=8, help="GPUs of a node, one rank each (8)")
    parser.add_argument("--nodes", type=_count, default=1, help="(1)")
    parser.add_argument(
        "--gpu-memory", type=size, metavar="SIZE", help="of one GPU, such as 80GB or 24GiB"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="(bf16)")
    parser.add_argument("--batch", type=_count, default=8, help="examples per forward and GPU (8)")
    parser.add_argument("--length", type=_count, default=512, help="tokens of an example (512)")
    parser.add_argument("--method", choices=get_args(Method), default="mezo", help="(mezo)")
    parser.add_argument("--offload", choices=("none", "cpu", "nvme"), default="none", help="(none)")
    parser.add_argument(
        "--anchor", choices=get_args(Storage), default="cpu", help="of mezo_svrg (cpu)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, in bytes")
    return parser


def _setup_of(arguments: argparse.Namespace) -> Setup:
    model_config = read_model_config(arguments.model)
    return read_setup(
        model_shape(arguments.model, model_config, DTYPES[arguments.dtype]),
        configuration(
            arguments.batch,
            dtype=arguments.dtype,
            method=arguments.method,
            offload=arguments.offload,
            anchor=arguments.anchor,
        ),
        world_size=arguments.gpus * arguments.nodes,
        length=arguments.length,
        gpu_memory=arguments.gpu_memory,
    )


def configuration(
    batch: int,
    *,
    dtype: str = "bf16",
    method: str = "mezo",
    offload: str = "none",
    anchor: str = "cpu",
) -> dict[str, Any]:
    """The DeepSpeed JSON of a plan, with defaults where a plan does not say otherwise.

    batch: examples of a micro-batch. The folders on NVMe are those of a drive per GPU.
    """
    drive = {"nvme_path": "/nvme{local_rank}"}
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    }
    if offload != "none":
        zero["offload_param"] = {"device": offload, **(drive if offload == "nvme" else {})}
    section: dict[str, Any] = {"method": method}
    if method == "mezo_svrg":
        stored = {"point": anchor, "gradient": anchor}
        section["anchor"] = stored | (drive if anchor == "nvme" else {})
    return {
        "train_micro_batch_size_per_gpu": batch,
        "bf16": {"enabled": dtype == "bf16"},
        "zero_optimization": zero,
        "zeroth_order": section,
    }


def size(text: str) -> int:
    """Parse a size such as 80GB (10^9 bytes) or 24GiB (2^30 bytes), in bytes.

    >>> size("80GB")
    80000000000
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text)
    if found is None or found[2] not in _UNITS or float(found[1]) <= 0:
        units = ", ".join(filter(None, _UNITS))
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number with one of {units}")
    return int(float(found[1]) * _UNITS[found[2]])


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number, 1 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())

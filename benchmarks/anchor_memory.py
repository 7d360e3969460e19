"""Measure the memory of MeZO-SVRG's anchor for each storage.

    python benchmarks/anchor_memory.py

Each case runs in a process of its own: an OPT-125M shape in float32, one refresh and two steps.
Prints one JSON object with the engine's own counters and the peak resident memory. The peak of
plain MeZO is subtracted and the rest divided by the number of parameters. On a CPU, device and host
memory are the same memory, so the peak contains the anchor for both "device" and "cpu". It must not
contain the anchor for "nvme" and "terms".
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile

STORAGES = ("device", "cpu", "nvme", "terms")


def run_case(place: str, folder: str, smoke: bool) -> None:
    from common import opt_125m, single_rank_engine, tiny_opt, token_batch

    section: dict = {"method": "mezo", "lr": 1e-9}
    if place != "mezo":
        path = {"nvme_path": folder} if place == "nvme" else {}
        section |= {"method": "mezo_svrg", "anchor": {"point": place, "gradient": place, **path}}
    engine = single_rank_engine(tiny_opt() if smoke else opt_125m(), section)
    batch = token_batch(8, 64)
    for _ in range(2):
        engine.backward(engine(batch))
        engine.step()
    anchor = engine.anchor
    result = {
        "place": place,
        "parameters": engine.sharded_parameters.numel,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "anchor_device_bytes": anchor.device_bytes if anchor else 0,
        "anchor_offloaded_bytes": anchor.offloaded_bytes if anchor else 0,
    }
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny model, without an anchor and with one storage"
    )
    parser.add_argument("--case", choices=("mezo", *STORAGES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        run_case(arguments.case, arguments.folder, arguments.smoke)
        return
    places = ("nvme",) if arguments.smoke else STORAGES
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for place in ("mezo", *places):
            command = [sys.executable, __file__, "--case", place, "--folder", folder]
            command += ["--smoke"] if arguments.smoke else []
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows.append(json.loads(output.strip().splitlines()[-1]))
    for row in rows:
        row["added_bytes_per_parameter"] = (
            row["peak_rss_bytes"] - rows[0]["peak_rss_bytes"]
        ) / row["parameters"]
    from common import machine

    print(json.dumps({"benchmark": "anchor_memory", "machine": machine(), "rows": rows}))


if __name__ == "__main__":
    main()

"""Measure the time of a step of LoRA on the last quarter of the blocks over one of the whole model.

    python benchmarks/frozen_blocks.py [--json FILE] [--markdown FILE]

OPT-125M's shape with random weights in float32, low-rank directions, one process, a batch of 16 rows of
12 to 38 tokens, of which the last one is the label. Steps of the adapters and of the whole model
take turns. Steps that check the form of evaluation are left out. A row is a kind of step:

points   the number of points of a step; the blocks below the first adapter run once for all of them
ratio    median over rounds of the processor time of the adapters' step over that of the whole model's
bound    the share of the multiplications of the forwards that is left: (9 + 3 P + P h s) / (12 P + P h s) of
         P points, with h the output layer over one block (5.4) and s the share of the padded positions at
         which logits are computed

Prints one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from common import (
    Report,
    add_report_options,
    add_smoke_option,
    examples_of,
    opt_125m,
    report_head,
    single_rank_engine,
    tiny_opt,
)
from step_time import adapted

from zods.planning.calibration import WARM_UP

ROWS, SHORTEST, LONGEST = 16, 12, 38
LENGTHS = torch.linspace(SHORTEST, LONGEST, ROWS).long()  # of the rows, in tokens
HEAD_OVER_BLOCK = 5.4  # 77 MFLOP per token over 14.3
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "MeZO": (2, {}),
    "MeZO, two directions": (4, {"num_directions": 2}),
    "MeZO-SVRG": (
        4,
        {
            "method": "mezo_svrg",
            "anchor_interval": 10**6,
            "anchor": {"point": "terms", "gradient": "terms"},
        },
    ),
}


def prompts(vocab_size: int) -> dict[str, torch.Tensor]:
    """A batch (ROWS, LONGEST), padded on the right, with one label at the end of each row."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, vocab_size, (ROWS, LONGEST), generator=generator)
    mask = (torch.arange(LONGEST) < LENGTHS[:, None]).long()
    labels = torch.full_like(tokens, -100)
    ends = (torch.arange(ROWS), LENGTHS - 1)
    labels[ends] = tokens[ends]
    return {"input_ids": tokens * mask + (1 - mask), "attention_mask": mask, "labels": labels}


def bound_of(points: int) -> float:
    """The share of the multiplications of a step's forwards that is left with frozen blocks."""
    positions = len(LENGTHS.unique())  # at which logits are computed
    head = points * HEAD_OVER_BLOCK * positions / LONGEST
    return (9 + 3 * points + head) / (12 * points + head)


@torch.no_grad()
def measured(name: str, rounds: int, smoke: bool) -> dict[str, Any]:
    points, section = KINDS[name]
    batch = prompts(37 if smoke else 50272)
    section = {"direction": "low_rank", "lr": 1e-9, "examples_per_direction": 1, **section}
    engines = []
    for adapters in (True, False):
        model = tiny_opt() if smoke else opt_125m()
        if adapters:
            model = adapted(model, -(-model.config.num_hidden_layers // 4))
        data = examples_of(batch)
        engines.append(single_rank_engine(model, section, data=data, train_batch_size=ROWS))

    def seconds(engine: Any) -> float:
        began = time.process_time()
        engine.backward(engine(batch))
        engine.step()
        return time.process_time() - began

    for _ in range(WARM_UP + 4):  # step 8 checks the form of evaluation, too
        for engine in engines:
            seconds(engine)
    times = [[seconds(engine) for engine in engines] for _ in range(rounds)]
    ratios = sorted(lora / whole for lora, whole in times)
    lora, whole = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "run": name,
        "points": points,
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "bound": round(bound_of(points), 3),
        "adapters_s": round(lora, 3),
        "whole_s": round(whole, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    add_report_options(parser)
    add_smoke_option(parser)
    arguments = parser.parse_args()
    rounds = 1 if arguments.smoke else arguments.rounds
    head = report_head("frozen_blocks", arguments)
    report = Report(head, arguments.json, key="run", passed=lambda row: True)
    for name in KINDS:
        report.add(report.done(name) or measured(name, rounds, arguments.smoke))
    if arguments.markdown is not None:
        text = (
            "LoRA of rank 8 on the last 3 of 12 blocks, OPT-125M's shape, float32, processor time"
        )
        arguments.markdown.write_text(
            report.markdown("LoRA on the last quarter", text, list(report.rows[0]), report.rows)
        )
    report.print_and_exit()


if __name__ == "__main__":
    main()

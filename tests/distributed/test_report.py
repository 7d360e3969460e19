"""The report of a real run: what its folder holds is on the page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.distributed.command_line import finetune_on_ranks, prompted_options, write_inputs
from zods.report.__main__ import main as report
from zods.report.panels import panels
from zods.report.runs import read_run

CONFIG = {
    "train_batch_size": 8,
    "zero_optimization": {"stage": 3},
    "zeroth_order": {
        "method": "mezo_svrg",
        "lr": 1e-4,
        "anchor_interval": 2,
        "num_directions": 2,
        "anchor": {"point": "terms", "gradient": "cpu"},
    },
}


def test_a_run_of_two_ranks_with_an_anchor_and_a_selector_is_on_the_page(tmp_path: Path):
    pytest.importorskip("matplotlib")
    write_inputs(tmp_path, CONFIG)
    chosen = {"select": "8/16", "source_column": "label", "strategy": "structured_random"}
    options = prompted_options(tmp_path, tmp_path / "run", max_steps=4, eval_interval=2, **chosen)
    finetune_on_ranks(2, options)
    run = read_run(tmp_path / "run")
    assert [refresh["step"] for refresh in run.refreshes] == [0, 2]
    assert all(sum(line["sources"].values()) == 8 for line in run.train)
    drawn = {panel.title: len(panel.curves) for panel in panels([run])}
    assert (
        drawn.items()
        >= {
            "training loss": 1,
            "held-out accuracy": 1,
            "projected gradient": 1,
            "seconds per step": 2,
            "anchor refreshes: RMS of the coefficients": 1,
            "chosen examples by source": 2,
        }.items()
    )
    assert report([str(tmp_path / "run")]) == 0
    text = re.sub(r"<[^>]*>", " ", (tmp_path / "run" / "report.html").read_text())
    for words in (
        r"state\s+finished",
        r"steps\s+4\s",
        r"peak memory of each rank\s+[\d,]+, [\d,]+ MiB",
        r"anchor refreshes\s+2",
        r"of it the choice of examples\s+[0-9.]+ s",
        r"config.zeroth_order.anchor_interval\s+2",
        r"world_size\s+2",
    ):
        assert re.search(words, text), words

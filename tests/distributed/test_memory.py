"""The peak memory of a step against that of an inference forward over the same stack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

import zods
from tests.distributed.models import collate, configuration, train
from tests.distributed.ranks import run_ranks
from tests.helpers import asked_for, sampled
from zods.forward.peak_memory import peak_memory
from zods.params.zero3_adapter import release_gathered

# So large that the float32 logits of one chunk of the loss hardly count.
VOCABULARY, LENGTH, BATCH = 8000, 64, 32
SVRG = {"method": "mezo_svrg", "anchor_interval": 100}
# (the number of points of a step, the section) by name
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "mezo": (2, {}),
    "mezo, bfloat16": (2, {"bf16": True}),
    "four directions": (8, {"num_directions": 4}),
    "low rank": (2, {"direction": "low_rank"}),
    "svrg": (4, {**SVRG, "anchor": {"point": "terms", "gradient": "terms"}}),
    "svrg, stored": (4, {**SVRG, "anchor": {"point": "cpu", "gradient": "cpu"}}),
    "svrg, low rank": (
        4,
        {**SVRG, "direction": "low_rank", "anchor": {"point": "terms", "gradient": "terms"}},
    ),
}
DEFAULT = ("mezo", "four directions", "low rank", "svrg, stored")


def model() -> OPTForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 96, "word_embed_proj_dim": 96, "num_hidden_layers": 3, "ffn_dim": 384}
    config = OPTConfig(
        vocab_size=VOCABULARY, num_attention_heads=4, max_position_embeddings=LENGTH, **shape
    )
    return OPTForCausalLM(config).eval()


def rank_of_peaks(stage: int, names: list[str]) -> dict[str, tuple[int, int, int]]:
    """Measure the peaks in bytes: (inference forward, step, largest module)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (2 * BATCH, LENGTH), generator=generator)
    data = [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids
    ]
    found = {}
    for name in names:
        points, arguments = RUNS[name]
        section = {"method": "mezo", "lr": 1e-4, "eps": 1e-3, "evaluation": "stacked", **arguments}
        config = configuration(BATCH, stage=stage, **section)
        engine = zods.initialize(model=model(), config=config, training_data=data)[0]
        # The second and the third step check the form once more.
        train(engine, data, range(3))
        stack = collate(data[: engine.train_micro_batch_size_per_gpu()] * points)
        inputs = {key: value for key, value in stack.items() if key != "labels"}
        with torch.no_grad():
            engine.deepspeed(**inputs, use_cache=False)
            release_gathered(engine.deepspeed)
            with peak_memory(engine.device) as inference:
                engine.deepspeed(**inputs, use_cache=False)
            release_gathered(engine.deepspeed)
        # Empty the buffer for copies. A buffer kept from the first step would not count.
        engine._evaluator._forwards.perturbed.perturber.scratch.__init__()
        with peak_memory(engine.device) as step:
            train(engine, data, [3])
        largest = 0
        for module in engine.module.modules():
            own = [
                p
                for p in engine.sharded_parameters
                if any(p.param is q for q in module.parameters(recurse=False))
            ]
            largest = max(largest, sum(p.whole_numel * p.dtype.itemsize for p in own))
        found[name] = (inference.bytes, step.bytes, largest)
    return found


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((1, 0), id="stage-0", marks=pytest.mark.slow),
        pytest.param((2, 3), id="stage-3-on-2-ranks"),
    ],
)
def peaks(request: pytest.FixtureRequest) -> list[dict[str, tuple[int, int, int]]]:
    ranks, stage = request.param
    return run_ranks(ranks, rank_of_peaks, stage, asked_for(request, "name", RUNS, DEFAULT))


@pytest.mark.parametrize("name", sampled(RUNS, DEFAULT))
def test_a_step_takes_little_more_memory_than_inference_over_the_same_stack(peaks, name):
    for rank in peaks:
        inference, step, largest = rank[name]
        assert inference > 2 * largest, "the allowance for copies must not hide the rest"
        assert step <= 1.3 * inference + 2 * largest

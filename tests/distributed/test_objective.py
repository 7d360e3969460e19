"""The loss of a step is that of its global batch.

Micro-batches, ranks and forms of evaluation do not change it.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional

import zods
import zods.finetune
from tests.distributed.command_line import MODEL, finetune_on_ranks, write_rows
from tests.distributed.models import collate, configuration, numpy_of, sha256, whole
from tests.distributed.ranks import options_of, run_ranks
from tests.reference.dense import DenseReference, loss_of_module, named_parameters_of
from tests.reference.objective import objective_of
from zods.cli.run_folder import read_metrics
from zods.config.deepspeed_json import read_first_order_config
from zods.core.directions import derive_seed
from zods.training.first_order import FirstOrderEngine

VOCABULARY, LENGTH = 31, 256
# The number of label tokens of each example. A step has 8 examples, and 3 are left over.
LABELLED = (
    5,
    250,
    5,
    250,
    5,
    5,
    250,
    0,
    250,
    5,
    250,
)
BATCH, STEPS = 8, 2
EPS, LR = 1e-2, 1e-3
# With so large an eps, a gradient near 0 does not determine a whole step.
ADAMW = {
    "lr": 1e-2,
    "eps": 1e-2,
    "weight_decay": 0.01,
}
BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.2,
}


class Smoothed(hf.LlamaForCausalLM):
    """A causal language model with its own loss, the mean over the label tokens of a batch."""

    def forward(self, labels: Tensor | None = None, **inputs: Any) -> Any:
        outputs = super().forward(**inputs)
        if labels is not None:
            scores, wanted = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            outputs.loss = functional.cross_entropy(scores, wanted, label_smoothing=0.2)
        return outputs


def llama(kind: type[nn.Module] = hf.LlamaForCausalLM) -> nn.Module:
    return kind(hf.LlamaConfig(**BERT, num_key_value_heads=1))


def t5() -> nn.Module:
    shape = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8}
    return hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **shape)
    )


MODELS: dict[
    str, tuple[Callable[[], nn.Module], bool]
] = {  # the model, and whether position t predicts label t + 1
    "causal": (llama, True),
    "masked": (lambda: hf.BertForMaskedLM(hf.BertConfig(**BERT)), False),
    "encoder-decoder": (t5, False),
    "classifier": (
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT, num_labels=3)),
        False,
    ),
    "own loss": (functools.partial(llama, Smoothed), True),
}


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind][0]().eval()


def rows_of(kind: str) -> list[dict[str, Tensor]]:
    """Examples with few hard label tokens, with many easy ones, and one without any."""
    generator = torch.Generator().manual_seed(4)
    rows = []
    for number in LABELLED:
        ids = torch.randint(5, VOCABULARY, (LENGTH,), generator=generator)
        if number > 5:
            ids[:] = 3
        labels = torch.full_like(ids, -100)
        if kind == "masked":  # here the first position has a label, too
            places = torch.randperm(LENGTH - 1, generator=generator)[: max(number - 1, 0)] + 1
            labels[places] = ids[places]
            labels[0] = ids[0] if number else -100
        elif number:
            labels[-number:] = ids[-number:]
        if kind == "encoder-decoder":
            # the labels of decoders begin at the first position
            labels, ids = labels.roll(number), ids[:12]
        if kind == "classifier":
            labels = torch.tensor(number % 3 if number else -100)
        rows.append({"attention_mask": torch.ones_like(ids), "input_ids": ids, "labels": labels})
    return rows


def cuts(world_size: int) -> list[int]:
    return [micro for micro in (8, 4, 2, 1) if micro * world_size <= BATCH]


SVRG = {"method": "mezo_svrg", "anchor_interval": 2, "anchor_directions": 2, "anchor_split": False}
# (model, mean, micro-batches or None for all, arguments of `configuration`) by name
CASES: dict[str, tuple[str, str, tuple[int, ...] | None, dict[str, Any]]] = {
    "tokens": ("causal", "tokens", None, {}),
    "examples": ("causal", "examples", None, {}),
    **{
        f"{form}, stage {stage}": ("causal", "tokens", (2,), {"evaluation": form, "stage": stage})
        for form, stage in product(("stacked", "lockstep", "sequential"), (0, 3))
    },
    "lockstep, examples": ("causal", "examples", (2,), {"evaluation": "lockstep", "stage": 3}),
    **{
        f"{kind}, {mean}": (kind, mean, (2, 1), {})
        for kind, mean in product(
            ("masked", "encoder-decoder", "classifier"), ("tokens", "examples")
        )
    },
    "own loss": ("own loss", "tokens", (2, 1), {}),
    "own loss, one by one": ("own loss", "examples", (1,), {}),
    "svrg, tokens": ("causal", "tokens", (4, 2, 1), SVRG),
    "svrg, examples": ("causal", "examples", (2, 1), SVRG),
}


ON_4_RANKS = ("tokens", "examples", "stacked, stage 3", "svrg, tokens")


def engine_of(kind: str, micro: int, **arguments: Any) -> Any:
    top = {"train_micro_batch_size_per_gpu": micro}
    arguments = {"method": "mezo", "stage": 0, "eps": EPS, "lr": LR, **arguments}
    accumulation = BATCH // micro // torch.distributed.get_world_size()
    config = configuration(BATCH, accumulation=accumulation, top=top, **arguments)
    data = rows_of(kind)
    return zods.initialize(
        model=model_of(kind), config=config, training_data=data, collate_fn=collate
    )[0]


def steps_of(engine: Any) -> list[tuple[float, float]]:
    """(loss, mean projected gradient) of each step, on the first examples in their order."""
    found = []
    rank, world, micro = (
        engine.global_rank,
        engine.world_size,
        engine.train_micro_batch_size_per_gpu(),
    )
    rows = rows_of(next(k for k in MODELS if type(model_of(k)) is type(engine.module)))[:BATCH]
    for _ in range(STEPS):
        for k in range(engine.gradient_accumulation_steps()):
            start = (k * world + rank) * micro
            engine.backward(engine(collate(rows[start : start + micro])))
            engine.step()
        found.append((engine.last_step.loss, engine.last_step.projected_grad))
    engine.close()
    return found


def rank_of_cases() -> dict[str, dict[int, list[tuple[float, float]]]]:
    world_size = torch.distributed.get_world_size()
    found: dict[str, dict[int, Any]] = {}
    for name, (kind, mean, micros, arguments) in CASES.items():
        if world_size == 4 and name not in ON_4_RANKS:  # a forward takes long on 4 ranks
            continue
        for micro in cuts(world_size):
            if micros is None or micro in micros:
                engine = engine_of(kind, micro, loss_mean=mean, **arguments)
                found.setdefault(name, {})[micro] = steps_of(engine)
    return found


def one_by_one(batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The examples of a batch that have a label, one by one."""
    for place, labels in enumerate(batch["labels"]):
        if (labels != -100).any():
            yield {key: value[place : place + 1] for key, value in batch.items()}


@functools.cache
def dense_steps(kind: str, mean: str, svrg: bool) -> list[tuple[float, float]]:
    """Steps of the float64 reference, on the undivided global batch and training set."""
    model, shifted = model_of(kind), MODELS[kind][1]
    params, model = named_parameters_of(model), model.double()
    loss = loss_of_module(
        model, lambda outputs, batch: objective_of(outputs.logits, batch["labels"], mean, shifted)
    )
    if kind == "own loss":
        loss = of_whole = loss_of_module(model, lambda outputs, _: outputs.loss)
        if mean == "examples":

            def loss(at, batch):
                return statistics.fmean(of_whole(at, one) for one in one_by_one(batch))

    rows = rows_of(kind)
    section: dict[str, Any] = dict(SVRG) if svrg else {"method": "mezo"}
    dense = DenseReference(
        params=params, loss=loss, whole_set=collate(rows), eps=EPS, lr=LR, **section
    )
    found = []
    for _ in range(STEPS):
        loss = dense.step(collate(rows[:BATCH]))
        found.append((loss, (dense.losses[0] - dense.losses[1]) / (2 * EPS)))
    return found


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(n, id=f"{n}-ranks", marks=pytest.mark.slow if n == 4 else [])
        for n in (1, 2, 4)
    ],
)
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(request.param, rank_of_cases)


@pytest.mark.parametrize("name", CASES)
def test_the_losses_of_a_run_are_those_of_the_global_batch_in_one_piece(ranks, name):
    """Compare within a tolerance that rounding explains.

    A token's loss in float32 has an error of a few 2^-24 of its size, 3. A projected gradient has
    that error over 2 eps, some 1e-4, or less where the errors of many tokens cancel. The two means
    differ by far more. The test checks this as well.
    """
    kind, mean, _, arguments = CASES[name]
    expected = dense_steps(kind, mean, "method" in arguments)
    if kind not in ("classifier", "own loss"):
        other = dense_steps(
            kind, "examples" if mean == "tokens" else "tokens", "method" in arguments
        )
        assert all(abs(a[1] - b[1]) > 0.5 for a, b in zip(expected, other, strict=True))
    for rank in ranks:
        for micro, found in rank.get(name, {}).items():
            for (loss, grad), (expected_loss, expected_grad) in zip(found, expected, strict=True):
                assert loss == pytest.approx(expected_loss, abs=5e-5), micro
                assert grad == pytest.approx(expected_grad, abs=2e-3), micro


# --- directions of each rank's own ----------------------------------------------------------------

PARTS = {  # The positions of two ranks' examples in the global batch.
    "uneven": ((0, 1, 2, 3), (4, 5, 6, 7)),
    "a rank without labels": ((0, 1, 4, 6), (7, 7, 7, 7)),
}


def rank_of_own_directions() -> dict[tuple[str, str], Any]:
    found = {}
    for (name, parts), mean in product(PARTS.items(), ("tokens", "examples")):
        engine = engine_of("causal", 4, loss_mean=mean, examples_per_direction=4)
        rows = rows_of("causal")
        engine.backward(engine(collate([rows[place] for place in parts[engine.global_rank]])))
        engine.step()
        report = engine.last_step
        found[name, mean] = (report.loss, report.projected_grad, numpy_of(whole(engine)))
        engine.close()
    return found


def test_directions_of_each_rank_estimate_the_objective_of_the_global_batch():
    """The weight of a rank's direction is its share of the label tokens or labelled examples."""
    ranks = run_ranks(2, rank_of_own_directions)
    rows = rows_of("causal")
    for (name, parts), mean in product(PARTS.items(), ("tokens", "examples")):
        model = model_of("causal")
        params, model = named_parameters_of(model), model.double()
        counts = [
            sum(LABELLED[place] if mean == "tokens" else LABELLED[place] > 0 for place in part)
            for part in parts
        ]
        loss = grad = largest = 0.0
        expected = {key: value.clone() for key, value in params.items()}
        mean_loss = loss_of_module(
            model, lambda out, batch, m=mean: objective_of(out.logits, batch["labels"], m, True)
        )
        dense = DenseReference(params=params, loss=mean_loss, eps=EPS)
        for rank, (part, count) in enumerate(zip(parts, counts, strict=True)):
            if count:
                losses: list[float] = []
                seed = derive_seed(42, "step", 0, rank)
                share = count / sum(counts)
                coefficient = share * dense.projected_grad(
                    params, seed, collate([rows[k] for k in part]), losses
                )
                loss, grad = loss + share * sum(losses) / 2, grad + coefficient
                largest = max(largest, abs(coefficient))
                for key, z in dense.z(seed).items():
                    expected[key] -= LR * coefficient * z
        for rank in ranks:
            found_loss, found_grad, weights = rank[name, mean]
            assert found_loss == pytest.approx(loss, abs=5e-5), (name, mean)
            assert found_grad == pytest.approx(grad, abs=2e-3), (name, mean)
            # LR times the tolerance of the gradient, and the rounding of the coefficients to 8 bits;
            # |z| < 4
            tolerance = 1e-5 + LR * 4 * 2.0**-9 * largest
            for key, value in expected.items():
                error = np.abs(weights[key] - value.numpy()).max()
                assert error < tolerance, (name, mean, key)


# --- what has no objective ------------------------------------------------------------------------


def rank_without_labels() -> tuple[bool, int, bool]:
    engine = engine_of("causal", 2)
    nothing = [rows_of("causal")[7]] * 2
    before = sha256(whole(engine))
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(engine(collate(nothing)))
        engine.step()
    return engine.last_step.skipped, engine.skipped_steps, sha256(whole(engine)) == before


def test_a_global_batch_without_any_label_is_a_skipped_step():
    assert run_ranks(2, rank_without_labels) == [(True, 1, True)] * 2


def rank_refused(micro: int, mean: str) -> str:
    engine = engine_of("own loss", micro, loss_mean=mean)
    try:
        engine(collate(rows_of("own loss")[:micro]))
    except ValueError as error:
        return str(error)
    return "taken"


def test_a_models_own_loss_of_several_examples_gives_no_mean_over_examples():
    for refusals in run_ranks(2, rank_refused, 2, "examples"):
        assert 'zeroth_order.loss_mean: "examples"' in refusals
        assert 'Use "tokens", or train_micro_batch_size_per_gpu 1.' in refusals
    assert run_ranks(2, rank_refused, 1, "examples") == ["taken"] * 2
    assert run_ranks(2, rank_refused, 2, "tokens") == ["taken"] * 2


# --- first-order steps ----------------------------------------------------------------------------


def rank_of_first_order(micro: int, stage: int, mean: str) -> list[float]:
    """The losses of AdamW's steps on the same eight examples."""
    config = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": micro,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {**ADAMW, "torch_adam": True}},
        "steps_per_print": 10**9,
        "gradient_clipping": 0.0,  # DeepSpeed 0.19.8 clips at 1 by default
        "zeroth_order": {"loss_mean": mean},
    }
    run = read_first_order_config(config, torch.distributed.get_world_size())
    engine = FirstOrderEngine(model_of("causal"), run, rows_of("causal")[:BATCH], collate)
    return [engine.train_batch() for _ in range(3)]


@pytest.mark.parametrize("mean", ["tokens", "examples"])
def test_first_order_steps_are_those_of_plain_adamw_on_the_global_batch(mean):
    model, batch, expected = model_of("causal"), collate(rows_of("causal")[:BATCH]), []
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    for _ in range(3):
        loss = objective_of(model(batch["input_ids"]).logits, batch["labels"], mean, True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(float(loss.detach()))
    for world_size, micro, stage in ((1, 8, 0), (1, 1, 0), (2, 2, 3)):
        for found in run_ranks(world_size, rank_of_first_order, micro, stage, mean):
            assert found == pytest.approx(expected, rel=1e-4), (world_size, micro)


# --- stopped, and resumed on another number of ranks ----------------------------------------------


def rank_of_runs(folder: Path, until: dict[str, int], changed: dict[str, str]) -> dict[str, Any]:
    """Run with each of the two means up to step `until`, in a folder for each.

    Returns the losses, or the error's text.
    """
    found: dict[str, Any] = {}
    for mean, steps in until.items():
        micro = BATCH // torch.distributed.get_world_size()
        engine = engine_of("causal", micro, loss_mean=changed.get(mean, mean), stage=3, **SVRG)
        try:
            engine.resume(folder / mean)
            found[mean] = [engine.train_batch() for _ in range(engine.global_steps, steps)]
        except ValueError as error:
            found[mean] = str(error)
        engine.close()
        torch.distributed.barrier()
    return found


def test_a_run_resumed_on_another_number_of_ranks_continues_the_same_curve(tmp_path):
    """The curves of the two means differ by far more than the tolerance."""
    whole_run = {"tokens": 6, "examples": 6}
    (undisturbed,) = run_ranks(1, rank_of_runs, tmp_path / "whole", whole_run, {})
    (begun,) = run_ranks(1, rank_of_runs, tmp_path / "run", {"tokens": 3, "examples": 3}, {})
    others = {"tokens": "examples", "examples": "tokens"}
    for refusals in run_ranks(2, rank_of_runs, tmp_path / "run", whole_run, others):
        for mean, other in others.items():
            assert (
                f"made with zeroth_order.loss_mean = {mean}, this run has {other}."
                in refusals[mean]
            )
    for resumed in run_ranks(2, rank_of_runs, tmp_path / "run", whole_run, {}):
        for mean in whole_run:
            assert begun[mean] + resumed[mean] == pytest.approx(undisturbed[mean], abs=5e-5)
    assert all(abs(a - b) > 1e-2 for a, b in zip(*undisturbed.values(), strict=True))


def losses_of_run(folder: Path, output: str, world_size: int, **others: Any) -> dict[int, float]:
    """Run the command line: the losses in the run's folder by step."""
    options = options_of(
        deepspeed_config=folder / "config.json",
        model=MODEL,
        output_dir=folder / output,
        task="instruction",
        train_file=folder / "train.jsonl",
        max_length=96,
        **others,
    )
    finetune_on_ranks(world_size, options)
    return {
        record["step"]: record["loss"]
        for record in read_metrics(folder / output)
        if record["kind"] == "train"
    }


@pytest.mark.slow
def test_the_command_line_continues_the_same_curve_on_another_number_of_ranks(tmp_path):
    """Instruction tuning with responses of one word and of dozens of words."""
    words = ["value", "return", "name", "list", "of", "the"]
    rows = [
        {
            "instruction": f"say {k}",
            "output": "x" if k % 2 else " ".join(words[(j * k) % 6] for j in range(30)),
        }
        for k in range(24)
    ]
    write_rows(tmp_path / "train.jsonl", rows)
    section = {"method": "mezo", "lr": 1e-4, "eps": 1e-2}
    config = {"train_batch_size": 8, "zero_optimization": {"stage": 3}, "zeroth_order": section}
    (tmp_path / "config.json").write_text(json.dumps(config))
    undisturbed = losses_of_run(tmp_path, "whole", 1, max_steps=5)
    losses_of_run(tmp_path, "run", 1, max_steps=3)
    resumed = losses_of_run(tmp_path, "run", 2, max_steps=5, resume="auto")
    assert list(resumed) == list(undisturbed) == [1, 2, 3, 4, 5]
    assert resumed == pytest.approx(undisturbed, rel=1e-4)

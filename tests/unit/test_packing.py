"""Rows of several examples: texts that are concatenated and cut, and whole conversations."""

from __future__ import annotations

import json
from itertools import chain, pairwise
from types import SimpleNamespace

import datasets
import pytest
import torch
from tiny_tasks import TEXTS, make_task, make_tokenizer
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    Qwen3Config,
)

from zods.cli.data_options import DataArguments, TaskArguments
from zods.cli.model_checks import check_packing
from zods.cli.options import (
    Arguments,
    ModelArguments,
    OverrideArguments,
    RunArguments,
    SelectionArguments,
)
from zods.cli.prepared_data import prepare_data
from zods.cli.pretrained import Pretrained
from zods.config.schema import ZerothOrderConfig
from zods.config.selector_section import SelectorConfig
from zods.tasks import PackedCollator, prepare_packed

DOCUMENTS = datasets.Dataset.from_dict({"text": [*TEXTS, " ", *TEXTS]})


def texts_task(max_length: int, kind: str = "llama"):
    return make_task("instruction", kind, DOCUMENTS, max_length)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("length", [3, 8, 17])
def test_packed_rows_are_the_tokens_of_all_texts_in_order(kind, length):
    packed = prepare_packed(texts_task(length, kind), DOCUMENTS, "row")
    whole = texts_task(10_000, kind).prepare(DOCUMENTS)
    for column in ("input_ids", "labels"):
        tokens = list(chain.from_iterable(whole[column]))
        assert [len(row) for row in packed[column]] == [length] * (len(tokens) // length)
        assert list(chain.from_iterable(packed[column])) == tokens[: len(tokens) // length * length]


def test_a_packed_row_is_one_example_without_padding():
    task = texts_task(8)
    batch = task.collate(list(prepare_packed(task, DOCUMENTS, "row")))
    assert batch["input_ids"].shape[1] == 8
    assert batch["attention_mask"].all()
    assert task.tokenizer.eos_token_id in batch["labels"]


def test_texts_that_fill_no_row_are_refused():
    with pytest.raises(ValueError, match=r"--packing: the 8 texts do not fill one row of 9999 "):
        prepare_packed(texts_task(9999), DOCUMENTS, "row")


@pytest.mark.parametrize("name", ["prompted", "classification"])
def test_tasks_with_one_prediction_per_example_are_refused_with_the_reason(name):
    task = make_task(name, "gpt2")
    with pytest.raises(ValueError, match=rf"--packing: an example of --task {name} has a predict"):
        prepare_packed(task, DOCUMENTS, "row")


# --- whole examples -------------------------------------------------------------------------------

SAY = ["say one", "say two and then say three four", "five", "say six", "great fun", "say four"]
CONVERSATIONS = datasets.Dataset.from_dict(
    {
        "messages": [
            [
                {"role": "user", "content": text},
                {"role": "assistant", "content": "" if text == "five" else f"{text} it was"},
            ]
            for text in SAY
        ]
    }
)
ANSWERS = datasets.Dataset.from_dict({"instruction": SAY, "output": [f"{text} it" for text in SAY]})
KINDS = {"chat": CONVERSATIONS, "instruction": ANSWERS}
LENGTH = 90


def whole_examples(kind: str):
    """The task, the prepared examples and the packed rows of a kind."""
    task = make_task("instruction", "gpt2", KINDS[kind], LENGTH)
    return task, task.prepare(KINDS[kind]), prepare_packed(task, KINDS[kind], "row")


def parts_of(row):
    """The examples of a packed row: (tokens, labels) of each."""
    starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
    for start, end in pairwise([*starts, len(row["position_ids"])]):
        assert row["position_ids"][start:end] == list(range(end - start))
        yield row["input_ids"][start:end], row["labels"][start:end]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_examples_stay_whole_with_their_labels(kind):
    task, examples, packed = whole_examples(kind)
    found = [part for row in packed for part in parts_of(row)]
    expected = []
    for example in examples:
        batch = task.collate([example])
        expected.append((batch["input_ids"][0].tolist(), batch["labels"][0].tolist()))
    assert sorted(found) == sorted(expected)
    assert all(labels[0] == -100 for _, labels in found)
    assert len(packed) < len(examples)
    assert all(len(row["input_ids"]) <= LENGTH for row in packed)


SHAPE = {
    "vocab_size": 450, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
MODELS = {
    "llama": LlamaConfig(**SHAPE, intermediate_size=16),
    "qwen3": Qwen3Config(**SHAPE, intermediate_size=16, head_dim=8, num_key_value_heads=1),
    "gpt2": GPT2Config(vocab_size=450, n_embd=16, n_layer=2, n_head=2),
}
# OPT of transformers 5.23 reads position_ids for its embedding only, not for its mask.
OPT = OPTConfig(**SHAPE, word_embed_proj_dim=16, ffn_dim=16, max_position_embeddings=128)
MAMBA = MambaConfig(vocab_size=450, hidden_size=16, num_hidden_layers=1, state_size=4)


def model_of(config, attention: str = "sdpa"):
    torch.manual_seed(0)
    config.initializer_range = 0.3  # so that what a token attends to matters
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.double().eval()


def token_losses(model, batch):
    """The losses of all label tokens, sorted."""
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    losses = cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    return losses[batch["labels"][:, 1:] != -100].sort().values


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_a_packed_example_has_the_losses_that_it_has_alone(name, attention):
    model = model_of(MODELS[name], attention)
    task, examples, packed = whole_examples("chat")
    batch = PackedCollator(task.pad_id)(list(packed))
    alone = token_losses(model, task.collate(list(examples)))
    torch.testing.assert_close(token_losses(model, batch), alone, rtol=1e-9, atol=1e-9)
    joined = {name: values for name, values in batch.items() if name != "position_ids"}
    assert (token_losses(model, joined) - alone).abs().max() > 1e-3


def evaluate_with(model):
    """The engine's method `evaluate`, for one batch in one process."""

    @torch.no_grad()
    def evaluate(dataset, collate, measure):
        inputs, targets = collate(dataset)
        return {
            name: total for name, (total, _) in measure(model(**inputs), inputs, targets).items()
        }

    return evaluate


@pytest.mark.parametrize(
    ("config", "apart"), [(MODELS["llama"], True), (OPT, False), (MAMBA, False)]
)
def test_a_model_that_does_not_keep_packed_examples_apart_is_refused(config, apart):
    model = model_of(config, "eager").float()
    task, _, packed = whole_examples("chat")
    batches = [PackedCollator(task.pad_id)([row]) for row in packed]
    arguments = (evaluate_with(model), model, Pretrained("m", model.config, None))
    check_packing(*arguments, [{"input_ids": torch.ones(1, 4)}])  # rows that are not packed
    if apart:
        check_packing(*arguments, batches)
    else:
        with pytest.raises(ValueError, match=rf"^--packing: m, of type {config.model_type} with"):
            check_packing(*arguments, batches)


# --- beside a selector's target -------------------------------------------------------------------


def prepared_beside_a_target(folder, rows):
    """The packed rows, and the examples of the target, as the command line prepares them."""
    for name in ("train", "target"):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    selector = SelectorConfig(
        candidates=4, strategy="target", target_file=str(folder / "target.jsonl")
    )
    arguments = Arguments(
        ModelArguments(model="m", output_dir="unused"),
        SelectionArguments(),
        DataArguments(
            train_file=str(folder / "train.jsonl"), validation_file=str(folder / "target.jsonl")
        ),
        TaskArguments(task="instruction", packing=True, max_length=LENGTH),
        RunArguments(),
        OverrideArguments(),
    )
    run = SimpleNamespace(
        seed=0, selector=selector, zeroth_order=ZerothOrderConfig(selector=selector)
    )
    pretrained = Pretrained("m", MODELS["gpt2"], None)
    return prepare_data(arguments, make_tokenizer("gpt2"), run, pretrained)


def test_a_selectors_target_is_refused_beside_packed_examples(tmp_path):
    with pytest.raises(ValueError, match=r"^--packing: a row of several .* the strategy target\.$"):
        prepared_beside_a_target(tmp_path, list(ANSWERS))


def test_packed_texts_have_a_target(tmp_path):
    data = prepared_beside_a_target(tmp_path, list(DOCUMENTS) * 9)
    assert {len(row["input_ids"]) for row in data.train} == {LENGTH}
    assert len(data.target) > 0

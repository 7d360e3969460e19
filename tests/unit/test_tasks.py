"""Tasks: prepared rows, batches, losses and metrics.

Batches label only the answer. Losses equal those of transformers. All processes get the same rows.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from tiny_tasks import (
    CLASSES,
    ORDERS,
    REVIEWS,
    TEMPLATE,
    TEXTS,
    labelled_text,
    llama,
    make_task,
    make_tokenizer,
    outputs_of,
    reviews,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)

import zods.tasks.task
from zods.data.objectives import batch_loss
from zods.tasks import load_examples
from zods.tasks.prompts import Template, tokenize_continuations


@pytest.mark.parametrize("kind", ["gpt2", "llama", "sentencepiece"])
@pytest.mark.parametrize(
    "template",
    [TEMPLATE, "{text} It was{label}", "{text}\nIt was  {label}", "It was {text}:{label}"],
)
def test_only_the_label_word_is_labelled(kind, template):
    task = make_task("prompted", kind, template=template)
    batch = task.collate(list(task.prepare(REVIEWS)))
    assert [text.strip() for text in labelled_text(task, batch)] == [
        "great",
        "terrible",
        "great",
        "terrible",
    ]
    cue = template.removesuffix("{label}").partition("{text}")[2]
    for ids, mask, text, word in zip(
        batch["input_ids"], batch["attention_mask"], TEXTS, ["great", "terrible"] * 2, strict=True
    ):
        whole = template.partition("{text}")[0] + text + cue + word
        assert ids[mask.bool()].tolist() == task.tokenizer(whole)["input_ids"]


def test_only_the_response_and_the_end_of_sequence_are_labelled():
    for kind in ("gpt2", "llama", "sentencepiece"):
        task = make_task("instruction", kind)
        batch = task.collate(list(task.prepare(ORDERS)))
        assert labelled_text(task, batch) == ["one</s>", "two three four five six</s>"]


@pytest.mark.parametrize("words", [["eat", " x"], [" x", "eat"]])
def test_a_token_that_merges_prompt_and_answer_belongs_to_the_answer_for_all_words(words):
    tokenizer = make_tokenizer("gpt2")
    assert len(tokenizer(" great")["input_ids"]) == 1
    ((prompt, answers),) = tokenize_continuations(tokenizer, ["It was gr"], [words])
    assert tokenizer.decode(prompt) == "It was"
    assert [tokenizer.decode(answer) for answer in answers] == [f" gr{word}" for word in words]


def test_padding_is_on_the_right_and_is_masked_and_not_labelled():
    for name in ("prompted", "instruction"):
        task = make_task(name, "gpt2")
        rows = list(task.prepare(ORDERS if name == "instruction" else REVIEWS))
        batch = task.collate(rows)
        lengths = batch["attention_mask"].sum(1)
        assert lengths.max() == batch["input_ids"].shape[1] > lengths.min()
        for row, length in enumerate(lengths):
            assert batch["attention_mask"][row, :length].all()
            assert (batch["input_ids"][row, length:] == task.tokenizer.eos_token_id).all()
            assert (batch["labels"][row, length:] == -100).all()
            alone = task.collate([rows[row]])
            assert all(torch.equal(alone[key][0], batch[key][row, :length]) for key in batch)


def test_classification_tokens_are_the_tokenizers_own_for_texts_and_pairs():
    pairs = REVIEWS.add_column("second", ["why", "", "so what", "it was terrible"])
    for settings, seconds in (({}, None), ({"text_pair_column": "second"}, list(pairs["second"]))):
        task = make_task("classification", "bert", pairs, max_length=8, **settings)
        batch = task.collate(list(task.prepare(pairs)))
        expected = task.tokenizer(
            TEXTS, seconds, truncation=True, max_length=8, padding=True, return_tensors="pt"
        )
        assert batch.pop("labels").tolist() == [1, 0, 1, 0]
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[key], expected[key]) for key in batch)


@pytest.mark.parametrize("max_length", range(7, 14))
def test_a_long_prompt_is_cut_at_the_left_and_keeps_bos_cue_and_answer(max_length, caplog):
    task = make_task("prompted", max_length=max_length)
    longest = len(task.tokenizer(TEXTS[1] + "\nIt was terrible")["input_ids"])
    assert longest > 13
    with caplog.at_level(logging.WARNING):
        row = task.prepare(REVIEWS)[1]
    batch = task.collate([row])
    assert batch["input_ids"].shape == (1, max_length)
    text = task.tokenizer.decode(batch["input_ids"][0])
    assert text.startswith("<s>")
    assert text.endswith("s\nIt was terrible")
    assert caplog.text.count("of 4 examples were cut") == 1


def test_a_response_is_cut_after_its_prompt_at_the_right_and_only_where_it_cannot_fit():
    numbers = "one two three four five six"
    long = datasets.Dataset.from_dict(
        {"instruction": ["say " * 30 + "this"] * 2, "output": ["one", numbers * 9]}
    )
    task = make_task("instruction", dataset=long, max_length=20)
    short, cut = task.collate(list(task.prepare(long)))["labels"]
    assert task.tokenizer.decode(short[short != -100]) == "one</s>"
    assert (cut != -100).sum() == 20 - 1 - 9  # all but BOS and a prompt of half of the other tokens
    assert cut[-1] != task.tokenizer.eos_token_id
    for row in task.prepare(long):
        assert len(row["input_ids"]) == 20
        prompt = task.tokenizer.decode(row["input_ids"][: -row["num_answer_tokens"]])
        assert prompt.startswith("<s>")
        assert prompt.endswith(" this\n")


def test_a_cut_example_keeps_bos_and_cue_whatever_the_length_of_its_response():
    outputs = ["one" + " one" * more for more in range(40)]
    data = datasets.Dataset.from_dict({"q": ["say " * 30 + "this"] * 40, "a": outputs})
    task = make_task("instruction", dataset=data, template="{q}\nIt was:\n{a}", max_length=20)
    for row in task.prepare(data):
        assert len(row["input_ids"]) == 20
        prompt = task.tokenizer.decode(row["input_ids"][: -row["num_answer_tokens"]])
        assert prompt.startswith("<s>")
        assert prompt.endswith("s\nIt was:\n")


def test_no_cut_is_reported_where_nothing_was_cut(caplog):
    for name, data in (("prompted", REVIEWS), ("classification", REVIEWS), ("instruction", ORDERS)):
        make_task(name, "bert" if name == "classification" else "llama").prepare(data)
    assert "were cut" not in caplog.text


def test_training_and_evaluation_losses_equal_those_of_transformers_row_by_row():
    for name, data in (("prompted", REVIEWS), ("instruction", ORDERS)):
        task, model = make_task(name), llama()
        rows = list(task.prepare(data))
        with torch.no_grad():
            own = [model(**task.collate([row])).loss.item() for row in rows]
            inputs, targets = task.collate_eval(rows)
            metrics = task.measure(outputs_of(model, inputs), inputs, targets)
            batch = task.collate(rows)
            training = batch_loss(
                {"logits": model(batch["input_ids"], batch["attention_mask"]).logits}, batch
            )
            assert training.item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)
        assert metrics["loss"] == (pytest.approx(sum(own), rel=1e-5), len(rows))


def test_the_predicted_word_has_the_highest_mean_log_probability():
    task, model = (
        make_task("prompted", label_words=["never ends and never starts", "great"]),
        llama(),
    )
    for row in task.prepare(REVIEWS):
        with torch.no_grad():
            losses = [
                model(**task.collate([{**row, "answer": word}])).loss.item() for word in (0, 1)
            ]
            inputs, _ = task.collate_eval([row])
            outputs = outputs_of(model, inputs)
        assert len(outputs["num_tokens"]) == 2
        for word in (0, 1):
            _, targets = task.collate_eval([{**row, "answer": word}])
            metrics = task.measure(outputs, inputs, targets)
            assert metrics["loss"] == (pytest.approx(losses[word], rel=1e-5), 1)
            assert metrics["accuracy"] == (losses[word] == min(losses), 1)


def test_token_accuracy_counts_each_example_once_whatever_its_length():
    task = make_task("instruction")
    inputs, targets = task.collate_eval(list(task.prepare(ORDERS)))
    logits = torch.nn.functional.one_hot(inputs["input_ids"].roll(-1, 1), 450).float() * 50
    assert task.measure({"logits": logits}, inputs, targets)["accuracy"] == (2.0, 2)
    logits[1] = 0
    assert task.measure({"logits": logits}, inputs, targets)["accuracy"] == (1.0, 2)


def test_classification_metrics_and_loss_equal_those_of_transformers_after_a_round_trip(
    tmp_path,
):
    tiny = {"num_labels": 4, "vocab_size": 450}
    bert = BertConfig(
        **tiny, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    for kind, saved in (
        ("bert", BertForSequenceClassification(bert)),
        ("gpt2", GPT2ForSequenceClassification(GPT2Config(**tiny, n_embd=16, n_layer=1, n_head=2))),
    ):
        saved.save_pretrained(tmp_path / kind)
        task = make_task("classification", kind, label_column="topic")
        assert task.auto_class() is AutoModelForSequenceClassification
        model = task.auto_class().from_pretrained(
            tmp_path / kind, ignore_mismatched_sizes=True, **task.model_kwargs()
        )
        model.eval()
        assert model.config.id2label == {0: "a", 1: "b"}
        rows = list(task.prepare(REVIEWS))
        inputs, targets = task.collate_eval(rows)
        with torch.no_grad():
            alone = [model(**task.collate([row])) for row in rows]
            metrics = task.measure(model(**inputs), inputs, targets)
        assert metrics["loss"] == (
            pytest.approx(sum(out.loss.item() for out in alone), rel=1e-5),
            4,
        )
        num_correct = sum(
            out.logits.argmax().item() == row["answer"]
            for out, row in zip(alone, rows, strict=True)
        )
        assert metrics["accuracy"] == (num_correct, 4)


def test_the_language_tasks_load_any_causal_model_without_extra_settings(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=450, n_embd=16, n_layer=1, n_head=2)).save_pretrained(
        tmp_path
    )
    for name in ("prompted", "instruction"):
        task = make_task(name)
        assert task.auto_class() is AutoModelForCausalLM
        task.auto_class().from_pretrained(tmp_path, **task.model_kwargs())


def test_labels_are_the_sorted_values_or_the_names_of_the_classes():
    def names(data, **settings):
        return make_task("classification", dataset=data, **settings).model_kwargs()["id2label"]

    assert names(REVIEWS, label_column="topic") == {0: "a", 1: "b"}
    assert names(reviews(label=[1, -1])) == {0: "-1", 1: "1"}
    assert names(reviews(label=[1, 1]).cast(CLASSES)) == {0: "bad", 1: "good"}
    task = make_task("prompted", dataset=REVIEWS, label_column="topic", label_words=None)
    assert [
        text.strip() for text in labelled_text(task, task.collate(list(task.prepare(REVIEWS))))
    ] == list("baba")


@pytest.mark.parametrize(
    ("data", "settings"),
    [
        (reviews(label=["good", "bad"]), {}),
        (reviews(label=[0, 1]).cast(CLASSES), {}),
    ],
)
def test_label_ids_follow_a_pretrained_head_of_the_same_classes(data, settings):
    head = ["good", "bad"]
    task = make_task("classification", "bert", data, max_length=16, class_names=head, **settings)
    assert task.model_kwargs()["id2label"] == {0: "good", 1: "bad"}
    prepared = task.prepare(data)
    named = (
        data["label"]
        if data.features["label"].dtype == "string"
        else [CLASSES["label"].names[i] for i in data["label"]]
    )
    assert [head[row["answer"]] for row in prepared] == list(named)


@pytest.mark.parametrize("head", [["Good", "Bad"], ["good", "bad", "other"], ["0", "1"]])
def test_label_ids_are_sorted_where_the_head_has_other_classes(head):
    data = reviews(label=["good", "bad"])
    task = make_task("classification", "bert", data, max_length=16, class_names=head)
    assert task.model_kwargs()["id2label"] == {0: "bad", 1: "good"}


def test_default_class_names_of_a_head_order_the_labels_of_data_that_use_them():
    names = [f"LABEL_{i}" for i in range(12)]  # sorted as text they have another order
    data = datasets.Dataset.from_dict({"text": names, "label": names[::-1]})
    task = make_task("classification", "bert", data, class_names=names)
    assert [row["answer"] for row in task.prepare(data)] == list(range(12))[::-1]


def test_only_models_that_embed_token_types_get_them():
    pairs = REVIEWS.add_column("second", ["why", "", "so what", "it was terrible"])
    with_types = make_task("classification", "bert", pairs, text_pair_column="second")
    without = make_task(
        "classification",
        "bert",
        pairs,
        text_pair_column="second",
        has_token_types=False,
        max_length=8,
    )
    assert with_types.collate(list(with_types.prepare(pairs)))["token_type_ids"].max() == 1
    assert set(without.collate(list(without.prepare(pairs)))) == {
        "input_ids",
        "attention_mask",
        "labels",
    }


def test_doubled_braces_of_a_template_are_text_and_one_of_its_fields_may_be_blank():
    data = datasets.Dataset.from_dict(
        {"q": ["two", "six"], "hint": ["", "say"], "a": ["one", "two"]}
    )
    template = Template.parse("{{q}} {hint}{q}:\n{a}")
    assert (template.columns, template.cue, template.answer) == (("hint", "q"), ":\n", "a")
    assert template.prompts(data[:]) == ["{q} two:\n", "{q} saysix:\n"]
    assert (
        len(make_task("instruction", dataset=data, template="{{q}} {hint}{q}:\n{a}").prepare(data))
        == 2
    )


PREPARE = """
import json, sys
sys.path[:0] = sys.argv[1:3]
from tiny_tasks import make_task
from zods.tasks import build_task, load_examples
reviews, orders, output = sys.argv[3:]
found = []
for name, file in (("classification", reviews), ("prompted", reviews), ("instruction", orders)):
    data = load_examples(file=file, seed=0)
    prepared = make_task(name, dataset=data, max_length=8).prepare(data)
    found.append([prepared.cache_files[0]["filename"], prepared.to_list()])
with open(output, "w") as file:
    json.dump(found, file)
"""


@pytest.mark.launched
def test_processes_that_prepare_data_at_the_same_time_get_the_same_rows_in_the_same_file(tmp_path):
    REVIEWS.to_json(tmp_path / "reviews.jsonl")
    ORDERS.to_json(tmp_path / "orders.jsonl")
    here = Path(__file__).parent
    paths = [here, here.parents[1], tmp_path / "reviews.jsonl", tmp_path / "orders.jsonl"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PREPARE, *map(str, paths), str(tmp_path / seed)],
            env={
                **os.environ,
                "HF_DATASETS_CACHE": str(tmp_path / "cache"),
                "PYTHONHASHSEED": seed,
            },
        )
        for seed in ("1", "2")
    ]
    assert [process.wait(timeout=180) for process in processes] == [0, 0]
    first, second = (json.loads((tmp_path / seed).read_text()) for seed in ("1", "2"))
    assert first == second
    assert all(file.startswith(str(tmp_path / "cache")) for file, _ in first)


def test_a_change_of_the_tasks_code_prepares_the_rows_again(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    ORDERS.to_parquet(tmp_path / "orders.parquet")
    data = load_examples(file=tmp_path / "orders.parquet", seed=0)

    def prepared_file():
        return make_task("instruction").prepare(data).cache_files[0]["filename"]

    before = prepared_file()
    assert prepared_file() == before
    changed = shutil.copytree(Path(zods.tasks.task.__file__).parent, tmp_path / "changed")
    with (changed / "prompts.py").open("a") as file:
        file.write("# changed")
    monkeypatch.setattr(zods.tasks.task, "__file__", str(changed / "task.py"))
    assert prepared_file() != before


@pytest.mark.parametrize(
    ("name", "file", "settings"),
    [
        ("classification", "sst2/dev.tsv", {"text_column": "sentence"}),
        ("prompted", "sst2/dev.tsv", {"template": "{sentence} It was {label}"}),
        ("instruction", "math_mix.jsonl", {}),
    ],
)
def test_real_data_becomes_batches_with_a_finite_loss(name, file, settings, tmp_path, monkeypatch):
    if "ZODS_DATA" not in os.environ:
        pytest.skip("ZODS_DATA does not name the folder of the real data")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    columns = ["sentence", "label"] if file.endswith(".tsv") else None
    data = load_examples(file=Path(os.environ["ZODS_DATA"]) / file, column_names=columns, seed=0)
    task = make_task(name, "llama", data, max_length=96, **settings)
    prepared = task.prepare(data)
    assert len(prepared) == len(data)
    batch = task.collate([prepared[row] for row in range(8)])
    assert batch["input_ids"].shape[1] <= 96
    if name != "classification":
        assert batch_loss(llama()(**batch), batch).isfinite()

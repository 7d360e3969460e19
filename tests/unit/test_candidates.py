"""Scoring of candidates, and greedy generation, in forwards of at most a micro-batch."""

import datasets
import pytest
import torch
from tiny_tasks import (
    CHOICES,
    QUESTIONS,
    REVIEWS,
    answers,
    choices,
    llama,
    make_task,
    outputs_of,
)

from zods.data.batch import CANDIDATES
from zods.data.evaluation import Forwards
from zods.tasks import over_label_words


def counting(model, rows):
    def forward(inputs):
        rows.append(len(inputs["input_ids"]))
        return model(**inputs)

    return forward


@pytest.mark.parametrize("num_labels", [2, 77])
def test_a_forward_never_has_more_sequences_than_a_micro_batch(num_labels):
    words = [f"w{i}" for i in range(num_labels)]
    data = REVIEWS.map(lambda row, i: {"label": i % num_labels}, with_indices=True)
    task = make_task("prompted", dataset=data, label_words=words)
    inputs, targets = task.collate_eval(list(task.prepare(data)))
    sizes = []
    outputs = inputs.run(Forwards(counting(llama(), sizes), 3))
    assert sum(sizes) == 4 * num_labels
    assert max(sizes) == 3
    assert task.measure(outputs, inputs, targets)["accuracy"][1] == 4


@pytest.mark.parametrize("scoring", ["mean", "sum", "calibrated"])
def test_the_micro_batch_does_not_change_the_metrics(scoring):
    task, model = choices(scoring), llama()
    inputs, targets = task.collate_eval(list(task.prepare(CHOICES)))
    with torch.no_grad():
        found = [
            task.measure(outputs_of(model, inputs, size), inputs, targets) for size in (1, 4, 100)
        ]
    assert found[0]["accuracy"] == found[1]["accuracy"] == found[2]["accuracy"]
    assert found[0]["loss"][0] == pytest.approx(found[2]["loss"][0], rel=1e-5)


def test_a_rank_makes_as_many_forwards_as_the_rank_with_most_candidates():
    inputs, _ = choices().collate_eval(list(choices().prepare(CHOICES)))
    alone, together = [], []
    with torch.no_grad():
        first = inputs.run(Forwards(counting(llama(), alone), 4))
        second = inputs.run(Forwards(counting(llama(), together), 4, lambda number: number + 2))
    assert together == [*alone, 4, 4]
    assert torch.equal(first["log_likelihood"], second["log_likelihood"])


def log_likelihood(model, tokenizer, prompt, word):
    prompt_ids, ids = tokenizer(prompt)["input_ids"], tokenizer(prompt + word)["input_ids"]
    start = next(
        (i for i, (a, b) in enumerate(zip(prompt_ids, ids, strict=False)) if a != b),
        min(len(prompt_ids), len(ids)),
    )
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    scores = [logs[t - 1, ids[t]].item() for t in range(start, len(ids))]
    return sum(scores), len(scores)


@pytest.mark.parametrize("scoring", ["mean", "sum", "calibrated"])
def test_the_prediction_has_the_best_score_of_the_named_kind(scoring):
    task, model = choices(scoring), llama()
    differ = set()
    for row, published in zip(task.prepare(CHOICES), CHOICES, strict=True):
        scores = []
        for end in published["ends"]:
            total, count = log_likelihood(
                model, task.tokenizer, published["text"] + "\nIt was ", end
            )
            bare, _ = log_likelihood(model, task.tokenizer, "\nIt was ", end)
            of_kind = {"mean": total / count, "sum": total, "calibrated": total - bare}
            scores.append(of_kind[scoring])
        best = max(range(len(scores)), key=scores.__getitem__)
        differ.add(best)
        for answer in range(len(scores)):
            inputs, targets = task.collate_eval([{**row, "answer": answer}])
            with torch.no_grad():
                metrics = task.measure(outputs_of(model, inputs), inputs, targets)
            assert metrics["accuracy"] == (answer == best, 1)


def test_training_labels_only_the_right_candidate():
    task = choices()
    batch = task.collate(list(task.prepare(CHOICES)))
    texts = [task.tokenizer.decode(row[row != -100]).strip() for row in batch["labels"]]
    assert texts == ["two three", "great", "six"]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("ends", [["one"], ["a", "b"], ["a", "b"]], "row 0: fewer than two candidates"),
        ("ends", [["a", "b"], ["a", " "], ["a", "b"]], "row 1: a blank candidate among"),
        ("answer", [1, 0, 2], "row 2: the answer is 2; the candidates are 0 to 1"),
        ("answer", [1, None, 0], "row 1: the answer is None"),
    ],
)
def test_a_row_without_usable_candidates_is_named(column, values, message):
    wrong = datasets.Dataset.from_dict({**CHOICES.to_dict(), column: values})
    with pytest.raises(ValueError, match=message):
        choices().prepare(wrong)


# --- generation -----------------------------------------------------------------------------------


def test_greedy_generation_equals_that_of_transformers_whatever_the_padding():
    task, model = answers(), llama()
    rows = list(task.prepare(QUESTIONS))
    inputs, _ = task.collate_eval(rows)
    generated = outputs_of(model, inputs)["generated"]
    assert generated.shape == (2, 5)
    for row, tokens in zip(rows, generated, strict=True):
        prompt = torch.tensor([row["input_ids"][: -row["num_answer_tokens"]]])
        expected = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=inputs.end,
            pad_token_id=0,
        )[0, prompt.shape[1] :]
        assert tokens[: len(expected)].tolist() == expected.tolist()


class Says:
    """A model that continues every prompt with the same texts, one token at a time."""

    def __init__(self, tokenizer, prompts, texts):
        self.tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        self.lengths, self.forwards = prompts.attention_mask.sum(1), 0

    def __call__(self, input_ids, attention_mask):
        self.forwards += 1
        logits = torch.zeros(*input_ids.shape, 450)
        for row, tokens in enumerate(self.tokens):
            for offset, token in enumerate(tokens):
                position = self.lengths[row] - 1 + offset
                if position < logits.shape[1]:
                    logits[row, position, token] = 50.0
        return {"logits": logits}


@pytest.mark.parametrize(
    ("metric", "texts", "accuracy", "f1"),
    [
        ("f1", ["The one.</s> six", "two</s>"], 1, 1 + 2 / 3),
        ("f1", ["one\nsix</s>", "two three</s>"], 2, 2),
        ("last_number", ["so 2\n#### 1</s> 5", "3</s>"], 2, None),
    ],
)
def test_a_generated_answer_ends_at_the_end_of_sequence_or_line(metric, texts, accuracy, f1):
    task = answers(metric=metric, max_new_tokens=32)
    data = QUESTIONS.add_column(
        "references", [["one"], ["two three"]] if f1 else [["#### 1"], ["3.0"]]
    )
    rows = list(task.prepare(data))
    inputs, targets = task.collate_eval(rows)
    model = Says(task.learning.tokenizer, inputs, texts)
    metrics = task.measure(outputs_of(model, inputs), inputs, targets)
    assert metrics["accuracy"] == (accuracy, 2)
    assert metrics.get("f1", (None, 2)) == (f1 and pytest.approx(f1), 2)
    longest = max(map(len, model.tokens))
    assert model.forwards <= 1 + longest, "generation stops where all rows have ended"


def test_a_long_prompt_leaves_room_for_the_generated_answer():
    long = datasets.Dataset.from_dict({"q": ["say " * 100 + "this"], "a": ["one"]})
    task = answers(max_new_tokens=20)
    inputs, _ = task.collate_eval(list(task.prepare(long)))
    assert inputs.input_ids.shape == (1, 64 - 20)
    text = task.learning.tokenizer.decode(inputs.input_ids[0])
    assert text.startswith("<s>")
    assert text.endswith("say this\n")


def test_scoring_of_label_words_is_a_setting_of_the_prompted_task():
    task = make_task("prompted", scoring="calibrated")
    assert task.scoring == "calibrated"
    assert {"bare_prompt", "bare_words"} <= set(task.prepare(REVIEWS).column_names)


# --- cross entropy over the label words alone -----------------------------------------------------


def test_training_batches_have_the_tokens_of_all_label_words_and_of_the_right_one():
    task = over_label_words(
        make_task("prompted", label_words=["a", "g"], template="{text}\n{label}")
    )
    batch = task.collate(list(task.prepare(REVIEWS)))
    words = [task.tokenizer.decode(token) for token in batch[CANDIDATES][0]]
    assert words == ["a", "g"]
    assert batch[CANDIDATES].shape == (4, 2)
    labelled = batch["labels"][batch["labels"] != -100]
    right = batch[CANDIDATES].gather(1, torch.tensor(REVIEWS["label"][:])[:, None])[:, 0]
    assert labelled.tolist() == right.tolist()


def test_label_words_of_several_tokens_and_tasks_without_them_are_refused():
    with pytest.raises(ValueError, match=r"of several tokens: .*'fourteen' \(\d\)\. The cross"):
        over_label_words(make_task("prompted", label_words=["a", "fourteen"]))
    for task in (choices(), answers(), make_task("classification")):
        with pytest.raises(ValueError, match=f"the task {task.name} has none. Use the objective"):
            over_label_words(task)


def test_a_label_word_that_merges_with_the_end_of_one_prompt_names_the_row():
    task = over_label_words(make_task("prompted", template="{text}{label}", label_words=["x", "e"]))
    data = datasets.Dataset.from_dict({"text": ["so ", "a movi"], "label": [0, 1]})
    with pytest.raises(ValueError, match="row 1: a label word is more than one token after this"):
        task.prepare(data)

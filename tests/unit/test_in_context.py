"""Solved examples before held-out prompts: which ones, where they are cut, and what is refused."""

import datasets
import pytest
import torch
from published_tasks import build, load
from tiny_tasks import (
    CHOICES,
    QUESTIONS,
    REVIEWS,
    answers,
    choices,
    llama,
    make_task,
    make_tokenizer,
    outputs_of,
)

from tests.helpers import LogTexts
from tests.published import CASES, write_files
from zods.tasks import SolvedExamples
from zods.tasks.chat import ChatTemplate
from zods.tasks.formats import FORMATS
from zods.tasks.sequences import Chat

pytestmark = pytest.mark.usefixtures("own_cache")

HELD_OUT = datasets.Dataset.from_dict({"text": ["great plot", "so dull"], "label": [1, 0]})


def prompts_of(rows):
    return [make_tokenizer("llama").decode(row["prompt"]) for row in rows]


def in_context(task, train, held_out, shots, seed=0):
    examples = SolvedExamples.draw(task, train, shots, seed)
    return examples, list(examples.before(held_out, task.prepare(held_out), "row"))


def test_each_prompt_follows_as_many_solved_examples_of_each_class_with_empty_lines_between():
    task = make_task("prompted", max_length=200)
    examples, rows = in_context(task, REVIEWS, HELD_OUT, 2)
    solved = [
        f"{text}\nIt was {('terrible', 'great')[label]}"
        for text, label in zip(REVIEWS["text"], REVIEWS["label"], strict=True)
    ]
    assert sorted(examples.texts) == sorted(solved)
    before = "".join(f"{text}\n\n" for text in examples.texts)
    asked = ["great plot\nIt was", "so dull\nIt was"]  # the last space belongs to the words
    assert prompts_of(rows) == [f"<s>{before}{prompt}" for prompt in asked]
    plain = task.prepare(HELD_OUT)
    assert [row["words"] for row in rows] == plain["words"][:]
    assert [row["answer"] for row in rows] == [1, 0]


def test_the_examples_and_their_order_follow_the_seed():
    task = make_task("prompted")
    data = REVIEWS.select([0, 1, 2, 3] * 10)
    drawn = [SolvedExamples.draw(task, data, 3, seed).texts for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [text.endswith("great") for text in drawn[0]].count(True) == 3


@pytest.mark.parametrize(
    ("max_length", "expected"), [(32, [2, 1]), (33, [2, 2]), (49, [4, 3]), (50, [4, 4])]
)
def test_a_prompt_that_is_too_long_loses_whole_examples_from_the_left_and_nothing_else(
    max_length, expected
):
    task = make_task("prompted", max_length=max_length)
    examples = SolvedExamples.draw(task, REVIEWS, 2, 0)
    plain = task.prepare(HELD_OUT)
    rows = list(examples.before(HELD_OUT, plain, "row"))
    kept = []
    for prompt, alone in zip(prompts_of(rows), prompts_of(plain), strict=True):
        before = prompt.removesuffix(alone.removeprefix("<s>")).removeprefix("<s>")
        texts = before.split("\n\n")[:-1]
        assert texts == list(examples.texts[len(examples.texts) - len(texts) :])
        kept.append(len(texts))
    assert all(len(row["prompt"]) + max(map(len, row["words"])) <= max_length for row in rows)
    assert kept == expected


def test_a_length_for_no_example_is_refused():
    task = make_task("prompted", max_length=16)
    with pytest.raises(ValueError, match=r"none of the 4 solved examples fits .*max_length is 16"):
        in_context(task, REVIEWS, HELD_OUT, 2)


def test_the_number_of_examples_that_fit_is_said():
    task = make_task("prompted", max_length=40)
    messages = LogTexts()
    in_context(task, REVIEWS, HELD_OUT, 2)
    assert (
        "of 4 solved examples before a prompt on average: more do not fit into max_length 40"
        in (messages.texts[-1])
    )


def test_candidates_of_rows_and_generated_answers_follow_solved_ones_too():
    _, rows = in_context(choices(), CHOICES.select([0]), CHOICES.select([2]), 1)
    assert prompts_of(rows) == ["<s>a fine movie\nIt was two three\n\ngreat fun\nIt was"]
    task = answers(max_new_tokens=5)
    _, rows = in_context(task, QUESTIONS.select([0]), QUESTIONS.select([1]), 1)
    inputs, targets = task.collate_eval(rows)
    text = make_tokenizer("llama").decode(inputs.input_ids[0])
    assert text == "<s>say one\none\n\nsay two and then say three\n"
    assert targets == {"references": [["two three"]]}
    assert task.measure(outputs_of(llama(), inputs), inputs, targets)["accuracy"][1] == 1


@pytest.mark.parametrize("name", ["sst2", "copa", "squad", "gsm8k"])
def test_declared_tasks_are_evaluated_in_context(name, tmp_path):
    data, _ = load(name, write_files(tmp_path, CASES[name].files))
    task = build(name, data)
    _, rows = in_context(task, data, data, 1)
    inputs, targets = task.collate_eval(rows)
    with torch.no_grad():
        measured = task.measure(outputs_of(llama(), inputs), inputs, targets)
    assert {"loss", "accuracy"} <= measured.keys()
    case = CASES[name]
    text = make_tokenizer("llama").decode(inputs.input_ids[0], skip_special_tokens=True)
    assert f"\n\n{case.prompt.rstrip()}" in text


def chat():
    tokenizer = make_tokenizer("llama")
    return Chat(tokenizer, 64, 0, ChatTemplate.of(tokenizer, None), FORMATS["messages"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_task("classification"), "a classification head reads no prompt"),
        (lambda: make_task("instruction"), "the responses of instruction data are not generated"),
        (chat, "a conversation, or a plain text, is no prompt with one right answer"),
    ],
)
def test_tasks_without_a_prompt_and_a_right_answer_are_refused_with_the_reason(make, message):
    with pytest.raises(ValueError, match=f"--icl: {message}"):
        SolvedExamples.draw(make(), REVIEWS, 1, 0)


def test_more_examples_than_a_class_has_are_refused():
    with pytest.raises(ValueError, match=r"--icl 3: fewer training examples .* great \(2\)"):
        SolvedExamples.draw(make_task("prompted"), REVIEWS, 3, 0)

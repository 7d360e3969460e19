"""Metrics of text answers and of counted predictions, compared with values worked out by hand."""

import pytest

from zods.data.answer_metrics import exact_match, last_number_match, token_f1
from zods.tasks.metrics import confusion_counts, with_derived


def derived(metric, answers, predictions):
    """The metric of all examples, and of the same ones in batches of two and three."""
    found = []
    for size in (len(answers), 2, 3):
        totals: dict[str, list[float]] = {}
        for start in range(0, len(answers), size):
            part = slice(start, start + size)
            counts = confusion_counts(metric, answers[part], predictions[part], 3)
            for name, pair in counts.items():
                sums = totals.setdefault(name, [0.0, 0.0])
                sums[:] = [a + b for a, b in zip(sums, pair, strict=True)]
        means = {name: total / count for name, (total, count) in totals.items()}
        found.append(with_derived({"loss": 1.0, **means}))
    assert found[1] == pytest.approx(found[0])
    assert found[2] == pytest.approx(found[0])
    return found[0]


@pytest.mark.parametrize(
    ("prediction", "references", "exact", "f1"),
    [
        ("The Eiffel Tower!", ["eiffel  tower"], 1, 1),
        ("a cat", ["dog", "Cat."], 1, 1),
        ("red car", ["red bicycle", "blue car"], 0, 0.5),
        ("one two three four", ["four"], 0, 0.4),
        ("x x y", ["x z"], 0, 0.4),
        ("", ["x"], 0, 0),
    ],
)
def test_exact_match_and_f1_ignore_case_articles_and_punctuation(prediction, references, exact, f1):
    assert exact_match(prediction, references) == exact
    assert token_f1(prediction, references) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("prediction", "reference", "match"),
    [
        ("3 + 4 = 7.", "#### 7", 1),
        ("it is $1,200.50", "#### 1200.5", 1),
        ("-3", "#### 3", 0),
        ("seven", "#### 7", 0),
        ("7 apples, then 8", "#### 7", 0),
        ("8 - 1 = 9-2 = 7\n#### 7 and 1 more", "#### 7", 1),
        ("5 = 8-3", "#### 3", 1),
    ],
)
def test_the_last_number_decides_whatever_its_notation(prediction, reference, match):
    assert last_number_match(prediction, [reference]) == match


def test_f1_and_matthews_follow_from_the_counts():
    answers, predictions = [1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0, 0, 0]
    # tp 2, fn 1, fp 1, tn 4
    assert derived("f1", answers, predictions) == {"loss": 1.0, "f1": pytest.approx(4 / 6)}
    assert derived("matthews", answers, predictions)["matthews"] == pytest.approx(7 / 15)
    assert derived("matthews", [1, 0], [1, 1])["matthews"] == 0
    assert derived("accuracy", answers, predictions) == {"loss": 1.0}


def test_macro_f1_is_the_mean_over_the_classes():
    macro = derived("f1_macro", [0, 0, 1, 2], [0, 1, 1, 1])["f1_macro"]
    assert macro == pytest.approx((2 / 3 + 2 / 4 + 0) / 3)


def test_a_class_that_is_only_predicted_counts_in_macro_f1():
    assert derived("f1_macro", [0, 0], [0, 2])["f1_macro"] == pytest.approx((2 / 3 + 0) / 2)

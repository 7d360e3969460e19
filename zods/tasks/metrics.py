"""Metrics of text answers, and metrics that follow from counts of predictions.

Callers: the tasks `Prompted`, `Options` and `Answers`, and the evaluations of `zods.finetune`.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

METRICS = ("accuracy", "f1", "f1_macro", "matthews")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"(?:(?<!\d)-)?\d[\d,]*(?:\.\d+)?")
_COUNTED = "@"  # between a metric's name and the two labels that a count is of


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and double spaces, as SQuAD's official script does.

    >>> normalise("The  Eiffel Tower!")
    'eiffel tower'
    """
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", kept).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 where the prediction equals a reference after `normalise`, else 0.0."""
    return float(normalise(prediction) in map(normalise, references))


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """The largest F1 of the words of a prediction and of a reference, after `normalise`.

    >>> token_f1("the red car", ["red bicycle", "a blue car"])
    0.5
    """
    found = normalise(prediction)
    return max((_f1_of_words(found, normalise(text)) for text in references), default=0.0)


def _f1_of_words(prediction: str, reference: str) -> float:
    found, wanted = prediction.split(), reference.split()
    if not found or not wanted:
        return float(found == wanted)
    return 2 * (Counter(found) & Counter(wanted)).total() / (len(found) + len(wanted))


def last_number_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 where the number of the prediction is that of a reference, as for GSM8K.

    The number is the first one after "####", or else the last one. A minus sign after a digit is
    an operator.

    >>> last_number_match("so 3 + 1,000 = 1,003.", ["#### 1003"])
    1.0
    """
    number = _last_number(prediction)
    return float(number is not None and number in map(_last_number, references))


def _last_number(text: str) -> float | None:
    _, marked, after = text.rpartition("####")
    found = _NUMBER.findall(after if marked else text)
    return float(found[0 if marked else -1].replace(",", "")) if found else None


def confusion_counts(
    metric: str, answers: Sequence[int], predictions: Sequence[int], num_labels: int
) -> dict[str, tuple[float, float]]:
    """Counts from which `with_derived` computes a metric, as {name: (sum, number of examples)}.

    They have the same names for every batch and on every rank: all pairs of labels.
    """
    if metric == "accuracy":
        return {}
    counts = Counter(zip(answers, predictions, strict=True))
    return {
        f"{metric}{_COUNTED}{answer},{predicted}": (float(counts[answer, predicted]), len(answers))
        for answer in range(num_labels)
        for predicted in range(num_labels)
    }


def with_derived(means: Mapping[str, float]) -> dict[str, float]:
    """Replace the shares of pairs (label, predicted label) by the metrics that follow from them."""
    metrics = {name: value for name, value in means.items() if _COUNTED not in name}
    shares: dict[str, dict[tuple[int, int], float]] = {}
    for name, value in means.items():
        metric, counted, pair = name.partition(_COUNTED)
        if counted:
            answer, predicted = map(int, pair.split(","))
            shares.setdefault(metric, {})[answer, predicted] = value
    return metrics | {metric: _DERIVED[metric](pairs) for metric, pairs in shares.items()}


def _f1_of_class(pairs: Mapping[tuple[int, int], float], label: int) -> float:
    right = pairs.get((label, label), 0.0)
    of_label = sum(share * ((i == label) + (j == label)) for (i, j), share in pairs.items())
    return 2 * right / of_label if of_label else 0.0


def _f1_macro(pairs: Mapping[tuple[int, int], float]) -> float:
    labels = {label for pair, share in pairs.items() if share for label in pair}
    return sum(_f1_of_class(pairs, label) for label in labels) / len(labels)


def _matthews(pairs: Mapping[tuple[int, int], float]) -> float:
    """The correlation coefficient of two labels, 0 where one of the variables is constant."""
    tp, fn, fp, tn = (pairs.get(pair, 0.0) for pair in ((1, 1), (1, 0), (0, 1), (0, 0)))
    square = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(square) if square else 0.0


_DERIVED: dict[str, Callable[[Mapping[tuple[int, int], float]], float]] = {
    "f1": lambda pairs: _f1_of_class(pairs, 1),
    "f1_macro": _f1_macro,
    "matthews": _matthews,
}

"""Metrics that follow from counts of predictions.

Callers: the tasks `Prompted` and `Options`, and the evaluations of `zods.finetune`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

METRICS = ("accuracy", "f1", "f1_macro", "matthews")
_COUNTED = "@"  # between a metric's name and the two labels that a count is of


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

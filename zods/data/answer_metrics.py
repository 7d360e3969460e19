"""Metrics of text answers.

Callers: the task `Answers`, the published data sets, and training on generated texts
(`zods.data.text_scores`).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"(?:(?<!\d)-)?\d[\d,]*(?:\.\d+)?")


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

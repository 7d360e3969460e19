"""Collect mistakes in the rows of a source, so that one error reports all of them."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 8  # a message lists at most this many mistakes, and row numbers per mistake


class Mistakes:
    """The mistakes in rows, with the numbers of the rows.

    For example ("dev.csv, line", "blank text in 'text'") has the numbers 4, 6 and 9.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], list[int]] = {}

    def add(self, row_name: str, number: int, what: str) -> None:
        """Add a mistake.

        row_name: the text before a row's number in messages, e.g. "dev.csv, line".
        """
        self._rows.setdefault((row_name, what), []).append(number)

    def check(self, remedy: str, problems: Sequence[str] = ()) -> None:
        """Raise ValueError with all mistakes and the remedy; return where there are none.

        Args:
            problems: mistakes of whole sources, which are reported before the rows.
        """
        if not self._rows:
            if problems:
                raise ValueError("; ".join(problems))
            return
        listed_mistakes = [
            f"{row_name} {listed(numbers)}: {what}"
            for (row_name, what), numbers in self._rows.items()
        ]
        more = sum(map(len, list(self._rows.values())[SHOWN:]))
        if more:
            listed_mistakes = [*listed_mistakes[:SHOWN], f"and {more} more rows with mistakes"]
        raise ValueError(f"{'; '.join([*problems, *listed_mistakes])}. {remedy}")


def listed(numbers: Sequence[int]) -> str:
    """List the first few numbers in ascending order, and count all where some are left out."""
    ordered = sorted(numbers)
    text = ", ".join(map(str, ordered[:SHOWN]))
    if len(ordered) == SHOWN + 1:
        return f"{text}, {ordered[-1]}"
    return (
        text
        if len(ordered) <= SHOWN
        else f"{text} and {len(ordered) - SHOWN} more ({len(ordered)} in all)"
    )

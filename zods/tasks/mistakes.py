"""Mistakes in the rows of a source, collected so that one error tells all of them."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 8  # row numbers of one mistake, and mistakes of different kinds, that a message lists


class Mistakes:
    """Row numbers by place and mistake: "dev.csv, line" has "blank text in 'text'" at 4, 6 and 9."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], list[int]] = {}

    def add(self, place: str, number: int, what: str) -> None:
        """place: what the number counts, with the source, e.g. "dev.csv, line"."""
        self._rows.setdefault((place, what), []).append(number)

    def check(self, remedy: str, problems: Sequence[str] = ()) -> None:
        """Raise ValueError with all mistakes and the remedy; return where there are none.

        Args:
            problems: what is wrong with whole sources, told before the rows.
        """
        if not self._rows:
            if problems:
                raise ValueError("; ".join(problems))
            return
        told = [
            f"{place} {listed(numbers)}: {what}" for (place, what), numbers in self._rows.items()
        ]
        more = sum(map(len, list(self._rows.values())[SHOWN:]))
        if more:
            told = [*told[:SHOWN], f"and {more} more rows with mistakes"]
        raise ValueError(f"{'; '.join([*problems, *told])}. {remedy}")


def listed(numbers: Sequence[int]) -> str:
    """The first few numbers in ascending order, and how many there are where some are left out."""
    ordered = sorted(numbers)
    text = ", ".join(map(str, ordered[:SHOWN]))
    if len(ordered) == SHOWN + 1:
        return f"{text}, {ordered[-1]}"
    return (
        text
        if len(ordered) <= SHOWN
        else f"{text} and {len(ordered) - SHOWN} more ({len(ordered)} in all)"
    )

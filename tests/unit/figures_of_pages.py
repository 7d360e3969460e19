"""The figures on a page, and the files that they come from.

A figure is a number with a decimal point or before a unit of measurement, and every number in a
table's column "figure". Numbers in code, headings and links' addresses are none, nor are those that
are written as words. A figure agrees with a source that has a number which rounds to it.

The sources of a paragraph, an item of a list or a row of a table, its *block*:

- Files `benchmarks/results/NAME.md` that it names in backticks: all of its figures may be in them. A row, and an
  item of a list, also has the sources of the paragraph before the table or the list.
- A comment behind the figures, for those between it and the comment before it in the block:
  `<!-- results/NAME.md -->`, or any other text file of the repository;
  `<!-- results/NAME.md: TEXT; TEXT -->`: its lines with one of these texts.
  `<!-- results/NAME.json: KEY=VALUE; ...; NAME; ... -->`: the entries NAME of those of the file's "rows" that
  have VALUE as KEY, or of the file itself where it has no rows. An entry may be a path, `curve/-1/loss`;
  `mean` before it takes the mean over the rows (also `median`, `min`, `max`); ` * 100` or ` / 60` behind it converts
  the unit.
- `<!-- elsewhere: WHERE -->`: what was not measured here, such as a figure of a publication or a limit of another
  program. Nothing checks these.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).parents[2]
NUMBER = r"(?<![\w.,/])(?<![A-Za-z]-)\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?![\w/]|[.,]\d)"
UNITS = r"(?:bytes?|[kMGT]i?B|ms|s|seconds?|minutes?|hours?|times|%|Mbit/s|GB/s)(?!\w)"
COMMENT = r"<!-- ((?:results|tests|zods|launch)/\S+?|elsewhere)(?:: (.+?))? -->"
NAMED = r"`(benchmarks/results/[\w.-]+\.md)`"
VERSION = r"\b(?:Python|torch|PyTorch|transformers|trl|DeepSpeed|version|versions|MPI|Debian) \d+(?:\.\d+)*"
OVER_ROWS: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": statistics.mean,
    "median": statistics.median,
    "min": min,
    "max": max,
}


class Block(NamedTuple):
    """A part of a page that has sources of its own. figures: its cell of the column "figure"."""

    text: str
    named: tuple[str, ...]  # files that it, or the paragraph before, names
    figures: str | None = None


def unsourced(page: str) -> list[str]:
    """The figures of a page that have no source, or do not agree with it."""
    found = []
    for block in blocks(page):
        named = [number for file in block.named for number in _numbers_of(file)]
        for text, source, query in _segments(block.figures or block.text):
            if source == "elsewhere":
                continue
            values = [*named, *(_values(source, query) if source else [])]
            for figure in _figures(text, every=block.figures is not None):
                if not any(agree(figure, value) for value in values):
                    found.append(f"{figure}: {' '.join(text.split())}")
    return found


def blocks(page: str) -> Iterator[Block]:
    page = re.sub(r"^```.*?^```|^    .*?$|^#.*?$", "", page, flags=re.MULTILINE | re.DOTALL)
    before: tuple[str, ...] = ()  # files that the last paragraph named
    column: int | None = None
    for part in re.split(r"\n\s*\n", page):
        if part.lstrip().startswith("|"):
            rows = [row.strip().strip("|").split(" | ") for row in part.strip().splitlines()]
            head = [cell.strip() for cell in rows[0]]
            column = head.index("figure") if "figure" in head else None
            for row in rows[2:]:
                text = " | ".join(row)
                yield Block(text, (*before, *_named(text)), None if column is None else row[column])
        else:
            pieces = re.split(r"^\s*(?:[-*]|\d+\.) ", part, flags=re.MULTILINE)
            if is_paragraph := bool(pieces[0].strip()):
                before = _named(pieces[0])
            for text in pieces[0 if is_paragraph else 1 :]:
                yield Block(text, (*before, *_named(text)))


def agree(figure: str, value: float) -> bool:
    """Whether a value rounds to a figure as it is written."""
    plain = figure.replace(",", "")
    if "e" in plain:
        return float(plain) == value
    half = 0.5 * 10.0 ** -len(plain.partition(".")[2])
    return abs(float(plain) - value) <= half * (1 + 1e-9)


def _named(text: str) -> tuple[str, ...]:
    return tuple(re.findall(NAMED, text))


def _segments(text: str) -> Iterator[tuple[str, str, str]]:
    """(text, source, query) before each comment, then the rest of a block without one."""
    parts = re.split(COMMENT, text)
    yield from zip(parts[0:-1:3], parts[1::3], (query or "" for query in parts[2::3]), strict=True)
    yield parts[-1], "", ""


def _figures(text: str, every: bool) -> Iterator[str]:
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|arXiv:\S+|<!--.*?-->", " ", text, flags=re.DOTALL)
    text = re.sub(VERSION, "", text)
    for match in re.finditer(NUMBER, text):
        measured = "." in match[0] or re.match(rf"[ \n]*{UNITS}", text[match.end() :])
        if every or measured:
            yield match[0]


def _numbers_of(file: str, texts: Sequence[str] = ("",)) -> list[float]:
    """The numbers in the lines of a file that have one of the texts."""
    lines = (REPOSITORY / file).read_text(encoding="utf-8").splitlines()
    chosen = "\n".join(line for line in lines if any(text in line for text in texts))
    numbers = re.findall(NUMBER, chosen.replace("_", ""))  # 1_000 is a number of Python
    return [float(number.replace(",", "")) for number in numbers]


def _values(source: str, query: str) -> list[float]:
    file = f"benchmarks/{source}" if source.startswith("results/") else source
    terms = [term.strip() for term in query.split(";")]
    if not file.endswith(".json"):
        return _numbers_of(file, terms)
    data = json.loads((REPOSITORY / file).read_text(encoding="utf-8"))
    wanted = dict(term.split("=", 1) for term in terms if "=" in term)
    rows = [
        row
        for row in data.get("rows", [data])
        if all(str(row.get(key)) == value for key, value in wanted.items())
    ]
    values = [value for term in terms if "=" not in term for value in _entries(rows, term)]
    assert values, f"{source}: {query} selects nothing"
    return values


def _entries(rows: Sequence[dict[str, Any]], term: str) -> list[float]:
    parsed = re.fullmatch(r"(?:(mean|median|min|max) )?(.+?)(?: ([*/]) ([\d.e]+))?", term)
    assert parsed, term
    over, path, operation, number = parsed.groups()
    factor = 1.0 if operation is None else float(number) ** (1 if operation == "*" else -1)
    values = [float(_entry(row, path)) * factor for row in rows]
    return values if over is None else [OVER_ROWS[over](values)]


def _entry(data: Any, path: str) -> Any:
    for key in path.split("/"):
        data = data[int(key)] if isinstance(data, list) else data[key]
    return data

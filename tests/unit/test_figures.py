"""Every figure of README.md and docs/ has a source, and agrees with it."""

from __future__ import annotations

import pytest

from tests.unit.figures_of_pages import REPOSITORY, unsourced

# configuration.md is made from the code
PAGES = [
    REPOSITORY / "README.md",
    *(page for page in sorted((REPOSITORY / "docs").glob("*.md")) if page.stem != "configuration"),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_figures_agree_with_the_files_that_the_page_names(page):
    assert unsourced(page.read_text(encoding="utf-8")) == []


OF_JSON = "<!-- results/quickstart_2026-11-29.json: seed=1; accuracy_before; accuracy_after -->"


@pytest.mark.parametrize(
    ("text", "without_source"),
    [
        ("It took 2.34 of it.", ["2.34"]),
        ("It took 3 minutes, on 2 ranks.", ["3"]),
        ("It took 2.34 (`benchmarks/results/step_time_2026-11-24.md`).", []),
        ("It took 2.33 (`benchmarks/results/step_time_2026-11-24.md`).", ["2.33"]),
        ("See `benchmarks/results/step_time_2026-11-24.md`:\n\n- It took 2.33.", ["2.33"]),
        (f"From 0.24 to 0.97 {OF_JSON}", []),
        (f"From 0.24 to 0.98 {OF_JSON}", ["0.98"]),
        (f"From 0.24 to 0.97 {OF_JSON}, and 0.97 elsewhere.", ["0.97"]),
        (f"| what | figure |\n|---|---|\n| seed 1 | 0.24 -> 0.97, 4 {OF_JSON} |", ["4"]),
        ("It is 173 s <!-- results/trajectory_2026-11-25.md: mezo, 16 directions -->", []),
        ("It is 95 s <!-- results/trajectory_2026-11-25.md: mezo, 16 directions -->", ["95"]),
        ("The authors report 3.0 <!-- elsewhere: their table 1 -->", []),
        ("`--lr 0.1` with Python 3.11, DeepSpeed 0.19.8 and arXiv:2305.17333.", []),
    ],
)
def test_a_figure_without_a_source_or_unlike_it_is_found(text: str, without_source: list[str]):
    assert [found.partition(":")[0] for found in unsourced(text)] == without_source


def test_a_query_that_selects_nothing_is_an_error():
    with pytest.raises(AssertionError, match="selects nothing"):
        unsourced("1.5 <!-- results/quickstart_2026-11-29.json: seed=99; accuracy_after -->")

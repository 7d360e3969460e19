"""Compose the web page of a report: one file, which loads nothing. Caller: the command.

All texts from files are escaped, and the page's policy forbids scripts and the network.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

from zods.report.panels import COLORS, draw, panels, run_label
from zods.report.runs import Run
from zods.report.tables import Row, differing, figures, settings

HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
"""
CSS = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 1240px;
       padding: 0 1rem; color: #222; background: #fff }
h1 { font-size: 1.35rem } h2 { font-size: 1.05rem; margin: 1.6rem 0 .5rem }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(480px, 1fr)); gap: 10px }
.panels img { width: 100%; border: 1px solid #e4e4e4; border-radius: 4px }
.wide { overflow-x: auto }
table { border-collapse: collapse }
th, td { text-align: left; vertical-align: top; padding: 3px 14px 3px 0;
         border-bottom: 1px solid #e9e9e9; overflow-wrap: anywhere; max-width: 34rem }
th { font-weight: 600 } tbody th { font-weight: 400; color: #555; white-space: nowrap }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px }
summary { cursor: pointer; margin: 1.6rem 0 .5rem; font-weight: 600 }
"""
NOTE = (
    "A line is a mean of 20 steps or more. The area behind it reaches from the smallest value to the "
    "largest. Held-out metrics and refreshes are not averaged."
)


def page(runs: Sequence[Run], refresh: float | None = None) -> str:
    """The report of some runs as HTML.

    refresh: seconds after which a browser loads the page again; None for a page that stays as it
    is.
    """
    names = ", ".join(run.name for run in runs)
    rows = settings(runs)
    parts = [HEAD]
    if refresh is not None:
        parts.append(f'<meta http-equiv="refresh" content="{refresh:g}">\n')
    parts.append(
        f"<title>{escape(names)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f"<h1>{escape(names) if len(runs) == 1 else f'{len(runs)} runs'}</h1>\n"
    )
    parts += ["<h2>Figures</h2>\n", _table(runs, figures(runs))]
    others = differing(rows)
    if len(runs) > 1 and others:
        parts += ["<h2>Settings that differ</h2>\n", _table(runs, others)]
    parts.append('<h2>Over the steps</h2>\n<div class="panels">\n')
    for panel in panels(runs):
        image = base64.b64encode(draw(panel, "svg")).decode()
        parts.append(f'<img src="data:image/svg+xml;base64,{image}" alt="{escape(panel.title)}">\n')
    parts.append(f"</div>\n<p>{NOTE}</p>\n<details><summary>All settings</summary>\n")
    parts += [_table(runs, rows), "</details>\n</body>\n</html>\n"]
    return "".join(parts)


def _table(runs: Sequence[Run], rows: Iterable[Row]) -> str:
    head = "".join(
        f'<th><span class="swatch" style="background: {COLORS[number % len(COLORS)]}"></span> '
        f"{run_label(number)}: {escape(run.name)}</th>"
        for number, run in enumerate(runs)
    )
    body = "".join(
        f"<tr><th>{escape(name)}</th>"
        + "".join(f"<td>{escape(text)}</td>" for text in texts)
        + "</tr>\n"
        for name, texts in rows
    )
    above = f"<thead><tr><th></th>{head}</tr></thead>" if len(runs) > 1 else ""
    return f'<div class="wide"><table>{above}<tbody>\n{body}</tbody></table></div>\n'

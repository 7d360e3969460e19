"""Write docs/configuration.md between its markers: `python launch/reference.py`.

The tables of keys are made from the models of `zods.config`: type and bounds from the
declarations, the text from the comment above a key or behind it, or else from the docstring of its
section. The tables of options are those of `zods.cli.options`. With `--check` nothing is written;
exit status 1 if the tables are not those of the code.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from zods.cli.arguments import option_parser
from zods.cli.options import GROUPS
from zods.config.schema import SVRG_ONLY, ZerothOrderConfig
from zods.config.section import SECTION

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
BEGIN, END = "<!-- {}: begin -->", "<!-- {}: end -->"
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
TYPES = {"float": "number", "int": "whole number", "bool": "true, false", "str": "text"}


def comments(section: type[BaseModel]) -> dict[str, str]:
    """{key: its comment} of a section: the lines above the declaration, or the one behind it."""
    found: dict[str, str] = {}
    above: list[str] = []
    for line in inspect.getsource(section).splitlines():
        if line.strip().startswith("# "):
            above.append(line.strip()[2:])
            continue
        if declared := re.match(r"    (\w+): ", line):
            behind = re.search(r"  # (.+)$", line)
            found[declared[1]] = behind[1] if behind else " ".join(above)
        above = []
    return found


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a key holds, or None where it holds a value."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)


def allowed(field: FieldInfo) -> str:
    """The values that a key may have."""
    bounds = [
        f"{sign} {getattr(entry, name)}"
        for entry in field.metadata
        for name, sign in BOUNDS.items()
        if getattr(entry, name, None) is not None
    ]
    return ", ".join([*_kinds(field.annotation), *bounds])


def _kinds(annotation: Any) -> Iterator[str]:
    origin = get_origin(annotation)
    if origin is Literal:
        yield from (f"`{json.dumps(value)}`" for value in get_args(annotation))
    elif origin in (Union, types.UnionType):
        for kind in get_args(annotation):
            yield from _kinds(kind)
    elif annotation is type(None):
        yield "`null`"
    elif origin is dict:
        yield "section"
    elif hasattr(annotation, "__metadata__"):  # Annotated
        yield from _kinds(annotation.__origin__)
    elif issubclass(annotation, BaseModel):
        yield "section"
    else:
        yield TYPES[annotation.__name__]


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default()
    return "its defaults" if isinstance(value, BaseModel) else f"`{json.dumps(value)}`"


def keys(section: type[BaseModel], path: str) -> Iterator[str]:
    """The lines of a section's table, then those of the sections in it."""
    yield from (f"## `{path}`", "")
    yield from (_cell(inspect.cleandoc(section.__doc__ or "")), "")
    yield from ("| key | values | default | what |", "|---|---|---|---|")
    texts = comments(section)
    for name, field in section.model_fields.items():
        inner = section_of(field)
        see = "" if inner is None else f"see [`{path}.{name}`](#{path.replace('.', '')}{name})"
        text = "; ".join(filter(None, (_cell(texts[name]), see))) or "see above"
        svrg = " *(mezo_svrg)*" if section is ZerothOrderConfig and name in SVRG_ONLY else ""
        yield f"| `{name}`{svrg} | {allowed(field)} | {default(field)} | {text} |"
    for name, field in section.model_fields.items():
        if (inner := section_of(field)) is not None:
            yield ""
            yield from keys(inner, f"{path}.{name}")


def options() -> Iterator[str]:
    """The lines of the tables of options, one table for each group of the help."""
    actions = {action.dest: action for action in option_parser()._actions}
    for group in GROUPS:
        name = group._argument_group_name
        yield from (f"### {name[0].upper()}{name[1:]}", "")
        yield from ("| option | value | what |", "|---|---|---|")
        for option in dataclasses.fields(group):
            action = actions[option.name]
            text = (action.help or "") % {"default": action.default}
            value = "" if action.const is True else _value(action)
            yield f"| `--{option.name}` | {value} | {_cell(text)} |"
        yield ""


def _value(action: Any) -> str:
    if action.choices:
        return ", ".join(f"`{choice}`" for choice in action.choices)
    return f"`{action.metavar}`".replace("|", "\\|") if action.metavar else ""


def _cell(text: str) -> str:
    """A text as a cell of a table: one line, without characters that Markdown would take."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def with_tables(page: str) -> str:
    for name, lines in (("keys", keys(ZerothOrderConfig, SECTION)), ("options", options())):
        begin, end = BEGIN.format(name), END.format(name)
        before, rest = page.split(begin)
        made = "\n".join(lines).strip()
        page = f"{before}{begin}\n{made}\n{end}{rest.split(end)[1]}"
    return page


def main() -> int:
    page = PAGE.read_text(encoding="utf-8")
    made = with_tables(page)
    if "--check" in sys.argv[1:]:
        return int(made != page)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Report mistakes in a configuration, one line each: the key, what was found, what is allowed.

`read_model` reads a section with pydantic and turns pydantic's errors into such lines.
`zods.config.schema` and the other modules of the configuration use it. They raise all mistakes of a
file at once (`Mistakes`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

M = TypeVar("M", bound=BaseModel)
AUTO = '"auto" is not resolved for this key; give a value or leave it out for the default.'
# {type of an entry of a ValidationError: the type that was expected}
_EXPECTED = {
    "int_type": "int",
    "float_type": "float",
    "bool_type": "bool",
    "string_type": "str",
    "literal_error": "str",
}


class Mistakes(ValueError):
    """All mistakes of a configuration, as one error. messages: one line for each mistake."""

    def __init__(self, messages: list[str]) -> None:
        self.messages = tuple(messages)
        several = f"{len(messages)} mistakes in the configuration:"
        super().__init__(messages[0] if len(messages) == 1 else "\n  ".join([several, *messages]))


@contextmanager
def collected(found: list[str]) -> Iterator[None]:
    """Catch a ValueError that the block raises, and append its messages to `found`."""
    try:
        yield
    except ValueError as error:
        found += error.messages if isinstance(error, Mistakes) else [str(error)]


def nearest(key: str, allowed: Sequence[str]) -> str:
    """A hint with the allowed key that is most similar to `key`, or an empty text."""
    close = difflib.get_close_matches(key, allowed, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def read_model(model: type[M], values: Any, path: str, found: list[str]) -> M | None:
    """Read a section; a refused value is replaced by its default.

    Returns None where the section cannot be made even so. values: the section as it was written.
    path: its key. Mistakes are appended to `found`: first the mistakes of single keys, in the order
    of the file, then the mistakes between keys.
    """
    written = dict(values) if isinstance(values, Mapping) else values
    accepted = written
    while True:
        try:
            return model.model_validate(accepted)
        except ValidationError as error:
            entries = error.errors(include_url=False)
        mistakes = [_Mistake(model, accepted, entry) for entry in entries]
        if accepted is written:  # errors of later passes only follow from removed values
            mistakes.sort(key=lambda mistake: mistake.position)
            found += [mistake.line(path) for mistake in mistakes]
        for mistake in mistakes:
            accepted = _without(accepted, mistake.refused)
        if accepted is None:
            return None


class _Mistake:
    """One entry of the ValidationError that `model` raised for `values`.

    position: the sort key by which `read_model` orders the mistakes of a section. refused: the path
    of keys to the value that has to be removed; empty where the whole section is removed.
    """

    def __init__(self, model: type[BaseModel], values: Any, entry: Mapping[str, Any]) -> None:
        self._entry = entry
        self._keys: list[str] = []  # shorter than `loc` where a text stands for a section
        position = []
        for key in entry["loc"]:
            if not isinstance(values, Mapping):
                break
            position.append(list(values).index(key) if key in values else len(values))
            self._keys.append(key)
            values = values.get(key)
        between_keys = entry["type"] == "value_error" and entry["input"] != "auto"
        self.position = (between_keys, *position)
        self._fields = list(_fields_along(model, entry["loc"]))
        self._section = (_section_of(self._fields[-1]) if self._fields else None) or model
        if entry["type"] == "missing":
            self.refused = self._keys[:-1]
        elif entry["type"] == "extra_forbidden":
            self.refused = self._keys
        else:  # the whole field, where the mistake is in one of its items
            self.refused = self._keys[: len(self._fields)]

    def line(self, path: str) -> str:
        kind, value = self._entry["type"], self._entry["input"]
        here = ".".join([*([path] if path else []), *map(str, self._keys)])
        if kind == "missing":
            return f"{here}: missing. Give a value."
        if kind == "extra_forbidden":
            replacement = getattr(self._section, "replaced", {}).get(self._keys[-1])
            if replacement is not None:
                return f"{here}: a key of earlier versions. {replacement}"
            known = sorted(self._section.model_fields)
            hint = nearest(self._keys[-1], known)
            return f"{here}: unknown key.{hint} Allowed keys are {', '.join(known)}."
        if kind == "model_type":
            return f"{here}: found {value!r}, expected a section {{...}}."
        if kind in ("dict_type", "too_short"):
            return f"{here}: found {value!r}, expected {self._fields[-1].description}."
        if value == "auto":
            return f"{here}: {AUTO}"
        if kind == "value_error":
            error = self._entry["ctx"]["error"]
            of_field = bool(self._fields) and _section_of(self._fields[-1]) is None
            return f"{here}: {error}" if of_field else f"{here}.{error}"  # which names the key
        return f"{here}: {self._found(kind, value)}"

    def _found(self, kind: str, value: Any) -> str:
        """Describe the mistake in the value of a field."""
        if kind == "literal_error" and isinstance(value, str):
            allowed = get_args(self._fields[-1].annotation)
            hint = nearest(value, allowed)
            return f"found {value!r}, allowed are {', '.join(allowed)}.{hint}"
        if kind == "float_type" and type(value) is int:
            return f"found a number of {len(str(value))} digits, expected float."
        if kind in _EXPECTED:
            return f"found {value!r} ({type(value).__name__}), expected {_EXPECTED[kind]}."
        if kind == "finite_number":
            return f"found {value!r}, expected a finite number."
        for name, bound in self._entry.get("ctx", {}).items():
            number = f"found {type(bound)(value)!r}"
            if name == "gt":
                return f"{number}, must be above {bound}."
            if name == "ge":
                return f"{number}, must be {bound} or more."
            if name == "le":
                return f"{number}, must be {bound} or less."
            if name == "lt":
                # Only the seed has such a bound.
                return f"{number}, must be below 2**{bound.bit_length() - 1}."
        return f"found {value!r}. {self._entry['msg']}."  # e.g. a text that is not valid Unicode


def _fields_along(model: type[BaseModel], loc: Sequence[Any]) -> Iterator[FieldInfo]:
    """Yield the fields on the path `loc`, up to an unknown key or a value that is no section."""
    section: type[BaseModel] | None = model
    for key in loc:
        if section is None or key not in section.model_fields:
            return
        field = section.model_fields[key]
        yield field
        section = _section_of(field)


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The model of the section that a field holds, if it holds one."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _without(values: Any, keys: Sequence[str]) -> dict[str, Any] | None:
    """`values` without the value at `keys`; None where no key is given."""
    if values is None or not keys:
        return None
    first, *rest = keys
    if first not in values:  # an earlier mistake removed the whole section
        return values
    if rest:
        return {**values, first: _without(values[first], rest)}
    return {key: value for key, value in values.items() if key != first}

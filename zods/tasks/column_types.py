"""Find the types of columns, which hold for every row of a file, before any row is converted."""

from __future__ import annotations

import json
import re
from typing import Any

import pyarrow as pa

TEXT, INTEGER, FLOAT, BOOLEAN, NULL = pa.string(), pa.int64(), pa.float64(), pa.bool_(), pa.null()

# "007" and "+1" do not match: the number would not give back the text
_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"-?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_BOOLEANS = {
    "True": True,
    "TRUE": True,
    "true": True,
    "False": False,
    "FALSE": False,
    "false": False,
}


def type_of_cell(text: str, so_far: pa.DataType) -> pa.DataType:
    """The type of a CSV column after one more cell.

    A blank cell fits every type. A column of blank cells only is text.
    """
    if so_far == TEXT or not (text := text.strip()):
        return so_far
    if text in _BOOLEANS:
        found = BOOLEAN
    elif _INTEGER.fullmatch(text):
        # Python converts no text of more than 4300 digits
        found = INTEGER if len(text) < 21 and -(2**63) <= int(text) < 2**63 else TEXT
    elif _FLOAT.fullmatch(text):
        found = FLOAT
    else:
        found = TEXT
    return merged(so_far, found)


def cell_value(text: str, dtype: pa.DataType) -> Any:
    """Convert a CSV cell to a value of its column's type.

    Returns None for a blank cell of a column that is not text.
    """
    if dtype == TEXT:
        return text
    text = text.strip()
    if not text:
        return None
    if dtype == BOOLEAN:
        return _BOOLEANS[text]
    return int(text) if dtype == INTEGER else float(text)


def type_of_value(value: Any) -> pa.DataType:
    """The type of a JSON value."""
    if value is None:
        return NULL
    if isinstance(value, bool):
        return BOOLEAN
    if isinstance(value, int):
        return INTEGER if -(2**63) <= value < 2**63 else TEXT
    if isinstance(value, float):
        return FLOAT
    if isinstance(value, list):
        of_items = NULL
        for item in value:
            of_items = merged(of_items, type_of_value(item))
        return pa.list_(of_items)
    if isinstance(value, dict):
        return pa.struct([pa.field(key, type_of_value(item)) for key, item in value.items()])
    return TEXT


def merged(first: pa.DataType, second: pa.DataType) -> pa.DataType:
    """The narrowest type that holds the values of both; text where they have nothing in common."""
    if first == second or second == NULL:
        return first
    if first == NULL:
        return second
    if {first, second} == {INTEGER, FLOAT}:
        return FLOAT
    if pa.types.is_list(first) and pa.types.is_list(second):
        return pa.list_(merged(first.value_type, second.value_type))
    if pa.types.is_struct(first) and pa.types.is_struct(second):
        fields = {field.name: field.type for field in first}
        for field in second:
            fields[field.name] = merged(fields.get(field.name, NULL), field.type)
        return pa.struct(list(fields.items()))
    return TEXT


def without_null(dtype: pa.DataType) -> pa.DataType:
    """The type with text for the parts that have no value in any row."""
    if dtype == NULL:
        return TEXT
    if pa.types.is_list(dtype):
        return pa.list_(without_null(dtype.value_type))
    if pa.types.is_struct(dtype):
        return pa.struct([pa.field(field.name, without_null(field.type)) for field in dtype])
    return dtype


def json_value(value: Any, dtype: pa.DataType) -> Any:
    """Convert a JSON value to its column's type.

    In a text column, numbers, lists and objects become their JSON text.
    """
    if value is None or (isinstance(value, str) and dtype == TEXT):
        return value
    if dtype == TEXT:
        return json.dumps(value, ensure_ascii=False)
    if pa.types.is_list(dtype):
        return [json_value(item, dtype.value_type) for item in value]
    if pa.types.is_struct(dtype):
        return {field.name: json_value(value.get(field.name), field.type) for field in dtype}
    return float(value) if dtype == FLOAT else value


def becomes_text(value: Any, dtype: pa.DataType) -> bool:
    """Whether `json_value` turns the JSON value, or a part of it, from no text into its text."""
    if value is None:
        return False
    if pa.types.is_list(dtype):
        return any(becomes_text(item, dtype.value_type) for item in value)
    if pa.types.is_struct(dtype):
        return any(becomes_text(value.get(field.name), field.type) for field in dtype)
    return dtype == TEXT and not isinstance(value, str)

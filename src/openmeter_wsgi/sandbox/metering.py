"""Meters: which definitions OpenMeter accepts, and what they read in an event."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from openmeter_wsgi.sandbox.problems import Problem
from openmeter_wsgi.sandbox.schema import KEY, Schema

AGGREGATIONS = ("SUM", "COUNT", "UNIQUE_COUNT", "AVG", "MIN", "MAX", "LATEST")
METER: Schema = {
    "type": "object",
    "required": ["slug", "aggregation", "eventType"],
    "properties": {
        "slug": {"type": "string", "minLength": 1, "maxLength": 64, "pattern": KEY},
        "name": {"type": "string", "minLength": 1, "maxLength": 256},
        "description": {"type": "string", "maxLength": 1024},
        "aggregation": {"type": "string", "enum": list(AGGREGATIONS)},
        "eventType": {"type": "string", "minLength": 1},
        "eventFrom": {"type": "string", "format": "date-time"},
        "valueProperty": {"type": "string", "minLength": 1},
        "groupBy": {"type": "object", "additionalProperties": {"type": "string"}},
        "metadata": {
            "type": "object",
            "nullable": True,
            "additionalProperties": {"type": "string"},
        },
    },
}

_STEP = re.compile(
    r"""\.(?P<name>[\w-]+)|\['(?P<quoted>[^'"\\]+)'\]|\[(?P<index>\d+)\]"""
)


class Path:
    """A JSONPath of names and indexes: ``$.usage.tokens``, ``$.items[0]``."""

    def __init__(self, text: str) -> None:
        self._steps: list[str | int] = []
        position = 1 if text.startswith("$") else len(text) + 1
        while position < len(text):
            step = _STEP.match(text, position)
            if step is None:
                break
            name = step["name"] or step["quoted"]
            self._steps.append(name if name is not None else int(step["index"]))
            position = step.end()
        if position != len(text) or not self._steps:
            raise ValueError(f"the sandbox cannot read the JSON path {text}")

    @property
    def sqlite(self) -> str:
        """The same path for SQLite's JSON functions."""
        return "$" + "".join(
            f"[{step}]" if isinstance(step, int) else f'."{step}"'
            for step in self._steps
        )

    def find(self, document: Any) -> Any:
        """Return what lies at the path; LookupError where nothing does."""
        for step in self._steps:
            document = _children(document, step)[step]
        return document


def _children(document: Any, step: str | int) -> Any:
    if isinstance(document, list if isinstance(step, int) else dict):
        return document
    raise LookupError(step)


def to_float(text: str) -> float:
    """Return *text* as Go's ``strconv.ParseFloat`` does, or raise ValueError."""
    if "_" in text or not text.isascii() or text != text.strip():
        raise ValueError(f"could not convert string to float: {text!r}")
    return float(text)


def check_meter(meter: dict[str, Any]) -> None:
    """Refuse a definition that fits the schema and still makes no sense."""
    try:
        _check_value_property(meter)
        for key, path in meter.get("groupBy", {}).items():
            _check_group_by(key, path, meter.get("valueProperty"))
    except ValueError as error:
        raise Problem(400, f"validation error: {error}") from None


def _check_value_property(meter: dict[str, Any]) -> None:
    path = meter.get("valueProperty")
    what = "meter value property"
    if meter["aggregation"] == "COUNT":
        if path is not None:
            raise ValueError(f"{what} is not allowed when the aggregation is count")
    elif path is None:
        raise ValueError(f"{what} is required when the aggregation is not count")
    elif not path.startswith("$"):
        raise ValueError(f"{what} must start with $")
    else:
        Path(path)


def _check_group_by(key: str, path: str, value_property: str | None) -> None:
    if not path.startswith("$"):
        raise ValueError(f"meter group by value must start with $ for key {key}")
    if not re.fullmatch("[a-zA-Z_][0-9a-zA-Z_]*", key):
        raise ValueError(
            f"meter group by key {key} is invalid,"
            " only alphanumeric and underscore characters are allowed"
        )
    if path == value_property:
        raise ValueError(
            f"meter group by value {key} cannot be the same as value property"
        )
    Path(path)


def flaw_of(meter: dict[str, Any], data: str | None) -> str | None:
    """Return why *meter* cannot use an event with *data*, in OpenMeter's words."""
    if meter["aggregation"] == "COUNT":
        return None
    if data is None:
        return "invalid event: null and missing value property"
    path = meter["valueProperty"]
    try:
        value = Path(path).find(json.loads(data))
    except LookupError:
        return f'invalid event: missing value property: "{path}"'
    if value is None:
        return "invalid event: value cannot be null"
    if meter["aggregation"] == "UNIQUE_COUNT":
        return None
    return _flaw_of_number(value)


def _flaw_of_number(value: Any) -> str | None:
    if isinstance(value, bool | list | dict):
        name = {bool: "bool", list: "[]interface {}", dict: "map[string]interface {}"}
        return f"invalid event: unsupported value property type: {name[type(value)]}"
    try:
        number = to_float(str(value))
    except ValueError:
        return f"invalid event: value cannot be parsed as float64: {value}"
    if math.isnan(number):
        return "invalid event: value cannot be NaN"
    return "invalid event: value cannot be infinity" if math.isinf(number) else None

"""The part of OpenAPI schemas that OpenMeter's requests need.

The texts are those of kin-openapi, the validator in front of OpenMeter, so that a
client sees here what it will see there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flask import json

if TYPE_CHECKING:
    from collections.abc import Callable

Schema = dict[str, Any]

#: The zone is optional here although RFC 3339 requires it; the next layer does too.
DATE_TIME = (
    r"^[0-9]{4}-(0[1-9]|10|11|12)-(0[1-9]|[12][0-9]|3[01])"
    r"T([0-1][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]+)?"
    r"(Z|(\+|-)[0-9]{2}:[0-9]{2})?$"
)
KEY = "^[a-z0-9]+(?:_[a-z0-9]+)*$"


@dataclass(frozen=True, slots=True)
class Flaw:
    """The first thing in a document that its schema does not allow."""

    pointer: str
    rule: str
    reason: str

    def __str__(self) -> str:
        return (
            f'Error at "{self.pointer}": {self.reason}' if self.pointer else self.reason
        )


def check(schema: Schema, value: Any, pointer: str = "") -> Flaw | None:
    """Return the first flaw of *value*, or None."""
    if value is None:
        if schema.get("nullable"):
            return None
        return Flaw(pointer, "nullable", "Value is not nullable")
    if (allowed := schema.get("enum")) and value not in allowed:
        reason = f"value is not one of the allowed values {_compact(allowed)}"
        return Flaw(pointer, "enum", reason)
    if "type" not in schema:
        return None
    return _TYPES[schema["type"]](schema, value, pointer)


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _string(schema: Schema, value: Any, pointer: str) -> Flaw | None:
    if not isinstance(value, str):
        return Flaw(pointer, "type", "value must be a string")
    if len(value) < (least := schema.get("minLength", 0)):
        return Flaw(pointer, "min_length", f"minimum string length is {least}")
    if len(value) > (most := schema.get("maxLength", len(value))):
        return Flaw(pointer, "max_length", f"maximum string length is {most}")
    if (pattern := schema.get("pattern")) and not matches(pattern, value):
        reason = f'string doesn\'t match the regular expression "{pattern}"'
        return Flaw(pointer, "pattern", reason)
    if schema.get("format") == "date-time" and not matches(DATE_TIME, value):
        reason = (
            'string doesn\'t match the format "date-time": '
            f'string doesn\'t match pattern "{DATE_TIME}"'
        )
        return Flaw(pointer, "format", reason)
    return None


def matches(pattern: str, value: str) -> bool:
    """Return whether *value* holds Go's *pattern*."""
    # Go's `$` is the end of the text, Python's would forgive a newline before it.
    return re.search(pattern.removesuffix("$") + r"\Z", value, re.ASCII) is not None


def _object(schema: Schema, value: Any, pointer: str) -> Flaw | None:
    if not isinstance(value, dict):
        return Flaw(pointer, "type", "value must be an object")
    properties: dict[str, Schema] = schema.get("properties", {})
    additional: Schema | bool = schema.get("additionalProperties", True)
    for name in sorted(value):
        part = properties.get(name, additional)
        if part is False:
            reason = f'property "{name}" is unsupported'
            return Flaw(pointer, "properties", reason)
        if part is not True and (flaw := check(part, value[name], f"{pointer}/{name}")):
            return flaw
    for name in schema.get("required", ()):
        if name not in value:
            reason = f'property "{name}" is missing'
            return Flaw(f"{pointer}/{name}", "required", reason)
    return None


def _array(schema: Schema, value: Any, pointer: str) -> Flaw | None:
    if not isinstance(value, list):
        return Flaw(pointer, "type", "value must be an array")
    for index, item in enumerate(value):
        if flaw := check(schema["items"], item, f"{pointer}/{index}"):
            return flaw
    return None


def _number(schema: Schema, value: Any, pointer: str) -> Flaw | None:
    whole = schema["type"] == "integer"
    # A document's whole numbers are ints, whatever way they were written.
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        kind = "an integer" if whole else "a number"
        return Flaw(pointer, "type", f"value must be {kind}")
    if value < (least := schema.get("minimum", value)):
        return Flaw(pointer, "minimum", f"number must be at least {least}")
    if value > (most := schema.get("maximum", value)):
        return Flaw(pointer, "maximum", f"number must be at most {most}")
    return None


def _boolean(_: Schema, value: Any, pointer: str) -> Flaw | None:
    if isinstance(value, bool):
        return None
    return Flaw(pointer, "type", "value must be a boolean")


_TYPES: dict[str, Callable[[Schema, Any, str], Flaw | None]] = {
    "string": _string,
    "object": _object,
    "array": _array,
    "number": _number,
    "integer": _number,
    "boolean": _boolean,
}

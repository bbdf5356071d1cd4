"""Reading request bodies: JSON as Go reads it, then the schema."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from openmeter_wsgi.sandbox.problems import Problem
from openmeter_wsgi.sandbox.schema import check

if TYPE_CHECKING:
    from openmeter_wsgi.sandbox.schema import Schema

PREFIX = "request body has an error: "


def require(body: bytes) -> None:
    """Refuse an empty *body*."""
    if not body:
        raise Problem(400, f"{PREFIX}value is required but missing")


def parse(body: bytes) -> Any:
    """Return the JSON document in *body*.

    Numbers are float64, as everything passes through one in OpenMeter: integers
    beyond 2^53 lose their last digits.
    """
    require(body)
    # Go reads broken UTF-8, and escapes of half a character, as U+FFFD.
    text = body.decode("utf-8", "replace")
    try:
        return json.loads(
            text, parse_int=number, parse_float=number, parse_constant=_constant
        )
    except (ValueError, RecursionError) as error:
        detail = f"{PREFIX}failed to decode request body: {_reason(text, error)}"
        raise Problem(400, detail) from None


def number(digits: str) -> int | float:
    """Return the float64 nearest to *digits*, as an int where it is a whole one."""
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"cannot unmarshal number {digits} into a float64")
    # Go writes whole float64s without a point, up to this exponent.
    return int(value) if value.is_integer() and abs(value) < 1e21 else value


def _constant(name: str) -> float:
    raise ValueError(f"invalid character {name[0]!r} looking for beginning of value")


def _reason(text: str, error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "exceeded max depth"
    first = text.lstrip(" \t\r\n")[:1]
    if first and first not in '{["-0123456789tfn':
        return f"invalid character {first!r} looking for beginning of value"
    return str(error)


def well_formed(text: str) -> str:
    """Return *text* with halves of surrogate pairs replaced, as Go replaces them."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read(body: bytes, schema: Schema, name: str) -> dict[str, Any]:
    """Return the object in *body*, checked against the schema called *name*."""
    document: dict[str, Any] = parse(body)
    if flaw := check(schema, document):
        text = f"{PREFIX}doesn't match schema #/components/schemas/{name}: {flaw}"
        raise Problem(400, text, flaw=flaw)
    return document

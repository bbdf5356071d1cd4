"""Usage as it is stated, read into numbers and documents that can be billed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, TypeAlias

import msgspec

from openmeter_wsgi.errors import MeterValueError
from openmeter_wsgi.source import source_problem
from openmeter_wsgi.timestamps import rfc3339
from openmeter_wsgi.wire import (
    add_exactly,
    as_decimal,
    digits_problem,
    encode_data,
    encode_number,
    is_finite,
    text_problem,
)

Number: TypeAlias = int | float | Decimal
#: A document (its ``type`` is text), or a mapping of type to number, or several.
Meters: TypeAlias = Mapping[str, Any] | Iterable[Mapping[str, Any]]

_DOCUMENT_KEYS = ("type", "data", "id", "subject", "source", "time")


class Meter(msgspec.Struct, frozen=True):
    """What becomes one event: its type, its data and what it overrides."""

    type: str
    #: A JSON object, encoded when it was stated: later changes do not reach it.
    data: bytes
    id: str | None = None
    subject: str | None = None
    source: str | None = None
    time: str | None = None

    @property
    def plain(self) -> bool:
        """Whether it overrides nothing."""
        return (self.id or self.subject or self.source or self.time) is None

    def document(self) -> dict[str, Any]:
        """Return it in the form in which it can be stated."""
        fields = {"type": self.type, "data": msgspec.json.decode(self.data)}
        for name in _DOCUMENT_KEYS[2:]:
            if (value := getattr(self, name)) is not None:
                fields[name] = value
        return fields


class Usage(msgspec.Struct, frozen=True):
    """Numbers by type, which add up, and documents, which stand each alone."""

    numbers: dict[str, Number]
    documents: tuple[Meter, ...]

    @property
    def types(self) -> set[str]:
        """All types that are named."""
        return {*self.numbers, *(meter.type for meter in self.documents)}


def read_usage(meters: object) -> Usage:
    """Return the usage that *meters* states, with every value checked.

    :raises MeterValueError: naming the value that OpenMeter would refuse, or
        would take and leave out of the meter. A negative number it would count: a SUM
        gets smaller, which no request may do.
    """
    numbers: dict[str, Number] = {}
    documents: list[Meter] = []
    for entry in _entries(meters):
        if isinstance(entry.get("type"), str):
            documents.append(_read_document(entry))
            continue
        for name, value in entry.items():
            number = _read_number(_read_text("meter type", name), value)
            numbers[name] = add_numbers(name, numbers.get(name, 0), number)
    return Usage(numbers, tuple(documents))


def _entries(meters: object) -> list[Mapping[str, Any]]:
    entries = [meters] if isinstance(meters, Mapping) else meters
    if isinstance(entries, Iterable) and not isinstance(entries, str | bytes):
        entries = list(entries)
        if all(isinstance(entry, Mapping) for entry in entries):
            return entries
    raise MeterValueError(
        "expected {'type': …, 'data': {…}}, a mapping of type to number, "
        f"or a list of them, got {meters!r}"
    )


def _read_document(entry: Mapping[str, Any]) -> Meter:
    name = _read_text("meter type", entry["type"])
    if "value" in entry and "data" not in entry:
        raise MeterValueError(
            f"meter {name!r}: the value goes into data: "
            f"{{'type': {name!r}, 'data': {{'value': {entry['value']!r}}}}}"
        )
    if unknown := [key for key in entry if key not in _DOCUMENT_KEYS]:
        raise MeterValueError(
            f"meter {name!r}: unknown key {unknown[0]!r}, "
            f"expected one of {', '.join(_DOCUMENT_KEYS)}"
        )
    given = {
        key: entry[key] for key in _DOCUMENT_KEYS[2:] if entry.get(key) is not None
    }
    for key in ("id", "subject"):
        if key in given:
            _read_text(f"meter {name!r}: {key}", given[key])
    if "source" in given and (problem := source_problem(given["source"])):
        raise MeterValueError(f"meter {name!r}: source: {problem}")
    if "time" in given:
        given["time"] = rfc3339(given["time"], f"meter {name!r}: time")
    data = encode_data(entry.get("data", {}), f"meter {name!r}: data")
    return Meter(name, data, **given)


def _read_text(what: str, value: object) -> str:
    if problem := text_problem(value):
        raise MeterValueError(f"{what}: {problem}")
    return str(value)


def _read_number(name: str, value: object) -> Number:
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):  # noqa: SIM102
        if is_finite(value) and value >= 0:
            if problem := digits_problem(value):
                raise MeterValueError(f"meter {name!r}: {problem}")
            return value
    raise MeterValueError(
        f"meter {name!r}: expected a number, finite and not negative, got {value!r}"
    )


def add_numbers(name: str, left: Number, right: Number) -> Number:
    """Return the sum of two numbers of the meter *name*, exact where it can be.

    :raises MeterValueError: if it is too large for OpenMeter to read.
    """
    total: Number
    try:
        if isinstance(left, Decimal) or isinstance(right, Decimal):
            total = add_exactly(as_decimal(left), as_decimal(right))
        else:
            total = left + right
    except OverflowError:
        total = math.inf
    if not is_finite(total):
        raise MeterValueError(f"meter {name!r}: {left!r} + {right!r} is too large")
    if problem := digits_problem(total):
        raise MeterValueError(f"meter {name!r}: {left!r} + {right!r}: {problem}")
    return total


def number_meter(name: str, number: Number, value_property: str) -> Meter | None:
    """Return the meter that sends *number*, None for zero, which sends nothing."""
    if not number:
        return None
    data = b"{%b:%b}" % (msgspec.json.encode(value_property), encode_number(number))
    return Meter(name, data)

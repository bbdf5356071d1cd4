"""JSON as OpenMeter reads it: exact, or refused where it is made.

OpenMeter re-reads ``data`` into 64-bit floats and takes numbers from text as
well; so whatever a float cannot hold travels as text. NaN and infinity are no
JSON: an encoder writes null for them, and the meter silently counts nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal

import msgspec

from openmeter_wsgi.errors import MeterValueError

#: The largest integer up to which a 64-bit float holds every integer.
MAX_EXACT_INTEGER = 2**53
#: Kafka, behind OpenMeter, refuses messages above about 1 MB for good.
MAX_DATA_BYTES = 900_000


def encode_data(data: object, what: str) -> bytes:
    """Encode the ``data`` of an event.

    :raises MeterValueError: if it is no JSON object or holds what cannot arrive.
    """
    if not isinstance(data, Mapping):
        raise MeterValueError(f"{what}: expected a JSON object, got {data!r}")
    try:
        encoded = msgspec.json.encode(_exact(data, what))
    except (TypeError, UnicodeEncodeError, RecursionError) as error:
        raise MeterValueError(f"{what}: {error}") from None
    if len(encoded) > MAX_DATA_BYTES:
        raise MeterValueError(
            f"{what}: expected at most {MAX_DATA_BYTES} bytes, got {len(encoded)}"
        )
    return encoded


def encode_number(number: float | Decimal) -> bytes:
    """Encode a finite number so that it arrives exact."""
    return msgspec.json.encode(_exact_number(number))


def text_problem(value: object) -> str | None:
    """Say what is wrong with *value* as a type, id or subject."""
    if not isinstance(value, str) or not value:
        return f"expected text that is not empty, got {value!r}"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"expected text that can be encoded, got {value!r}"
    return None


def is_finite(number: float | Decimal) -> bool:
    """Say whether a float can hold *number*, which OpenMeter reads into one."""
    try:
        return math.isfinite(float(number))
    except (OverflowError, ValueError):  # a huge integer, a signalling NaN
        return False


def _exact_number(number: float | Decimal) -> int | float | str:
    if isinstance(number, float):
        return float(number)
    if isinstance(number, Decimal):
        return str(number)
    return int(number) if abs(number) <= MAX_EXACT_INTEGER else str(int(number))


def _exact(value: object, path: str) -> object:
    """Return *value* as JSON types in which every number arrives exact."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float | Decimal):
        if not is_finite(value):
            raise MeterValueError(f"{path}: expected a finite number, got {value!r}")
        return _exact_number(value)
    if isinstance(value, Mapping):
        return {_key(k, path): _exact(v, f"{path}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_exact(item, f"{path}[{n}]") for n, item in enumerate(value)]
    return _exact(_builtin(value, path), path)


def _key(key: object, path: str) -> str:
    if not isinstance(key, str):
        raise MeterValueError(f"{path}: expected text as keys, got {key!r}")
    return key


def _builtin(value: object, path: str) -> object:
    """Return a date, UUID, set, dataclass or Struct as what JSON knows."""
    try:
        return msgspec.to_builtins(value)
    except TypeError:
        raise MeterValueError(
            f"{path}: expected a JSON value, got {type(value).__name__}"
        ) from None

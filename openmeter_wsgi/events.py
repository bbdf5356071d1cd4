"""Validates meters and encodes CloudEvents (CloudEvents 1.0, JSON format).

An event has the attributes ``specversion``, ``id``, ``source``, ``type``, ``subject``,
``time`` and ``data``; OpenMeter rejects or drops extension attributes. It deduplicates
by ``source`` and ``id``. An id is ``<request id>:<meter type>``.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
import time
from collections.abc import Iterable, Mapping
from decimal import Decimal
from itertools import count
from json.encoder import encode_basestring_ascii
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from openmeter_wsgi import log
from openmeter_wsgi.errors import MeterValueError, safe_repr
from openmeter_wsgi.values import (
    MAX_GROWTH,
    MAX_MESSAGE_BYTES,
    SHORT_SUBJECT,
    add_exactly,
    as_decimal,
    digits_problem,
    encode_data,
    encode_number,
    is_finite,
    is_later,
    message_bytes,
    read_time,
    source_problem,
    text_problem,
    timestamp,
    too_large,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

logger: Final = log.get_logger(__name__)


Number: TypeAlias = int | float | Decimal
#: Meters as handlers pass them: a document (a mapping whose ``type`` is text), a
#: mapping of meter type to number, or several of both.
Meters: TypeAlias = Mapping[str, Any] | Iterable[Mapping[str, Any]]

_DOCUMENT_KEYS = ("type", "data", "id", "subject", "source", "time")


class Meter(msgspec.Struct, frozen=True):
    """The type and data of one event, and the attributes that it overrides."""

    type: str
    #: An encoded JSON object, so that later changes by the caller have no effect.
    data: bytes
    id: str | None = None
    subject: str | None = None
    source: str | None = None
    time: str | None = None

    @property
    def has_no_overrides(self) -> bool:
        """True if the meter overrides no attribute."""
        return (self.id or self.subject or self.source or self.time) is None

    def document(self) -> dict[str, Any]:
        """Return the meter as a document that `set_meters` accepts."""
        fields = {"type": self.type, "data": msgspec.json.decode(self.data)}
        for name in _DOCUMENT_KEYS[2:]:
            if (value := getattr(self, name)) is not None:
                fields[name] = value
        return fields


class CheckedUsage(msgspec.Struct, frozen=True):
    """Usage whose values are all valid."""

    #: Amounts by meter type. Amounts of the same type are added.
    numbers: dict[str, Number]
    #: Documents. Each becomes an event of its own.
    documents: tuple[Meter, ...]

    @property
    def types(self) -> set[str]:
        """The types of all meters."""
        return {*self.numbers, *(meter.type for meter in self.documents)}


def read_usage(meters: object) -> CheckedUsage:
    """Check every value in *meters* and return the usage.

    :raises MeterValueError: naming a value that OpenMeter would reject or not count, or
        a negative number, which would decrease a SUM.
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
    return CheckedUsage(numbers, tuple(documents))


def _entries(meters: object) -> list[Mapping[str, Any]]:
    entries = [meters] if isinstance(meters, Mapping) else meters
    if isinstance(entries, Iterable) and not isinstance(entries, str | bytes):
        entries = list(entries)
        if all(isinstance(entry, Mapping) for entry in entries):
            return entries
    raise MeterValueError(
        "expected {'type': …, 'data': {…}}, a mapping of type to number, "
        f"or a list of them, got {safe_repr(meters)}"
    )


def _read_document(entry: Mapping[str, Any]) -> Meter:
    name = _read_text("meter type", entry["type"])
    if "value" in entry and "data" not in entry:
        raise MeterValueError(
            f"meter {name!r}: write the value into data: "
            f"{{'type': {name!r}, 'data': {{'value': {safe_repr(entry['value'])}}}}}"
        )
    if unknown := [key for key in entry if key not in _DOCUMENT_KEYS]:
        raise MeterValueError(
            f"meter {name!r}: unknown key {safe_repr(unknown[0])}, "
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
        given["time"] = read_time(given["time"], f"meter {name!r}: time")
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
        f"meter {name!r}: expected a number, finite and not negative, "
        f"got {safe_repr(value)}"
    )


def add_numbers(name: str, left: Number, right: Number) -> Number:
    """Return the sum of two amounts of the meter *name*, exact if possible.

    :raises MeterValueError: if OpenMeter cannot read a number that large.
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


#: Property of ``data`` that holds the amount of an event made from a number.
VALUE_PROPERTY = "total"


def number_meter(name: str, number: Number) -> Meter | None:
    """Return the meter of an amount, None for zero, which is not sent."""
    if not number:
        return None
    return Meter(name, b'{"total":%b}' % encode_number(number))


#: Maximum number of bytes of events in one batch.
MAX_BATCH_BYTES = 1_000_000
#: Maximum number of bytes of an event whose message cannot be too large.
_SMALL_EVENT = MAX_MESSAGE_BYTES // MAX_GROWTH - 1_000

#: Encodes text as JSON in one C call. msgspec would need two, via bytes.
quoted = encode_basestring_ascii


def _json(text: str) -> str:
    return msgspec.json.encode(text).decode()


#: The last three digits of all ids of a block, and those of the first block, which have
#: no leading zeros.
_BLOCK = tuple(f"{number:03}" for number in range(1_000))
_FIRST_BLOCK = tuple(map(str, range(1, 1_000)))


class RequestIds:
    """Generates request ids that are unique among all processes and hosts. Any thread.

    An id is a random prefix, drawn at the first request of a process, and a number.
    Numbers are handed out in blocks of 1,000, without a lock: the iterator of a block
    yields the last three digits, formatted in advance.
    """

    __slots__ = ("_block", "_blocks", "_prefixes")

    def __init__(self, prefix: str | None = None) -> None:
        #: The prefix under the key "". A dictionary, because `setdefault` is atomic:
        #: several threads may draw a prefix at the same time.
        self._prefixes = {} if prefix is None else {"": f"{prefix}-"}
        self._blocks = count()
        #: The current block: the first part of its ids, and an iterator of the rest.
        self._block: tuple[str, Iterator[str]] = ("", iter(()))

    def new(self) -> str:
        """Return an id that no other request has."""
        head, numbers = self._block
        for number in numbers:
            return head + number
        return self._new_in_next_block()

    def _new_in_next_block(self) -> str:
        """Start a new block and return its first id."""
        prefix = self._prefixes.get("")
        if prefix is None:
            prefix = self._prefixes.setdefault("", _random_prefix())
        block = next(self._blocks)
        head = f"{prefix}{block or ''}"
        numbers = iter(_BLOCK if block else _FIRST_BLOCK)
        first_id = head + next(numbers)
        self._block = (head, numbers)
        return first_id


def _random_prefix() -> str:
    """Return a random prefix that is unique even among clones of a virtual machine.

    A machine that is resumed twice from one snapshot may return the same random bytes
    twice. The clocks, in nanoseconds, differ.
    """
    digest = hashlib.sha256(secrets.token_bytes(32))
    for number in (time.time_ns(), time.monotonic_ns(), os.getpid()):
        digest.update(number.to_bytes(16))
    return f"{digest.hexdigest()[:24]}-"


def derived_id(*parts: str) -> str:
    """Return an id that depends on *parts* only: repetitions have the same id."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode(errors="surrogatepass")
        digest.update(b"%d:" % len(encoded) + encoded)
    return f"once-{digest.hexdigest()[:40]}"


def static_templates(meters: Iterable[Meter], source: str) -> list[tuple[str, str]]:
    """Return the constant parts of each meter's event: before the id, and after it.

    An event is ``<first part><request id><second part><time>","subject":<subject>}``.
    """
    return [
        (
            f'{_event_head(meter, source)},"id":"',
            f'{_json(f":{suffix}")[1:-1]}","time":"',
        )
        for meter, suffix in with_id_suffixes(meters)
    ]


def are_small(meters: Iterable[Meter], source: str) -> bool:
    """Return True if no event of these meters is too large, given a short subject."""
    maximum = _SMALL_EVENT - 12 * SHORT_SUBJECT - 1_000
    return all(
        len(_event_head(meter, source)) + len(meter.type) < maximum for meter in meters
    )


def encode_events(
    meters: Sequence[Meter], *, request_id: str, subject: str | None, source: str
) -> list[bytes]:
    """Encode the events of one request.

    *subject* applies to meters without a subject of their own; it may be None if each
    meter has one. A time in the future is replaced by the current time: Kafka rejects
    such a message, together with other events that OpenMeter has accepted.
    """
    now = timestamp()
    events = []
    for meter, suffix in with_id_suffixes(meters):
        subject_json = _json(meter.subject or subject or "")
        event_id = _json(meter.id or f"{request_id}:{suffix}")
        time = meter.time or now
        if is_later(time, now):
            logger.warning(
                "meter %r: its time %s is in the future; the event is sent with the "
                "current time", meter.type, time,
            )  # fmt: skip
            time = now
        head = _event_head(meter, source)
        event = f'{head},"id":{event_id},"time":"{time}","subject":{subject_json}}}'
        events.append(event.encode())
    return events


def size_problem(event: bytes) -> str | None:
    """Return an error message if an event is too large for OpenMeter, or None."""
    if len(event) <= _SMALL_EVENT:
        return None
    size = message_bytes(event)
    return too_large(size) if size > MAX_MESSAGE_BYTES else None


def _event_head(meter: Meter, source: str) -> str:
    """Return the beginning of a meter's event, up to its data."""
    return (
        f'{{"specversion":"1.0","type":{_json(meter.type)},'
        f'"source":{_json(meter.source or source)},'
        f'"data":{meter.data.decode()}'
    )


def with_id_suffixes(meters: Iterable[Meter]) -> list[tuple[Meter, str]]:
    """Return each meter with the second part of its event id.

    That is the meter type, followed by ``:2``, ``:3`` … if the type occurs repeatedly.
    """
    counts: dict[str, int] = {}
    pairs = []
    for meter in meters:
        n = counts[meter.type] = counts.get(meter.type, 0) + 1
        pairs.append((meter, meter.type if n == 1 else f"{meter.type}:{n}"))
    return pairs

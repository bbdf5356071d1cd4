"""Validates meter values and encodes CloudEvents.

An event has an id, source, type, subject, time and data. OpenMeter refuses or drops
extension attributes, so none are sent.
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
#: A document (its ``type`` is text), or a mapping of type to number, or several.
Meters: TypeAlias = Mapping[str, Any] | Iterable[Mapping[str, Any]]

_DOCUMENT_KEYS = ("type", "data", "id", "subject", "source", "time")


class Meter(msgspec.Struct, frozen=True):
    """The content of one event: its type and data, and attributes that it overrides."""

    type: str
    #: A JSON object, encoded at once: later changes by the caller have no effect.
    data: bytes
    id: str | None = None
    subject: str | None = None
    source: str | None = None
    time: str | None = None

    @property
    def has_no_overrides(self) -> bool:
        """True if it overrides no attribute."""
        return (self.id or self.subject or self.source or self.time) is None

    def document(self) -> dict[str, Any]:
        """Return it as a document that `set_meters` takes."""
        fields = {"type": self.type, "data": msgspec.json.decode(self.data)}
        for name in _DOCUMENT_KEYS[2:]:
            if (value := getattr(self, name)) is not None:
                fields[name] = value
        return fields


class CheckedUsage(msgspec.Struct, frozen=True):
    """Numbers by type, which add up, and documents, one for each event."""

    numbers: dict[str, Number]
    documents: tuple[Meter, ...]

    @property
    def types(self) -> set[str]:
        """The types of all meters."""
        return {*self.numbers, *(meter.type for meter in self.documents)}


def read_usage(meters: object) -> CheckedUsage:
    """Return the usage in *meters*, with every value checked.

    :raises MeterValueError: naming a value that OpenMeter would refuse or not count, or
        a negative number, which would make a SUM smaller.
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
            f"meter {name!r}: the value goes into data: "
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
    """Return the sum of two numbers of the meter *name*, exact if possible.

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


#: The name of the number in the ``data`` of an event that is made from a number.
VALUE_PROPERTY = "total"


def number_meter(name: str, number: Number) -> Meter | None:
    """Return the meter that sends *number*, None for zero, which sends nothing."""
    if not number:
        return None
    return Meter(name, b'{"total":%b}' % encode_number(number))


#: The most bytes of events in one batch.
MAX_BATCH_BYTES = 1_000_000
#: An event of this size makes a message that is small enough, whatever it holds.
_SMALL_EVENT = MAX_MESSAGE_BYTES // MAX_GROWTH - 1_000

#: Encodes text as JSON. One call in C; msgspec needs two, over bytes.
quoted = encode_basestring_ascii


def _json(text: str) -> str:
    return msgspec.json.encode(text).decode()


#: The numbers of a block, as text …
_BLOCK = tuple(f"{number:03}" for number in range(1_000))
#: … and those of the first block, without leading zeros.
_FIRST_BLOCK = tuple(map(str, range(1, 1_000)))


class RequestIds:
    """Ids of requests, unique among all processes and hosts.

    The first half is random, drawn with the first request of each process; the second
    half is a number that threads share without a lock. Its last three digits come from
    a block of texts that are formatted already.
    """

    __slots__ = ("_block", "_blocks", "_prefixes")

    def __init__(self, prefix: str | None = None) -> None:
        #: The first half, once drawn. A dictionary: several threads may draw at once.
        self._prefixes = {} if prefix is None else {"": f"{prefix}-"}
        self._blocks = count()
        self._block: tuple[str, Iterator[str]] = ("", iter(()))

    def new(self) -> str:
        """Return an id that no other request has."""
        head, numbers = self._block
        for number in numbers:
            return head + number
        return self._new_in_next_block()

    def _new_in_next_block(self) -> str:
        """Begin a block of this thread's own, and return its first id."""
        prefix = self._prefixes.get("")
        if prefix is None:
            prefix = self._prefixes.setdefault("", _random_prefix())
        block = next(self._blocks)
        head = f"{prefix}{block or ''}"
        numbers = iter(_BLOCK if block else _FIRST_BLOCK)
        made = head + next(numbers)
        self._block = (head, numbers)
        return made


def _random_prefix() -> str:
    """Return a random prefix, also unique among copies of a virtual machine.

    A machine that is resumed twice from a snapshot may get the same random numbers
    twice, but not the same nanosecond on both of its clocks.
    """
    drawn = hashlib.sha256(secrets.token_bytes(32))
    for moment in (time.time_ns(), time.monotonic_ns(), os.getpid()):
        drawn.update(moment.to_bytes(16))
    return f"{drawn.hexdigest()[:24]}-"


def derived_id(*parts: str) -> str:
    """Return the id that all repetitions with the same *parts* have."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode(errors="surrogatepass")
        digest.update(b"%d:" % len(encoded) + encoded)
    return f"once-{digest.hexdigest()[:40]}"


def static_templates(meters: Iterable[Meter], source: str) -> list[tuple[str, str]]:
    """Return two texts for each meter, the constant parts of its events.

    The first precedes the id of the request. The second stands between the id and the
    time; the subject follows the time.
    """
    return [
        (
            f'{_event_head(meter, source)},"id":"',
            f'{_json(f":{suffix}")[1:-1]}","time":"',
        )
        for meter, suffix in with_id_suffixes(meters)
    ]


def are_small(meters: Iterable[Meter], source: str) -> bool:
    """Return True if all events of these meters are small, given a short subject."""
    largest = _SMALL_EVENT - 12 * SHORT_SUBJECT - 1_000
    return all(
        len(_event_head(meter, source)) + len(meter.type) < largest for meter in meters
    )


def encode_events(
    meters: Sequence[Meter], *, request_id: str, subject: str | None, source: str
) -> list[bytes]:
    """Encode the events of one request.

    *subject* is for meters without a subject of their own; it may be None if there are
    none. A time in the future is replaced by the present: Kafka would refuse it, with
    other events that OpenMeter has accepted.
    """
    now = timestamp()
    events = []
    for meter, suffix in with_id_suffixes(meters):
        name = _json(meter.subject or subject or "")
        event_id = _json(meter.id or f"{request_id}:{suffix}")
        time = meter.time or now
        if is_later(time, now):
            logger.warning(
                "meter %r: its time %s is in the future; it is sent with the present "
                "time", meter.type, time,
            )  # fmt: skip
            time = now
        head = _event_head(meter, source)
        event = f'{head},"id":{event_id},"time":"{time}","subject":{name}}}'
        events.append(event.encode())
    return events


def size_problem(event: bytes) -> str | None:
    """Return an error if an event is too large for OpenMeter, else None."""
    if len(event) <= _SMALL_EVENT:
        return None
    size = message_bytes(event)
    return too_large(size) if size > MAX_MESSAGE_BYTES else None


def _event_head(meter: Meter, source: str) -> str:
    return (
        f'{{"specversion":"1.0","type":{_json(meter.type)},'
        f'"source":{_json(meter.source or source)},'
        f'"data":{meter.data.decode()}'
    )


def with_id_suffixes(meters: Iterable[Meter]) -> list[tuple[Meter, str]]:
    """Pair each meter with the end of its event id: its type, numbered from 2 on."""
    seen: dict[str, int] = {}
    numbered = []
    for meter in meters:
        n = seen[meter.type] = seen.get(meter.type, 0) + 1
        numbered.append((meter, meter.type if n == 1 else f"{meter.type}:{n}"))
    return numbered

"""CloudEvents 1.0, encoded once: from here on only bytes travel.

An event of OpenMeter is its id, source, type, subject, time and data; extension
attributes are refused or dropped there, so none is sent.
"""

from __future__ import annotations

import secrets
from itertools import count
from json.encoder import encode_basestring_ascii
from typing import TYPE_CHECKING

import msgspec

from openmeter_wsgi import log
from openmeter_wsgi.timestamps import is_later, timestamp
from openmeter_wsgi.wire import (
    MAX_GROWTH,
    MAX_MESSAGE_BYTES,
    SHORT_SUBJECT,
    message_bytes,
    too_large,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from openmeter_wsgi.usage import Meter

logger = log.get_logger(__name__)

#: The size of one event in the queue of which the sender still makes a batch.
MAX_BATCH_BYTES = 1_000_000
#: The message of an event of this size is small enough, whatever is in it.
_SMALL_EVENT = MAX_MESSAGE_BYTES // MAX_GROWTH - 1_000

#: A text as JSON has it. A call in C: msgspec's is one to bytes and one back.
quoted = encode_basestring_ascii


def _json(text: str) -> str:
    return msgspec.json.encode(text).decode()


#: The numbers of one block, as text, …
_BLOCK = tuple(f"{number:03}" for number in range(1_000))
#: … and of the very first, which nothing stands in front of.
_FIRST_BLOCK = tuple(map(str, range(1, 1_000)))


class RequestIds:
    """Ids of requests, unique among all processes and hosts.

    The first half comes from the kernel, anew in every process; the second is a number
    that threads share without a lock. It is not formatted but put together: `block` is
    all but its last three digits, and those that have not been used.
    """

    __slots__ = ("_blocks", "_prefix", "block")

    def __init__(self, prefix: str | None = None) -> None:
        self._prefix = f"{prefix or secrets.token_hex(12)}-"
        self._blocks = count(1)
        self.block: tuple[str, Iterator[str]] = (self._prefix, iter(_FIRST_BLOCK))

    def new(self) -> str:
        """Return an id that no other request has."""
        head, numbers = self.block
        for number in numbers:
            return head + number
        return self.new_in_next_block()

    def new_in_next_block(self) -> str:
        """Begin a block that no other thread has begun, and return an id of it."""
        head = f"{self._prefix}{next(self._blocks)}"
        numbers = iter(_BLOCK)
        made = head + next(numbers)
        self.block = (head, numbers)
        return made


def static_templates(meters: Iterable[Meter], source: str) -> list[tuple[str, str]]:
    """Return what all events of each meter have in common, as text.

    The first part of each goes before the request's id, the second between that and
    the time, on which the subject follows.
    """
    return [
        (f'{_head(meter, source)},"id":"', f'{_json(f":{suffix}")[1:-1]}","time":"')
        for meter, suffix in _numbered(meters)
    ]


def are_small(meters: Iterable[Meter], source: str) -> bool:
    """Say whether no event of these meters is large, with a short subject."""
    largest = _SMALL_EVENT - 12 * SHORT_SUBJECT - 1_000
    return all(
        len(_head(meter, source)) + len(meter.type) < largest for meter in meters
    )


def encode_events(
    meters: Sequence[Meter], *, request_id: str, subject: str | None, source: str
) -> list[bytes]:
    """Encode the events of one request whose meters differ from the policy's.

    A meter without a subject of its own takes *subject*, which may be None only
    where every meter has one. A time in the future becomes the present moment: Kafka
    refuses it, together with other events that OpenMeter has accepted.
    """
    now = timestamp()
    events = []
    for meter, suffix in _numbered(meters):
        name = _json(meter.subject or subject or "")
        event_id = _json(meter.id or f"{request_id}:{suffix}")
        time = meter.time or now
        if is_later(time, now):
            logger.warning(
                "meter %r: its time %s is in the future; it is sent with the present "
                "time", meter.type, time,
            )  # fmt: skip
            time = now
        event = (
            f'{_head(meter, source)},"id":{event_id},"time":"{time}","subject":{name}}}'
        )
        events.append(event.encode())
    return events


def size_problem(event: bytes) -> str | None:
    """Say that OpenMeter cannot store an event for its size, None if it can."""
    if len(event) <= _SMALL_EVENT:
        return None
    size = message_bytes(event)
    return too_large(size) if size > MAX_MESSAGE_BYTES else None


def _head(meter: Meter, source: str) -> str:
    return (
        f'{{"specversion":"1.0","type":{_json(meter.type)},'
        f'"source":{_json(meter.source or source)},'
        f'"data":{meter.data.decode()}'
    )


def _numbered(meters: Iterable[Meter]) -> list[tuple[Meter, str]]:
    """Pair each meter with what follows the request in its id.

    The second event of a type and every later one carry a number.
    """
    seen: dict[str, int] = {}
    numbered = []
    for meter in meters:
        n = seen[meter.type] = seen.get(meter.type, 0) + 1
        numbered.append((meter, meter.type if n == 1 else f"{meter.type}:{n}"))
    return numbered

"""CloudEvents 1.0, encoded once: from here on only bytes travel.

An event of OpenMeter is its id, source, type, subject, time and data; extension
attributes are refused or dropped there, so none is sent.
"""

from __future__ import annotations

import secrets
from itertools import count
from json.encoder import encode_basestring_ascii as _quoted
from typing import TYPE_CHECKING

import msgspec

from openmeter_wsgi.timestamps import timestamp

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from openmeter_wsgi.usage import Meter

#: The size of one event in the queue of which the sender still makes a batch.
MAX_BATCH_BYTES = 1_000_000


def _json(text: str) -> str:
    return msgspec.json.encode(text).decode()


class RequestIds:
    """Ids of requests, unique among all processes and hosts.

    The first half comes from the kernel, anew in every process; the second is a
    counter, which threads share without a lock.
    """

    __slots__ = ("numbers", "prefix")

    def __init__(self, prefix: str | None = None) -> None:
        self.prefix = f"{prefix or secrets.token_hex(12)}-"
        self.numbers = count(1)

    def new(self) -> str:
        """Return an id that no other request has."""
        return f"{self.prefix}{next(self.numbers)}"


class StaticEvents:
    """The events of a request that used nothing but the meters of its policy.

    All that such events have in common is encoded when the policy is made; a
    request fills in its number, time and subject.
    """

    __slots__ = ("_numbers", "_only", "_templates")

    def __init__(self, meters: Iterable[Meter], source: str, ids: RequestIds) -> None:
        self._numbers = ids.numbers
        self._templates = tuple(
            (
                f'{_head(meter, source)},"id":"{ids.prefix}',
                f'{_json(f":{suffix}")[1:-1]}","time":"',
            )
            for meter, suffix in _numbered(meters)
        )
        #: Most policies have one meter.
        self._only = self._templates[0] if len(self._templates) == 1 else None

    def encode(self, subject: str) -> Sequence[bytes]:
        """Encode the events of one request, under a new id."""
        number = next(self._numbers)
        if self._only is not None:
            head, middle = self._only
            event = (
                f'{head}{number}{middle}{timestamp()}","subject":{_quoted(subject)}}}'
            )
            return (event.encode(),)
        tail = f'{timestamp()}","subject":{_quoted(subject)}}}'
        return [
            f"{head}{number}{middle}{tail}".encode() for head, middle in self._templates
        ]


def encode_events(
    meters: Sequence[Meter], *, request_id: str, subject: str | None, source: str
) -> list[bytes]:
    """Encode the events of one request whose meters differ from the policy's.

    A meter without a subject of its own takes *subject*, which may be None only
    where every meter has one.
    """
    now = timestamp()
    events = []
    for meter, suffix in _numbered(meters):
        name = _json(meter.subject or subject or "")
        event_id = _json(meter.id or f"{request_id}:{suffix}")
        time = meter.time or now
        event = (
            f'{_head(meter, source)},"id":{event_id},"time":"{time}","subject":{name}}}'
        )
        events.append(event.encode())
    return events


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

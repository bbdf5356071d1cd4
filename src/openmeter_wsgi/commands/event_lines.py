"""Events as people write them, a JSON document a line, checked before they are sent."""

from __future__ import annotations

import secrets
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import msgspec

from openmeter_wsgi.commands.old_events import is_old
from openmeter_wsgi.errors import MeterValueError
from openmeter_wsgi.events import encode_events, size_problem
from openmeter_wsgi.usage import read_usage

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_SENT = ("type", "data", "id", "subject", "source", "time")
#: Part of CloudEvents, and nothing that OpenMeter looks at.
_TAKEN = {*_SENT, "specversion", "datacontenttype", "dataschema"}


class InvalidEvent(Exception):
    """A document that OpenMeter would refuse, or take and not count."""


def read_line(line: bytes) -> Any:
    """Return the document of a line. Of a line of ``spool export`` it is the event.

    :raises InvalidEvent: if it is none.
    """
    try:
        document = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidEvent(f"expected JSON: {error}") from None
    if isinstance(document, dict) and isinstance(document.get("event"), dict):
        return document["event"]
    return document


def encode_event(document: Any, *, source: str, new_id: str | None = None) -> bytes:
    """Encode one event.

    :param source: of an event that names none.
    :param new_id: the id of an event that has none, which must have one otherwise.
    :raises InvalidEvent: naming what is wrong with it.
    """
    if not isinstance(document, dict):
        raise InvalidEvent(f"expected an event, a JSON object, got {document!r:.100}")
    _check_attributes(document)
    event = {name: document[name] for name in _SENT if document.get(name) is not None}
    if "id" not in event:
        if new_id is None:
            raise InvalidEvent(
                "id: expected one, by which a repetition is dropped, got none (or give "
                "--new-ids)"
            )
        event["id"] = new_id
    for name in ("type", "subject"):
        if not isinstance(event.get(name), str) or not event[name]:
            raise InvalidEvent(f"{name}: expected text, got {document.get(name)!r}")
    try:
        meters = read_usage(event).documents
        (encoded,) = encode_events(meters, request_id="", subject=None, source=source)
    except (MeterValueError, ValueError) as error:
        raise InvalidEvent(str(error)) from None
    if problem := size_problem(encoded):
        raise InvalidEvent(problem)
    return encoded


def _check_attributes(document: Mapping[str, Any]) -> None:
    if document.get("specversion", "1.0") != "1.0":
        raise InvalidEvent(
            f"specversion: expected '1.0', got {document['specversion']!r}"
        )
    content = document.get("datacontenttype") or "application/json"
    if content != "application/json":
        raise InvalidEvent(
            f"datacontenttype: expected 'application/json', got {content!r}"
        )
    if unknown := [name for name in document if name not in _TAKEN]:
        raise InvalidEvent(
            f"{unknown[0]}: OpenMeter keeps no such attribute; put it into data"
        )


class Flaw(NamedTuple):
    """What is wrong with a line."""

    line: int
    problem: str


class CheckedEvents:
    """The valid events of many lines, kept in a file until all are checked."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.count = 0
        #: How many of the valid ones are older than what Kafka keeps.
        self.old = 0
        self.flaws: list[Flaw] = []

    def add(self, lines: Iterable[bytes], *, source: str, new_ids: bool) -> None:
        """Check *lines*; empty ones are passed over."""
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            new_id = secrets.token_hex(16) if new_ids else None
            try:
                event = encode_event(read_line(line), source=source, new_id=new_id)
            except InvalidEvent as error:
                self.flaws.append(Flaw(number, str(error)))
            else:
                self._file.write(event + b"\n")
                self.count += 1
                self.old += is_old(event)

    def __iter__(self) -> Iterator[bytes]:
        self._file.seek(0)
        for line in self._file:
            yield line[:-1]

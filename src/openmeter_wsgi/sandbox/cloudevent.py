"""What becomes of an event after the schema: Go's CloudEvents SDK, then Kafka."""

from __future__ import annotations

import base64
import binascii
import json
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from openmeter_wsgi.sandbox.documents import number, well_formed
from openmeter_wsgi.sandbox.problems import Problem
from openmeter_wsgi.sandbox.uri import InvalidURI, reencode

ATTRIBUTES = frozenset(
    (
        "id", "source", "specversion", "type", "subject", "time",
        "data", "data_base64", "datacontenttype", "dataschema",
    )
)  # fmt: skip
INT32 = range(-(2**31), 2**31)


@dataclass(frozen=True, slots=True)
class Event:
    """An event as OpenMeter's Kafka message holds it: nothing else survives."""

    id: str
    source: str
    type: str
    subject: str
    #: Seconds since 1970; OpenMeter meters at this resolution.
    time: int
    #: JSON text, or None where there was no data.
    data: str | None
    #: The data is no JSON, which OpenMeter finds out too late to say so: 500.
    broken: bool = False

    @property
    def key(self) -> str:
        """What OpenMeter deduplicates by; ``a-b`` + ``c`` equals ``a`` + ``b-c``."""
        return f"default-{self.source}-{self.id}"


class InvalidEvent(ValueError):
    """An event that passes the schema but not the CloudEvents SDK."""


def decode(document: dict[str, Any], now: int) -> Event:
    """Return the event in *document*, which has passed the schema.

    :param now: its time where it names none, in Unix seconds.
    """
    version = document["specversion"]
    if version not in ("1.0", "0.3"):
        raise InvalidEvent(f"specversion: unknown value: {version}")
    try:
        source = reencode(well_formed(document["source"]))
    except InvalidURI as error:
        raise InvalidEvent(f"cannot parse uri ref: {error}") from None
    for name in document.keys() - ATTRIBUTES:
        _check_extension(name, document[name])
    data, broken = _data(document)
    return Event(
        id=well_formed(document["id"]),
        source=source,
        type=well_formed(document["type"]),
        subject=well_formed(document["subject"]),
        time=_seconds(document.get("time"), now),
        data=data,
        broken=broken,
    )


def _check_extension(name: str, value: Any) -> None:
    """Refuse what the SDK refuses; what it takes is thrown away one step later."""
    if not re.fullmatch("[A-Za-z0-9]+", name):
        raise InvalidEvent(
            f"bad key, CloudEvents attribute names MUST consist of lower-case letters "
            f"('a' to 'z'), upper-case letters ('A' to 'Z') or digits "
            f"('0' to '9') from the ASCII character set: {name}"
        )
    if isinstance(value, dict | list):
        raise InvalidEvent(f"invalid CloudEvents value for extension {name}")
    if isinstance(value, int | float) and int(value) not in INT32:
        raise InvalidEvent(f"cannot convert {value} to int32: out of range")


def _seconds(moment: str | None, now: int) -> int:
    if moment is None:
        return now
    try:
        return parse_time(moment)
    except ValueError:
        reason = f'cannot convert "{moment}" to time.Time: not in RFC3339 format'
        raise InvalidEvent(reason) from None


def parse_time(moment: str) -> int:
    """Return RFC 3339 *moment* in whole seconds since 1970."""
    if not re.search(r"(Z|[+-]\d\d:\d\d)$", moment):
        raise ValueError(moment)
    if moment.startswith("0000-"):
        # A year that Go knows and Python does not; it is dropped for its age anyway.
        return -1
    return int(datetime.fromisoformat(moment).timestamp() // 1)


def _data(document: dict[str, Any]) -> tuple[str | None, bool]:
    if encoded := document.get("data_base64"):
        return _base64(encoded)
    if document.get("data") is None:
        return None, False
    # Go writes the keys of a map in order.
    text = json.dumps(document["data"], sort_keys=True, ensure_ascii=False)
    return well_formed(text), False


def _base64(encoded: object) -> tuple[str | None, bool]:
    try:
        content = base64.b64decode(str(encoded), validate=True)
    except binascii.Error as error:
        raise InvalidEvent(f"illegal base64 data: {error}") from None
    try:
        document = json.loads(content, parse_int=number, parse_float=number)
    except (ValueError, RecursionError, Problem):
        return None, True
    return well_formed(json.dumps(document, sort_keys=True, ensure_ascii=False)), False

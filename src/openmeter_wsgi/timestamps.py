"""Points in time as CloudEvents writes them: RFC 3339, in UTC."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from math import floor, inf
from typing import TYPE_CHECKING

import msgspec

from openmeter_wsgi.errors import MeterValueError

if TYPE_CHECKING:
    from collections.abc import Callable

_HUNDREDTHS = tuple(f".{n:02}Z" for n in range(100))


class Clock:
    """What says the time, as text. Any thread.

    To format even a hundredth of a second costs more than to look whether it is still
    the same. How long it is says a clock that nobody sets back.
    """

    __slots__ = ("_second", "monotonic", "now", "text", "until")

    def __init__(self) -> None:
        #: Seconds since 1970.
        self.now: Callable[[], float] = time.time
        self.monotonic: Callable[[], float] = time.monotonic
        #: The text of this moment, until `monotonic` says that it is not.
        self.text = ""
        self.until = 0.0
        self._second: tuple[int, str] = (0, "1970-01-01T00:00:00")

    def renew(self) -> str:
        """Format this moment, to the hundredth of a second."""
        now = self.now()
        hundredths = floor(now * 100.0)
        whole = hundredths // 100
        second, text = self._second
        if whole != second:
            text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole))
            self._second = (whole, text)
        text += _HUNDREDTHS[hundredths % 100]
        # In this order: who sees that it is not over yet gets this text or a later one.
        self.text = text
        self.until = self.monotonic() + (hundredths + 1) / 100.0 - now
        return text


clock = Clock()


def go_by(now: Callable[[], float]) -> Callable[[], float]:
    """Let *now* say what time it is (seconds since 1970); return what did before."""
    before, clock.now = clock.now, now
    # Of another clock nobody knows how long a hundredth of a second takes.
    clock.monotonic = time.monotonic if now is time.time else lambda: inf
    clock.until = 0.0
    return before


def timestamp() -> str:
    """Return the present moment, to the hundredth of a second.

    OpenMeter keeps whole seconds; the rest tells how long an event was on its way.
    """
    return clock.text if clock.monotonic() < clock.until else clock.renew()


#: Of a timestamp in UTC: all but the fraction of a second and the Z.
WHOLE_SECONDS = len("2026-01-02T03:04:05")


def is_later(left: str, right: str) -> bool:
    """Say whether one timestamp in UTC is in a later second than another."""
    return left[:WHOLE_SECONDS] > right[:WHOLE_SECONDS]


class _Timed(msgspec.Struct):
    time: datetime


def moment_of(event: bytes) -> float | None:
    """Return the time of an encoded event, in seconds since 1970, None if it has none.

    That of its request, or what the application has stated instead.
    """
    try:
        return msgspec.json.decode(event, type=_Timed).time.timestamp()
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def age_of(event: bytes) -> float:
    """Return for how many seconds an encoded event is there, 0 if that is unknown."""
    moment = moment_of(event)
    return 0.0 if moment is None else max(time.time() - moment, 0.0)


def rfc3339(value: object, what: str) -> str:
    """Return the point in time *value* as text.

    :raises MeterValueError: if it is no RFC 3339 text and no datetime, names no
        time zone, or lies before 1970: OpenMeter drops such an event silently.
    """
    moment = value
    if isinstance(value, str):
        try:
            moment = msgspec.convert(value, datetime)
        except msgspec.ValidationError:
            moment = None
    if not isinstance(moment, datetime) or moment.tzinfo is None:
        raise MeterValueError(
            f"{what}: expected RFC 3339 text or a datetime with a time zone, "
            f"got {value!r}"
        )
    if moment.timestamp() < 1:
        raise MeterValueError(f"{what}: expected a time after 1970, got {value!r}")
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")

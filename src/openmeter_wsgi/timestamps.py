"""Points in time as CloudEvents writes them: RFC 3339, in UTC."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from math import floor
from typing import TYPE_CHECKING

import msgspec

from openmeter_wsgi.errors import MeterValueError

if TYPE_CHECKING:
    from collections.abc import Callable

_MILLISECONDS = tuple(f".{n:03}Z" for n in range(1000))
#: The running second and its text: formatting it costs more than the rest of an
#: event. One tuple, replaced whole, so that threads never see half of it.
_second: tuple[float, str] = (0.0, "1970-01-01T00:00:00")
#: What says the time: in a test another clock.
_now: Callable[[], float] = time.time


def go_by(clock: Callable[[], float]) -> Callable[[], float]:
    """Let *clock* say what time it is (seconds since 1970); return what did before."""
    global _now
    before, _now = _now, clock
    return before


def timestamp() -> str:
    """Return the present moment, to the millisecond. Any thread."""
    global _second  # noqa: PLW0603 - a cache, see above
    now = _now()
    second, text = _second
    # Floats throughout: a conversion to int and back costs as much as all the rest.
    since = now - second
    if not 0.0 <= since < 1.0:
        second = float(floor(now))
        text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        _second = (second, text)
        since = now - second
    return text + _MILLISECONDS[floor(since * 1000.0)]


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

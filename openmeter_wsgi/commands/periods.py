"""Points in time as people write them, and the edges of the windows they lie in."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, tzinfo
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_AGE = re.compile(r"(\d{1,6})(min|h|d|w)")
_UNITS = {"min": "minutes", "h": "hours", "d": "days", "w": "weeks"}
EXPECTED = "expected RFC 3339, a date such as 2026-11-01, or an age such as 24h or 7d"


def read_moment(text: str, zone: tzinfo, now: datetime) -> datetime:
    """Return the moment that *text* says: RFC 3339, a date, or how long ago it is.

    A date, or a time without an offset, is one of *zone*.

    :raises ValueError: if it says none.
    """
    if age := _AGE.fullmatch(text.strip()):
        return (now - timedelta(**{_UNITS[age[2]]: int(age[1])})).astimezone(zone)
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ValueError(f"{EXPECTED}, got {text!r}") from None
    if moment.tzinfo is None:
        return moment.replace(tzinfo=zone)
    return moment.astimezone(zone)


def begin(moment: datetime, window: str) -> datetime:
    """Return when the window began that *moment* lies in."""
    whole = moment.replace(second=0, microsecond=0)
    cut: dict[str, Callable[[], datetime]] = {
        "MINUTE": lambda: whole,
        "HOUR": lambda: whole.replace(minute=0),
        "DAY": lambda: whole.replace(hour=0, minute=0),
        "MONTH": lambda: whole.replace(day=1, hour=0, minute=0),
    }
    return cut[window]()


def end(moment: datetime, window: str) -> datetime:
    """Return when the window ends that *moment* lies in; itself, if it begins one."""
    start = begin(moment, window)
    if start == moment:
        return moment
    if window == "MONTH":
        return begin(start + timedelta(days=32), window)
    if window == "DAY":
        return start + timedelta(days=1)
    size = timedelta(hours=1) if window == "HOUR" else timedelta(minutes=1)
    # By the clock of UTC: an hour that a change of clocks repeats is two.
    return (start.astimezone(UTC) + size).astimezone(moment.tzinfo)


def rfc3339(moment: datetime) -> str:
    """Return *moment* as OpenMeter reads it."""
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")

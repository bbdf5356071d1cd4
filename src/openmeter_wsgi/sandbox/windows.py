"""The windows in which meters are read: minutes, hours, days and months."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

#: In units that every time zone's clock keeps in step with.
_SECONDS = {"MINUTE": 60, "HOUR": 3600}
SIZES = ("MINUTE", "HOUR", "DAY", "MONTH")


def window_start(moment: int, size: str, zone: str) -> int:
    """Return when the window began that *moment* lies in, in Unix seconds."""
    if size == "MINUTE":
        return moment - moment % 60
    # All offsets of living time zones are multiples of a quarter of an hour.
    return _start(moment - moment % 900, size, zone)


@lru_cache(maxsize=65_536)
def _start(moment: int, size: str, zone: str) -> int:
    local = datetime.fromtimestamp(moment, ZoneInfo(zone))
    if size == "HOUR":
        # Not by replacing the minutes: an hour that a clock change repeats is two.
        return moment - local.minute * 60 - local.second
    midnight = local.replace(hour=0, minute=0, second=0, fold=0)
    if size == "MONTH":
        midnight = midnight.replace(day=1)
    return int(midnight.timestamp())


def window_end(start: int, size: str, zone: str) -> int:
    """Return when the window that began at *start* ends, in Unix seconds."""
    if seconds := _SECONDS.get(size):
        return start + seconds
    local = datetime.fromtimestamp(start, ZoneInfo(zone))
    # 32 days after the first of a month lies in the next one.
    beyond = local + timedelta(days=1 if size == "DAY" else 32)
    if size == "MONTH":
        beyond = beyond.replace(day=1)
    return int(beyond.timestamp())


def rfc3339(moment: float) -> str:
    """Return Unix *moment* in the form OpenMeter writes."""
    text = datetime.fromtimestamp(moment, UTC).isoformat(timespec="auto")
    return text.replace("+00:00", "Z")

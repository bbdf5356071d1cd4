"""Usage periods: an anchor, and an interval that recurs from it for ever."""

from __future__ import annotations

import calendar
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from openmeter_wsgi.sandbox.cloudevent import parse_time
from openmeter_wsgi.sandbox.problems import Problem
from openmeter_wsgi.sandbox.windows import rfc3339

_NAMES = {"DAY": "P1D", "WEEK": "P1W", "MONTH": "P1M", "YEAR": "P1Y"}
_ISO = re.compile(
    r"P(?:(?P<years>\d+)Y)?(?:(?P<months>\d+)M)?(?:(?P<weeks>\d+)W)?(?:(?P<days>\d+)D)?"
    r"(?:T(?:(?P<hours>\d+)H)?(?:(?P<minutes>\d+)M)?(?:(?P<seconds>\d+)S)?)?",
    re.ASCII,
)
_SECONDS = {"weeks": 604_800, "days": 86_400, "hours": 3600, "minutes": 60}
#: OpenMeter meters by the minute, and lets no usage period be shorter than this.
SHORTEST = 3600
_MONTH = 31 * 86_400
#: A thousand years: what lies beyond is no date any more.
_LONGEST = 12_000


@dataclass(frozen=True, slots=True)
class Interval:
    """A length of time, of which months are not always equally long."""

    months: int
    seconds: int

    def after(self, moment: int, times: int) -> int:
        """Return what lies *times* intervals after *moment*, in Unix seconds."""
        return _add_months(moment, self.months * times) + self.seconds * times

    @property
    def longest(self) -> int:
        """The most seconds that one interval can last."""
        return self.months * _MONTH + self.seconds


def _add_months(moment: int, months: int) -> int:
    """Return the same day some months on; the last of a month that is too short."""
    if not months:
        return moment
    date = datetime.fromtimestamp(moment, UTC)
    years, month = divmod(date.month - 1 + months, 12)
    year = date.year + years
    day = min(date.day, calendar.monthrange(year, month + 1)[1])
    return int(date.replace(year=year, month=month + 1, day=day).timestamp())


def parse_interval(text: str) -> Interval:
    """Return the interval *text*, a name or an ISO 8601 duration, or answer 400."""
    found = _ISO.fullmatch(_NAMES.get(text.upper(), text.upper()))
    parts = {k: int(v) for k, v in found.groupdict("0").items()} if found else {}
    if not any(parts.values()):
        raise Problem(400, f"failed to map interval: cannot parse period {text!r}")
    seconds = sum(parts[name] * length for name, length in _SECONDS.items())
    months = parts["years"] * 12 + parts["months"]
    if months + seconds / _MONTH > _LONGEST:
        raise Problem(400, f"failed to map interval: {text} is too long")
    return Interval(months, seconds + parts["seconds"])


def recurring(period: dict[str, Any], now: float) -> dict[str, Any]:
    """Return the usage period that a client asked for as OpenMeter answers it."""
    text = period["interval"].upper()
    interval = parse_interval(text)
    if interval.longest < SHORTEST:
        raise Problem(400, "invalid usage period: interval must be at least an hour")
    names = {iso: name for name, iso in _NAMES.items()}
    iso = _NAMES.get(text, text)
    anchor = parse_time(period["anchor"]) if "anchor" in period else int(now)
    return {
        "interval": names.get(iso, iso),
        "intervalISO": iso,
        "anchor": rfc3339(whole_minute(anchor)),
    }


def whole_minute(moment: float) -> int:
    """Return the start of the minute of *moment*: OpenMeter's resolution."""
    return int(moment // 60) * 60


@dataclass(frozen=True, slots=True)
class Recurrence:
    """The moments an interval apart, before and after an anchor in Unix seconds."""

    anchor: int
    interval: Interval

    def start(self, moment: float) -> int:
        """Return the last of the moments that is not after *moment*."""
        return self._boundary(self._index(moment))

    def end(self, moment: float) -> int:
        """Return the first of the moments that is after *moment*."""
        return self._boundary(self._index(moment) + 1)

    def between(self, after: float, until: float) -> list[int]:
        """Return the moments after *after*, up to and including *until*."""
        moments = []
        index = self._index(after) + 1
        while (moment := self._boundary(index)) <= until:
            moments.append(moment)
            index += 1
        return moments

    def _boundary(self, index: int) -> int:
        return self.interval.after(self.anchor, index)

    def _index(self, moment: float) -> int:
        """Return which of the moments is the last that is not after *moment*."""
        # Months are shorter than their longest: the guess is at most a little early
        # after the anchor, and a little late before it.
        index = int((moment - self.anchor) // self.interval.longest)
        while self._boundary(index) > moment:
            index -= 1
        while self._boundary(index + 1) <= moment:
            index += 1
        return index

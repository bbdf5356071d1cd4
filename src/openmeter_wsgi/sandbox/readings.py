"""Usage for balances: summed once, then only by what has arrived since."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from openmeter_wsgi.sandbox.metering import Path
from openmeter_wsgi.sandbox.usage import NUMBER, TEXT

if TYPE_CHECKING:
    import sqlite3

#: Sums kept; a question whose sum is not among them adds up its events anew.
KEPT = 4096


class Edge(NamedTuple):
    """Where a span of usage begins or ends.

    Two coordinates, as an event has two: OpenMeter knows its time alone, to the
    second; the number of its arrival tells apart what a second holds, so that a reset
    by hand takes effect at once.
    """

    #: Unix seconds; events from this moment on are after the edge,
    time: int
    #: unless they arrived no later than the event of this number.
    seq: int = 0

    def passed(self, moment: int, seq: int) -> bool:
        """Return whether an event is after the edge."""
        return moment >= self.time and seq > self.seq


@dataclass(frozen=True, slots=True)
class Source:
    """Which events an entitlement counts, and how."""

    meter: str
    type: str
    aggregation: str
    path: str | None
    subjects: tuple[str, ...]
    #: JSON path to the text that has to be there.
    filters: tuple[tuple[str, str], ...] = ()

    def statement(self) -> tuple[str, dict[str, Any]]:
        """Return SQL for the events in order of arrival, and its parameters."""
        parameters: dict[str, Any] = {"type": self.type}
        if self.path:
            parameters["value"] = Path(self.path).sqlite
        subjects = {f"s{n}": subject for n, subject in enumerate(self.subjects)}
        terms = ["type = :type", "seq > :after", "seq <= :horizon"]
        terms.append(f"subject IN ({', '.join(f':{name}' for name in subjects)})")
        for number, (path, text) in enumerate(self.filters):
            parameters |= {f"p{number}": Path(path).sqlite, f"t{number}": text}
            terms.append(f"{TEXT.format(f'p{number}')} = :t{number}")
        sql = (
            f"SELECT time, seq, {_VALUES[self.aggregation]}"  # noqa: S608
            " FROM events INDEXED BY events_by_arrival"
            f" WHERE {' AND '.join(terms)} ORDER BY seq"
        )
        return sql, parameters | subjects


_VALUES = {
    "COUNT": "1",
    "SUM": NUMBER,
    "LATEST": NUMBER,
    "UNIQUE_COUNT": f"nullif({TEXT.format('value')}, 'null')",
}


class _Total:
    """The usage between two edges, as far as it has been read."""

    def __init__(self, source: Source, start: Edge, end: Edge) -> None:
        self.position = 0
        self._span = (start, end)
        self._aggregation = source.aggregation
        self._sum = 0.0
        self._texts: set[str] = set()
        self._newest = (-1, -1, 0.0)
        self._sql, self._parameters = source.statement()

    def read(self, connection: sqlite3.Connection, horizon: int) -> float:
        """Return the usage of the events up to *horizon*."""
        window = {"after": self.position, "horizon": horizon}
        start, end = self._span
        for moment, seq, value in connection.execute(
            self._sql, self._parameters | window
        ):
            self.position = seq
            within = start.passed(moment, seq) and not end.passed(moment, seq)
            if within and value is not None:
                self._add(moment, seq, value)
        return self._value()

    def _add(self, moment: int, seq: int, value: Any) -> None:
        if self._aggregation == "UNIQUE_COUNT":
            self._texts.add(value)
        elif self._aggregation == "LATEST":
            self._newest = max(self._newest, (moment, seq, value))
        else:
            self._sum += value

    def _value(self) -> float:
        if self._aggregation == "UNIQUE_COUNT":
            return float(len(self._texts))
        return self._newest[2] if self._aggregation == "LATEST" else self._sum


class Readings:
    """The usage of entitlements. Any thread: one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals: OrderedDict[tuple[Source, Edge, Edge], _Total] = OrderedDict()

    def usage(
        self,
        connection: sqlite3.Connection,
        source: Source,
        start: Edge,
        end: Edge,
        horizon: int,
    ) -> float:
        """Return what *source* counts from *start* to *end*, up to *horizon*."""
        if not source.subjects:
            return 0.0
        key = (source, start, end)
        with self._lock:
            total = self._totals.pop(key, None)
            # A clock put back, or a longer lag: what was seen is out of sight again.
            if total is None or total.position > horizon:
                total = _Total(*key)
            value = total.read(connection, horizon)
            self._totals[key] = total
            if len(self._totals) > KEPT:
                self._totals.popitem(last=False)
            return value

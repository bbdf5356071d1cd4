"""The usage of meters: SQL over the stored events, in total or in time windows.

`usage` runs one `Query`. `UsageCache` keeps sums for the balances of entitlements, and
adds only newly arrived events to them. The SQL functions imitate ClickHouse.
"""

from __future__ import annotations

import math
import re
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple
from zoneinfo import ZoneInfo

from openmeter_wsgi.sandbox.request_validation import Problem, parse_time, rfc3339, tidy

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator, Mapping, Sequence


_STEP = re.compile(
    r"""\.(?P<name>[\w-]+)|\['(?P<quoted>[^'"\\]+)'\]|\[(?P<index>\d+)\]"""
)


class JsonPath:
    """A JSONPath of names and indexes, such as ``$.usage.tokens`` or ``$.items[0]``.

    :raises ValueError: if *text* is another kind of path, or none.
    """

    def __init__(self, text: str) -> None:
        self._steps: list[str | int] = []
        position = 1 if text.startswith("$") else len(text) + 1
        while position < len(text):
            step = _STEP.match(text, position)
            if step is None:
                break
            name = step["name"] or step["quoted"]
            self._steps.append(name if name is not None else int(step["index"]))
            position = step.end()
        if position != len(text) or not self._steps:
            raise ValueError(f"the sandbox cannot read the JSON path {text}")

    @property
    def sqlite(self) -> str:
        """The path in the syntax of SQLite's JSON functions."""
        return "$" + "".join(
            f"[{step}]" if isinstance(step, int) else f'."{step}"'
            for step in self._steps
        )

    def find(self, document: Any) -> Any:
        """Return the value at the path.

        :raises LookupError: if *document* has no value there.
        """
        for step in self._steps:
            if not isinstance(document, list if isinstance(step, int) else dict):
                raise LookupError(step)
            document = document[step]  # type: ignore[index]
        return document


def to_float(text: str) -> float:
    """Convert *text* as ClickHouse's ``toFloat64`` does, or raise ValueError."""
    if "_" in text or not text.isascii() or text != text.strip():
        raise ValueError(f"could not convert string to float: {text!r}")
    return float(text)


#: Seconds of the windows whose length is the same in all time zones.
_SECONDS = {"MINUTE": 60, "HOUR": 3600}
#: The sizes of windows.
SIZES = ("MINUTE", "HOUR", "DAY", "MONTH")


def window_start(moment: int, size: str, zone: str) -> int:
    """Return the start of the window that contains *moment*, in Unix seconds."""
    if size == "MINUTE":
        return moment - moment % 60
    # The offsets of all current time zones are multiples of 15 minutes: so all moments
    # of a quarter of an hour have one start, which is cached.
    return _start(moment - moment % 900, size, zone)


@lru_cache(maxsize=65_536)
def _start(moment: int, size: str, zone: str) -> int:
    local = datetime.fromtimestamp(moment, ZoneInfo(zone))
    if size == "HOUR":
        # Replacing the minutes would merge the two hours repeated by a clock change.
        return moment - local.minute * 60 - local.second
    midnight = local.replace(hour=0, minute=0, second=0, fold=0)
    if size == "MONTH":
        midnight = midnight.replace(day=1)
    return int(midnight.timestamp())


def window_end(start: int, size: str, zone: str) -> int:
    """Return the end of the window that begins at *start*, in Unix seconds."""
    if seconds := _SECONDS.get(size):
        return start + seconds
    local = datetime.fromtimestamp(start, ZoneInfo(zone))
    # 32 days after the first day of a month is a day of the next month.
    beyond = local + timedelta(days=1 if size == "DAY" else 32)
    if size == "MONTH":
        beyond = beyond.replace(day=1)
    return int(beyond.timestamp())


def local_time(moment: int, zone: str) -> str:
    """Return Unix *moment* as OpenMeter writes it, in the time zone *zone*."""
    if zone == "UTC":
        return rfc3339(moment)
    return datetime.fromtimestamp(moment, ZoneInfo(zone)).isoformat()


Meter = dict[str, Any]

Row = dict[str, Any]
#: SQL for the value as a number: a number, or text that is one. Other values are NULL,
#: which aggregates ignore.
NUMBER = """CASE json_type(data, :value)
    WHEN 'integer' THEN CAST(json_extract(data, :value) AS REAL)
    WHEN 'real' THEN json_extract(data, :value)
    WHEN 'text' THEN to_number(json_extract(data, :value)) END"""

#: SQL for a value as text, like ClickHouse's JSON_VALUE: a missing value, an object or
#: an array is empty text.
TEXT = """CASE json_type(data, :{0})
    WHEN 'null' THEN 'null' WHEN 'true' THEN 'true' WHEN 'false' THEN 'false'
    WHEN 'object' THEN '' WHEN 'array' THEN ''
    ELSE coalesce(CAST(json_extract(data, :{0}) AS TEXT), '') END"""

AGGREGATES = {
    "COUNT": "count(*)",
    "SUM": f"sum({NUMBER})",
    "AVG": f"avg({NUMBER})",
    "MIN": f"min({NUMBER})",
    "MAX": f"max({NUMBER})",
    "UNIQUE_COUNT": f"count(DISTINCT nullif({TEXT.format('value')}, 'null'))",
    "LATEST": f"latest(time, seq, {NUMBER})",
}


class Edge(NamedTuple):
    """The start or the end of a span of usage.

    An event is after the edge if its time is at or after *time* and its number of
    arrival is greater than *seq*. OpenMeter compares only times, in whole seconds. The
    number orders the events within a second, so that a reset in the sandbox takes
    effect at once.
    """

    #: Unix seconds.
    time: int
    #: The number of the last event before the edge; 0 if only the time decides.
    seq: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A query of a meter: the selected events, and the groups of the result."""

    #: The half-open range of times [start, end) in Unix seconds; None is unlimited.
    start: int | None = None
    end: int | None = None
    #: The size of time windows, one of `SIZES`; None for the usage in total.
    window: str | None = None
    #: The time zone of the windows.
    zone: str = "UTC"
    #: None selects all subjects, an empty sequence none.
    subjects: Sequence[str] | None = None
    #: The ids of the selected customers, by the subjects that they pay for.
    customers: Mapping[str, str] | None = None
    group_by: Sequence[str] = ()
    #: The selected values by the name of a dimension.
    filters: Mapping[str, Sequence[str]] | None = None
    #: The number of the last visible event; None if all events are visible.
    horizon: int | None = None
    #: Select the events after this edge.
    after: Edge | None = None
    #: Select the events that are not after this edge.
    before: Edge | None = None


def usage(connection: sqlite3.Connection, meter: Meter, query: Query) -> list[Row]:
    """Return the rows of *meter*, as ``GET /api/v1/meters/{meter}/query`` does."""
    statement = _Statement(meter, query)
    rows = connection.execute(statement.sql, statement.parameters)
    return [_row(meter, query, values) for values in rows if values[3] is not None]


class _Statement:
    """The SQL of a query; all values are bound parameters."""

    def __init__(self, meter: Meter, query: Query) -> None:
        self.parameters: dict[str, Any] = {"type": meter["eventType"]}
        if path := meter.get("valueProperty"):
            self.parameters["value"] = JsonPath(path).sqlite
        self._paths = meter.get("groupBy", {})
        self._customers = query.customers
        groups = [self._group(name) for name in query.group_by]
        window = "0"
        if query.window:
            window = "window_start(time, :window, :zone)"
            self.parameters |= {"window": query.window, "zone": query.zone}
        columns = [window, "min(time)", "max(time)", AGGREGATES[meter["aggregation"]]]
        self.sql = (
            f"SELECT {', '.join(columns + groups)} FROM events"  # noqa: S608
            f" WHERE {' AND '.join(self._conditions(meter, query))}"
            f" GROUP BY {self._group_columns(len(groups))} ORDER BY 1"
        )

    @staticmethod
    def _group_columns(groups: int) -> str:
        return ", ".join(["1", *(str(5 + index) for index in range(groups))])

    def _bind(self, value: Any) -> str:
        """Add a parameter with *value* and return its name."""
        name = f"p{len(self.parameters)}"
        self.parameters[name] = value
        return name

    def _group(self, name: str) -> str:
        if name == "subject":
            return "subject"
        if name == "customer_id" and self._customers:
            cases = (f"WHEN :{self._bind(subject)} THEN :{self._bind(customer)}"
                     for subject, customer in self._customers.items())  # fmt: skip
            return f"CASE subject {' '.join(cases)} END"
        return TEXT.format(self._bind(JsonPath(self._paths[name]).sqlite))

    def _conditions(self, meter: Meter, query: Query) -> list[str]:
        start = query.start
        if since := meter.get("eventFrom"):
            start = max(start or 0, parse_time(since))
        limits = {
            "time >=": start,
            "time <": query.end,
            "seq <=": query.horizon,
        }
        conditions = ["type = :type"]
        conditions += [
            f"{term} :{self._bind(limit)}"
            for term, limit in limits.items()
            if limit is not None
        ]
        choices = [("subject", query.subjects), ("subject", query.customers)]
        choices += [
            (self._group(n), found) for n, found in (query.filters or {}).items()
        ]
        conditions += [
            f"{column} IN ({self._list(list(values))})"
            for column, values in choices
            if values is not None
        ]
        return conditions + list(self._edges(query))

    def _edges(self, query: Query) -> Iterator[str]:
        if query.after is not None:
            time, seq = map(self._bind, query.after)
            # With the plus SQLite uses the index of arrivals, not the one of times.
            yield f"+time >= :{time} AND seq > :{seq}"
        if query.before is not None:
            time, seq = map(self._bind, query.before)
            yield f"(time < :{time} OR seq <= :{seq})"

    def _list(self, values: Sequence[str]) -> str:
        return ", ".join(f":{self._bind(value)}" for value in values)


def _row(meter: Meter, query: Query, values: tuple[Any, ...]) -> Row:
    window, first, last, value, *groups = values
    if isinstance(value, float) and not math.isfinite(value):
        raise Problem(500, reason=f"meter {meter['slug']}: value is infinite")
    zone = "UTC"
    if query.window:
        zone = query.zone
        # ClickHouse's DateTime has 32 bits and overflows in 2106.
        start, end = window, window_end(window, query.window, zone) % 2**32
    else:
        # Without windows OpenMeter returns the period of the query, or else the whole
        # minutes from the first to the last event.
        start = first - first % 60 if query.start is None else query.start
        end = (last - last % 60 + 60) % 2**32 if query.end is None else query.end
    named = dict(zip(query.group_by, groups, strict=True))
    row = {
        "value": tidy(value),
        "windowStart": local_time(start, zone),
        "windowEnd": local_time(end, zone),
        "subject": named.pop("subject", None),
    }
    if query.customers is not None:
        row["customerId"] = named.pop("customer_id")
    return row | {"groupBy": named}


#: Maximum number of sums in the cache.
KEPT = 4096


class UsageCache:
    """A cache of sums, which adds only newly arrived events to them. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: For each query: the number of the last event in the sum, and the sum.
        self._sums: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def usage(
        self, connection: sqlite3.Connection, meter: Meter, query: Query, start: Edge
    ) -> float:
        """Return the usage of *meter* that *query* selects, after *start*."""
        key = f"{meter['id']} {meter['updatedAt']} {start} {replace(query, horizon=0)}"
        newest = connection.execute(
            "SELECT max(seq) FROM events WHERE seq <= ?", (query.horizon,)
        ).fetchone()[0]
        with self._lock:
            seen, total = self._sums.pop(key, (0, 0.0))
            # Only these two can be added up. If the clock was set back, events that
            # were visible are hidden again.
            if meter["aggregation"] not in ("SUM", "COUNT") or seen > (newest or 0):
                seen, total = 0, 0.0
            after = Edge(start.time, max(start.seq, seen))
            rows = usage(connection, meter, replace(query, after=after))
            total += rows[0]["value"] if rows else 0.0
            self._sums[key] = newest or 0, total
            if len(self._sums) > KEPT:
                self._sums.popitem(last=False)
            return total


def install(connection: sqlite3.Connection) -> None:
    """Add the SQL functions of this module to *connection*."""
    connection.create_function("to_number", 1, to_number, deterministic=True)
    connection.create_function("window_start", 3, window_start, deterministic=True)
    connection.create_aggregate("latest", 3, Latest)  # type: ignore[arg-type]


class Latest:
    """The SQL aggregate ``latest``: the value of the newest event with a value."""

    def __init__(self) -> None:
        self._newest: tuple[int, int, float | None] = (-1, -1, None)

    def step(self, moment: int, seq: int, value: float | None) -> None:
        """Add one event."""
        if value is not None:
            self._newest = max(self._newest, (moment, seq, value))

    def finalize(self) -> float | None:
        """Return the newest value."""
        return self._newest[2]


@lru_cache(maxsize=4096)
def to_number(text: str) -> float | None:
    """Convert *text* as ClickHouse's ``toFloat64OrNull``; infinities become None."""
    try:
        value = to_float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None

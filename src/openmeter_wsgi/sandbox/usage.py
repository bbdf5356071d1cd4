"""Reading meters: the usage that events add up to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from openmeter_wsgi.sandbox.cloudevent import parse_time
from openmeter_wsgi.sandbox.metering import Path
from openmeter_wsgi.sandbox.problems import Problem
from openmeter_wsgi.sandbox.windows import rfc3339, window_end

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping, Sequence

Meter = dict[str, Any]
Row = dict[str, Any]

#: A number, or a text that is one; everything else is NULL, which no aggregate counts.
NUMBER = """CASE json_type(data, :value)
    WHEN 'integer' THEN CAST(json_extract(data, :value) AS REAL)
    WHEN 'real' THEN json_extract(data, :value)
    WHEN 'text' THEN to_number(json_extract(data, :value)) END"""
#: ClickHouse's JSON_VALUE: what is missing, an object or an array is the empty text.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """Which part of a meter is asked for, and how it is cut into rows."""

    start: int | None = None
    #: Exclusive.
    end: int | None = None
    window: str | None = None
    zone: str = "UTC"
    #: None is all of them, an empty sequence none.
    subjects: Sequence[str] | None = None
    group_by: Sequence[str] = ()
    #: Group-by name to the values that count.
    filters: Mapping[str, Sequence[str]] | None = None
    #: The number of the last event that counts; None for all of them.
    horizon: int | None = None
    #: The number of the one event that counts; None for all of them.
    only: int | None = None


def usage(connection: sqlite3.Connection, meter: Meter, query: Query) -> list[Row]:
    """Return the rows of *meter*, as ``GET /api/v1/meters/{meter}/query`` does."""
    statement = _Statement(meter, query)
    rows = connection.execute(statement.sql, statement.parameters)
    return [_row(meter, query, values) for values in rows if values[3] is not None]


class _Statement:
    """The SQL of one query, and its parameters: no value becomes part of the text."""

    def __init__(self, meter: Meter, query: Query) -> None:
        self.parameters: dict[str, Any] = {"type": meter["eventType"]}
        if path := meter.get("valueProperty"):
            self.parameters["value"] = Path(path).sqlite
        self._paths = meter.get("groupBy", {})
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
        name = f"p{len(self.parameters)}"
        self.parameters[name] = value
        return name

    def _group(self, name: str) -> str:
        if name == "subject":
            return "subject"
        return TEXT.format(self._bind(Path(self._paths[name]).sqlite))

    def _conditions(self, meter: Meter, query: Query) -> list[str]:
        conditions = ["type = :type"]
        start = query.start
        if since := meter.get("eventFrom"):
            start = max(start or 0, parse_time(since))
        if start is not None:
            conditions.append(f"time >= :{self._bind(start)}")
        if query.end is not None:
            conditions.append(f"time < :{self._bind(query.end)}")
        if query.horizon is not None:
            conditions.append(f"seq <= :{self._bind(query.horizon)}")
        if query.only is not None:
            conditions.append(f"seq = :{self._bind(query.only)}")
        if query.subjects is not None:
            conditions.append(f"subject IN ({self._list(query.subjects)})")
        for name, values in (query.filters or {}).items():
            conditions.append(f"{self._group(name)} IN ({self._list(values)})")
        return conditions

    def _list(self, values: Sequence[str]) -> str:
        return ", ".join(f":{self._bind(value)}" for value in values)


def _row(meter: Meter, query: Query, values: tuple[Any, ...]) -> Row:
    window, first, last, value, *groups = values
    if isinstance(value, float) and not math.isfinite(value):
        raise Problem(500, reason=f"meter {meter['slug']}: value is infinite")
    if query.window:
        start, end = window, window_end(window, query.window, query.zone)
    else:
        # Without windows OpenMeter answers with the period asked for, or else with
        # the whole minutes that hold events.
        start = first - first % 60 if query.start is None else query.start
        end = last - last % 60 + 60 if query.end is None else query.end
    named = dict(zip(query.group_by, groups, strict=True))
    return {
        "value": tidy(value),
        "windowStart": rfc3339(start),
        "windowEnd": rfc3339(end),
        "subject": named.pop("subject", None),
        "groupBy": named,
    }


def tidy(value: float) -> float:
    """Return *value* without a point where it is whole, as Go writes it."""
    return int(value) if float(value).is_integer() and abs(value) < 1e21 else value

"""The usage of a meter over time, divided by subject or by a dimension."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from openmeter_wsgi.sandbox.cloudevent import parse_time
from openmeter_wsgi.sandbox.metering import Path
from openmeter_wsgi.sandbox.usage import AGGREGATES, NUMBER, TEXT, Query, tidy, usage

if TYPE_CHECKING:
    import sqlite3

Document = dict[str, Any]

#: As many as have a colour and a pattern of their own.
CURVES = 8
GROUPS = 50


@dataclass(frozen=True, slots=True)
class View:
    """How the page looks at a meter."""

    #: The dimension that divides its usage.
    by: str = "subject"
    #: The only subject that is shown; None for all of them.
    subject: str | None = None


def meter_over_time(
    connection: sqlite3.Connection,
    meter: Document,
    times: range,
    *,
    view: View,
    horizon: int,
) -> Document:
    """Return a meter with its usage of all time, and in every column of *times*."""
    dimensions = list(meter.get("groupBy", {}))
    if view.by != "subject" and view.by not in dimensions:
        view = View(subject=view.subject)
    division = _Division(connection, meter, view, horizon)
    groups = division.totals()
    whole = usage(connection, meter, division.query())
    shown = [group["group"] for group in groups[:CURVES]]
    return {
        "slug": meter["slug"],
        "name": meter["name"],
        "aggregation": meter["aggregation"],
        "eventType": meter["eventType"],
        "valueProperty": meter.get("valueProperty"),
        "dimensions": dimensions,
        "by": view.by,
        "subject": view.subject,
        "value": whole[0]["value"] if whole else None,
        "events": sum(group["events"] for group in groups),
        "unusable": sum(group["unusable"] for group in groups),
        "groups": division.with_recent(groups[:GROUPS], times),
        "moreGroups": max(0, len(groups) - GROUPS),
        "curves": division.curves(shown, times),
    }


class _Division:
    """The queries of one meter, divided as *view* says."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        meter: Document,
        view: View,
        horizon: int,
    ) -> None:
        self._connection = connection
        self._view = view
        self._horizon = horizon
        self._aggregation = meter["aggregation"]
        self._group = "subject"
        path, since = meter.get("valueProperty"), meter.get("eventFrom")
        self._parameters: Document = {
            "type": meter["eventType"],
            "since": parse_time(since) if since else 0,
            "value": Path(path).sqlite if path else None,
            "horizon": horizon,
            "subject": view.subject,
        }
        if view.by != "subject":
            self._group = TEXT.format("dimension")
            self._parameters["dimension"] = Path(meter["groupBy"][view.by]).sqlite
        self._where = (
            "type = :type AND time >= :since AND seq <= :horizon"
            " AND (:subject IS NULL OR subject = :subject)"
        )

    def query(self) -> Query:
        """Return what asks for the whole."""
        subject = self._view.subject
        only = None if subject is None else (subject,)
        return Query(subjects=only, horizon=self._horizon)

    def totals(self) -> list[Document]:
        """Return the usage of every group, the greatest first."""
        counted = "count(*)"
        if self._aggregation not in ("COUNT", "UNIQUE_COUNT"):
            counted = f"count({NUMBER})"
        rows = self._connection.execute(
            f"SELECT {self._group}, {AGGREGATES[self._aggregation]}, count(*),"  # noqa: S608
            f" count(*) - {counted} FROM events WHERE {self._where}"
            " GROUP BY 1 ORDER BY 2 DESC, 1",
            self._parameters,
        )
        return [
            {"group": group, "value": _value(total), "events": events, "unusable": bad}
            for group, total, events, bad in rows
        ]

    def with_recent(self, groups: list[Document], times: range) -> list[Document]:
        """Return *groups* with what they used within *times*."""
        rows = self._connection.execute(
            f"SELECT {self._group}, {AGGREGATES[self._aggregation]} FROM events"  # noqa: S608
            f" WHERE {self._where} AND time >= :start AND time < :end GROUP BY 1",
            self._parameters | {"start": times.start, "end": times.stop},
        )
        recent = {group: _value(value) for group, value in rows}
        return [group | {"recent": recent.get(group["group"])} for group in groups]

    def curves(self, groups: list[str], times: range) -> list[Document]:
        """Return the usage in every column of the plot, per group."""
        names = {f"g{n}": group for n, group in enumerate(groups)}
        rows = self._connection.execute(
            f"SELECT {self._group}, (time - :start) / {times.step},"  # noqa: S608
            f" {AGGREGATES[self._aggregation]} FROM events"
            f" WHERE {self._where} AND time >= :start AND time < :end"
            f" AND {self._group} IN ({', '.join(f':{name}' for name in names)})"
            " GROUP BY 1, 2",
            self._parameters | names | {"start": times.start, "end": times.stop},
        )
        values: dict[str, list[float | None]] = {g: [None] * len(times) for g in groups}
        for group, column, value in rows:
            values[group][column] = _value(value)
        return [{"group": group, "values": values[group]} for group in groups]


def _value(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else tidy(value)

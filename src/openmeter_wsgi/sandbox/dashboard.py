"""What the page shows: usage over time, totals, and what nobody counts."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

from openmeter_wsgi.sandbox.cloudevent import parse_time
from openmeter_wsgi.sandbox.listing import Filter, Judge, select
from openmeter_wsgi.sandbox.metering import Path
from openmeter_wsgi.sandbox.usage import AGGREGATES, NUMBER, Query, tidy, usage
from openmeter_wsgi.sandbox.windows import rfc3339

if TYPE_CHECKING:
    import sqlite3

Document = dict[str, Any]

#: Columns of a plot, whatever time it spans.
COLUMNS = 60
#: As many as have a colour of their own.
CURVES = 8
SUBJECTS = 50
EVENTS = 40
UNCOUNTED = 10
#: Characters of an event's data.
EXCERPT = 400


def dashboard(
    connection: sqlite3.Connection, meters: list[Document], span: int, now: int
) -> Document:
    """Return what the page shows of the *span* seconds until *now*, and of all time."""
    step = max(1, span // COLUMNS)
    # Whole steps, so that columns keep their events as time goes on.
    end = (now // step + 1) * step
    times = range(end - step * COLUMNS, end, step)
    return {
        "times": list(times),
        "step": step,
        "stored": connection.execute("SELECT count(*) FROM events").fetchone()[0],
        "meters": [_meter(connection, meter, times) for meter in meters],
        "uncounted": _uncounted(connection, meters),
        "events": _events(connection, meters),
    }


def _meter(connection: sqlite3.Connection, meter: Document, times: range) -> Document:
    totals = _totals(connection, meter)
    shown = [total["subject"] for total in totals[:CURVES]]
    whole = usage(connection, meter, Query())
    return {
        "slug": meter["slug"],
        "name": meter["name"],
        "aggregation": meter["aggregation"],
        "eventType": meter["eventType"],
        "valueProperty": meter.get("valueProperty"),
        "value": whole[0]["value"] if whole else None,
        "events": sum(total["events"] for total in totals),
        "unusable": sum(total["unusable"] for total in totals),
        "subjects": totals[:SUBJECTS],
        "moreSubjects": max(0, len(totals) - SUBJECTS),
        "curves": _curves(connection, meter, shown, times),
    }


def _totals(connection: sqlite3.Connection, meter: Document) -> list[Document]:
    """Return the usage of every subject, the greatest first."""
    value = AGGREGATES[meter["aggregation"]]
    counted = "count(*)"
    if meter["aggregation"] not in ("COUNT", "UNIQUE_COUNT"):
        counted = f"count({NUMBER})"
    rows = connection.execute(
        f"SELECT subject, {value}, count(*), count(*) - {counted} FROM events"  # noqa: S608
        " WHERE type = :type AND time >= :since GROUP BY subject ORDER BY 2 DESC, 1",
        _parameters(meter),
    )
    return [
        {"subject": subject, "value": _value(total), "events": events, "unusable": bad}
        for subject, total, events, bad in rows
    ]


def _value(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else tidy(value)


def _parameters(meter: Document) -> Document:
    path = meter.get("valueProperty")
    since = meter.get("eventFrom")
    return {
        "type": meter["eventType"],
        "value": Path(path).sqlite if path else None,
        "since": parse_time(since) if since else 0,
    }


def _curves(
    connection: sqlite3.Connection, meter: Document, subjects: list[str], times: range
) -> list[Document]:
    """Return the usage in every column of the plot, per subject."""
    parameters = _parameters(meter) | {"start": times.start, "end": times.stop}
    names = {f"s{n}": subject for n, subject in enumerate(subjects)}
    rows = connection.execute(
        f"SELECT subject, (time - :start) / {times.step},"  # noqa: S608
        f" {AGGREGATES[meter['aggregation']]} FROM events"
        " WHERE type = :type AND time >= max(:since, :start) AND time < :end"
        f" AND subject IN ({', '.join(f':{name}' for name in names)}) GROUP BY 1, 2",
        parameters | names,
    )
    values: dict[str, list[float | None]] = {s: [None] * len(times) for s in subjects}
    for subject, column, value in rows:
        values[subject][column] = _value(value)
    return [{"subject": subject, "values": values[subject]} for subject in subjects]


def _uncounted(
    connection: sqlite3.Connection, meters: list[Document]
) -> list[Document]:
    """Return the types of events that no meter counts, with meters that would."""
    counted = list({meter["eventType"] for meter in meters})
    marks = ", ".join("?" * len(counted))
    rows = connection.execute(
        "SELECT type, count(*), count(DISTINCT subject), max(seq) FROM events"  # noqa: S608
        f" WHERE type NOT IN ({marks}) GROUP BY type ORDER BY 2 DESC LIMIT ?",
        (*counted, UNCOUNTED),
    ).fetchall()
    return [
        {
            "type": name,
            "events": events,
            "subjects": subjects,
            "suggestions": _suggestions(name, _data(connection, newest)),
        }
        for name, events, subjects, newest in rows
    ]


def _data(connection: sqlite3.Connection, seq: int) -> Document:
    row = connection.execute("SELECT data FROM events WHERE seq = ?", (seq,)).fetchone()
    return dict(json.loads(row[0])) if row and row[0] else {}


def _suggestions(event_type: str, data: Document) -> list[Document]:
    """Return definitions of meters for events of this type that look like *data*."""
    meters = [{"slug": _slug(event_type, "count"), "aggregation": "COUNT"}]
    for name, value in data.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and re.fullmatch(r"[\w-]+", name):
            meters.append(
                {
                    "slug": _slug(event_type, name),
                    "aggregation": "SUM",
                    "valueProperty": f"$.{name}",
                }
            )
    return [meter | {"eventType": event_type} for meter in meters[:4]]


def _slug(*parts: str) -> str:
    words = re.findall("[a-z0-9]+", " ".join(parts).lower())
    return "_".join(words)[:64].strip("_")


def _events(connection: sqlite3.Connection, meters: list[Document]) -> list[Document]:
    judge = Judge(meters, [])
    return [
        {
            "seq": seq,
            "id": id_,
            "source": source,
            "type": event_type,
            "subject": subject,
            "time": rfc3339(moment),
            "ingestedAt": rfc3339(ingested_at),
            "data": None if data is None else data[:EXCERPT],
            "flaws": judge.flaws(event_type, data),
        }
        for seq, id_, source, event_type, subject, moment, data, ingested_at in select(
            connection, Filter(), EVENTS, "seq"
        )
    ]

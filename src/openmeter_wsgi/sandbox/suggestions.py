"""What no meter counts, and the meters that would."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import sqlite3

Document = dict[str, Any]

UNCOUNTED = 10


def uncounted(connection: sqlite3.Connection, meters: list[Document]) -> list[Document]:
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

"""Events that arrived and were not stored, kept so that the page can say why."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Iterator

TABLES = """
CREATE TABLE IF NOT EXISTS turned_away (
    -- One row of numbers with the events that were stored: the order of arrival.
    seq INTEGER PRIMARY KEY,
    outcome TEXT NOT NULL,
    reason TEXT NOT NULL,
    position INTEGER NOT NULL,
    batch INTEGER NOT NULL,
    id TEXT,
    source TEXT,
    type TEXT,
    subject TEXT,
    -- Whole seconds, or whatever an event that was refused had there.
    time,
    data TEXT,
    ingested_at REAL NOT NULL
);
"""
#: The newest that are kept, and those of one request.
KEPT = 20_000
KEPT_OF_REQUEST = 1_000
#: Characters of an attribute, and of the data, of an event that fits no schema.
MAX_TEXT = 300
MAX_DATA = 10_000
_ATTRIBUTES = ("id", "source", "type", "subject", "time")


class Outcome(StrEnum):
    """What became of an event that arrived and was not stored."""

    DUPLICATE = "duplicate"
    #: From 1970 or earlier.
    DROPPED = "dropped"
    REFUSED = "refused"
    #: On purpose, or by data that OpenMeter answers with 500.
    FAILED = "failed"


class TurnedAway(NamedTuple):
    """One event that was not stored, in the order of the table's columns."""

    outcome: Outcome
    reason: str
    #: Its place in the request, from 1, and how many events came with it.
    position: int
    batch: int
    id: str | None = None
    source: str | None = None
    type: str | None = None
    subject: str | None = None
    time: int | str | None = None
    data: str | None = None


def insert(
    connection: sqlite3.Connection, rows: Iterable[TurnedAway], first: int, now: float
) -> None:
    """Write *rows* down under the numbers from *first*, and forget the oldest."""
    connection.executemany(
        "INSERT INTO turned_away VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [(seq, *row, now) for seq, row in enumerate(rows, first)],
    )
    connection.execute(
        "DELETE FROM turned_away WHERE seq <= (SELECT seq FROM turned_away"
        " ORDER BY seq DESC LIMIT 1 OFFSET ?)",
        (KEPT,),
    )


def of_request(
    body: bytes, outcome: Outcome, reason: str, culprit: int | None = None
) -> list[TurnedAway]:
    """Return what a request held that was answered with an error.

    :param culprit: the place of the event that the *reason* is about, from 1.
    """
    items = _items(body)
    shared = f"refused together with event {culprit} of its batch: {reason}"
    return [
        TurnedAway(
            outcome,
            reason if culprit in (None, position) else shared,
            position,
            len(items),
            **_texts(item),
        )
        for position, item in _kept(items, culprit)
    ]


def _kept(items: list[Any], culprit: int | None) -> Iterator[tuple[int, Any]]:
    for position, item in enumerate(items, 1):
        if position <= KEPT_OF_REQUEST or position == culprit:
            yield position, item


def _items(body: bytes) -> list[Any]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return [body.decode("utf-8", "replace")]
    if isinstance(document, list):
        return document or [None]
    return [document]


def _texts(item: Any) -> dict[str, Any]:
    """Return the attributes of something that may be no event at all, as texts."""
    if not isinstance(item, dict):
        return {"data": None if item is None else _text(item, MAX_DATA)}
    found = {n: _text(item[n], MAX_TEXT) for n in _ATTRIBUTES if n in item}
    if item.get("data") is not None:
        found["data"] = _text(item["data"], MAX_DATA)
    return found


def _text(value: Any, limit: int) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    # Halves of surrogate pairs are no text that could be stored.
    return text[:limit].encode("utf-8", "replace").decode()

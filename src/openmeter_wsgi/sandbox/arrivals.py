"""Everything that arrived, the newest first: what was stored and what was not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from openmeter_wsgi.sandbox.cloudevent import parse_time
from openmeter_wsgi.sandbox.metering import Path
from openmeter_wsgi.sandbox.turned_away import Outcome
from openmeter_wsgi.sandbox.usage import NUMBER
from openmeter_wsgi.sandbox.windows import rfc3339

if TYPE_CHECKING:
    import sqlite3

Document = dict[str, Any]

STORED = "stored"
#: Stored, and no meter can use it.
UNCOUNTED = "uncounted"
OUTCOMES = (STORED, UNCOUNTED, *Outcome)
#: How far matches are counted.
MOST_COUNTED = 10_000
_COMMON = "id, source, type, subject, time, data, ingested_at"
_STORED = f"SELECT seq, '{STORED}', NULL, NULL, NULL, {_COMMON} FROM events"  # noqa: S608
_AWAY = f"SELECT seq, outcome, reason, position, batch, {_COMMON} FROM turned_away"  # noqa: S608
_NAMES = (
    "seq", "outcome", "reason", "position", "batch", "id", "source", "type", "subject",
    "time", "data", "ingestedAt",
)  # fmt: skip


@dataclass(slots=True, kw_only=True)
class Search:
    """Which arrivals are wanted: an SQL condition grown term by term."""

    outcome: str | None = None
    terms: list[str] = field(default_factory=lambda: ["1"])
    parameters: Document = field(default_factory=dict)

    def where(self, term: str, **parameters: Any) -> None:
        """Require *term*, which names *parameters*."""
        self.terms.append(term)
        self.parameters |= parameters

    def containing(self, text: str) -> None:
        """Require each word of *text* somewhere: id, type, subject, source or data."""
        for number, word in enumerate(text.split()):
            name = f"word{number}"
            columns = ("id", "type", "subject", "source", "data")
            found = " OR ".join(f"{c} LIKE :{name} ESCAPE '\\'" for c in columns)
            escaped = word.replace("\\", r"\\").replace("%", r"\%").replace("_", r"\_")
            self.where(f"({found})", **{name: f"%{escaped}%"})

    def statement(self, meters: list[Document]) -> str:
        """Return the SELECT of all that match."""
        common = " AND ".join(self.terms)
        if self.outcome is None:
            return f"{_STORED} WHERE {common} UNION ALL {_AWAY} WHERE {common}"
        if self.outcome == STORED:
            return f"{_STORED} WHERE {common}"
        if self.outcome == UNCOUNTED:
            return f"{_STORED} WHERE {common} AND NOT {self._usable(meters)}"
        self.parameters["outcome"] = self.outcome
        return f"{_AWAY} WHERE {common} AND outcome = :outcome"

    def _usable(self, meters: list[Document]) -> str:
        terms = ["0"]
        for number, meter in enumerate(meters):
            type_, path, since = (
                f"{name}{number}" for name in ("type", "path", "from")
            )
            self.parameters |= {
                type_: meter["eventType"],
                since: parse_time(meter.get("eventFrom", "1970-01-01T00:00:00Z")),
            }
            term = f"type = :{type_} AND time >= :{since}"
            if meter["aggregation"] != "COUNT":
                self.parameters[path] = Path(meter["valueProperty"]).sqlite
                usable = NUMBER.replace(":value", f":{path}")
                if meter["aggregation"] == "UNIQUE_COUNT":
                    usable = f"nullif(json_type(data, :{path}), 'null')"
                term += f" AND ({usable}) IS NOT NULL"
            terms.append(f"({term})")
        return f"({' OR '.join(terms)})"


def newest(
    connection: sqlite3.Connection,
    search: Search,
    meters: list[Document],
    limit: int,
) -> list[Document]:
    """Return the newest *limit* arrivals that *search* wants."""
    rows = connection.execute(
        f"{search.statement(meters)} ORDER BY seq DESC LIMIT :limit",
        search.parameters | {"limit": limit},
    )
    return [document(row) for row in rows]


def count(
    connection: sqlite3.Connection, search: Search, meters: list[Document]
) -> int:
    """Return how many match; one more than `MOST_COUNTED` if there are more."""
    statement = f"SELECT count(*) FROM ({search.statement(meters)} LIMIT :most)"  # noqa: S608
    parameters = search.parameters | {"most": MOST_COUNTED + 1}
    return int(connection.execute(statement, parameters).fetchone()[0])


def document(row: tuple[Any, ...]) -> Document:
    """Return a row as the page reads it."""
    arrival: Document = dict(zip(_NAMES, row, strict=True))
    arrival["ingestedAt"] = rfc3339(arrival["ingestedAt"])
    if isinstance(arrival["time"], int):
        arrival["time"] = rfc3339(arrival["time"])
    return arrival

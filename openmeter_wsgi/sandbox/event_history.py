"""The page's list of arrivals, and the trace of one event.

An arrival is an event that arrived, stored or rejected. The trace shows all arrivals of
the same event, and for each meter the value that it counts or the reason why it counts
none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from flask import Blueprint, Response, jsonify, request

from openmeter_wsgi.sandbox.context import current_context
from openmeter_wsgi.sandbox.event_routes import Judge
from openmeter_wsgi.sandbox.meter_routes import flaw_of
from openmeter_wsgi.sandbox.request_validation import (
    Problem,
    integer,
    parse_time,
    refuse,
    rfc3339,
)
from openmeter_wsgi.sandbox.store import Outcome, subjects_of
from openmeter_wsgi.sandbox.usage import NUMBER, Edge, JsonPath, Query, usage

if TYPE_CHECKING:
    import sqlite3

    from openmeter_wsgi.sandbox.context import Context
    from openmeter_wsgi.sandbox.request_validation import Document


STORED = "stored"
#: Stored, but no meter can count it.
UNCOUNTED = "uncounted"
OUTCOMES = (STORED, UNCOUNTED, *Outcome)
#: Maximum number of matches that are counted.
MOST_COUNTED = 10_000
_COMMON = "id, source, type, subject, time, data, ingested_at"
_STORED = f"SELECT seq, '{STORED}', NULL, NULL, NULL, {_COMMON} FROM events"  # noqa: S608
_REJECTED = f"SELECT seq, outcome, reason, position, batch, {_COMMON} FROM rejected"  # noqa: S608
_NAMES = (
    "seq", "outcome", "reason", "position", "batch", "id", "source", "type", "subject",
    "time", "data", "ingestedAt",
)  # fmt: skip


@dataclass(slots=True, kw_only=True)
class Search:
    """A search for arrivals: an SQL condition, made of terms."""

    meters: list[Document]
    outcome: str | None = None
    terms: list[str] = field(default_factory=lambda: ["1"])
    parameters: Document = field(default_factory=dict)

    def add_term(self, term: str, **parameters: Any) -> None:
        """Add *term* to the condition, with its *parameters*."""
        self.terms.append(term)
        self.parameters |= parameters

    def add_words(self, text: str) -> None:
        """Require each word of *text* in the id, type, subject, source or data."""
        for number, word in enumerate(text.split()):
            name = f"word{number}"
            columns = ("id", "type", "subject", "source", "data")
            matches = " OR ".join(f"{c} LIKE :{name} ESCAPE '\\'" for c in columns)
            escaped = word.replace("\\", r"\\").replace("%", r"\%").replace("_", r"\_")
            self.add_term(f"({matches})", **{name: f"%{escaped}%"})

    def statement(self) -> str:
        """Return the SELECT statement of all matches."""
        common = " AND ".join(self.terms)
        if self.outcome is None:
            return f"{_STORED} WHERE {common} UNION ALL {_REJECTED} WHERE {common}"
        if self.outcome == STORED:
            return f"{_STORED} WHERE {common}"
        if self.outcome == UNCOUNTED:
            return f"{_STORED} WHERE {common} AND NOT {self._usable()}"
        self.parameters["outcome"] = self.outcome
        return f"{_REJECTED} WHERE {common} AND outcome = :outcome"

    def _usable(self) -> str:
        """Return the condition that at least one meter can count the event."""
        terms = ["0"]
        for number, meter in enumerate(self.meters):
            type_, path, since = (
                f"{name}{number}" for name in ("type", "path", "from")
            )
            self.parameters |= {
                type_: meter["eventType"],
                since: parse_time(meter.get("eventFrom", "1970-01-01T00:00:00Z")),
            }
            term = f"type = :{type_} AND time >= :{since}"
            if meter["aggregation"] != "COUNT":
                self.parameters[path] = JsonPath(meter["valueProperty"]).sqlite
                usable = NUMBER.replace(":value", f":{path}")
                if meter["aggregation"] == "UNIQUE_COUNT":
                    usable = f"nullif(json_type(data, :{path}), 'null')"
                term += f" AND ({usable}) IS NOT NULL"
            terms.append(f"({term})")
        return f"({' OR '.join(terms)})"


def newest(
    connection: sqlite3.Connection, search: Search, limit: int
) -> list[Document]:
    """Return the newest arrivals that match *search*, at most *limit*."""
    rows = connection.execute(
        f"{search.statement()} ORDER BY seq DESC LIMIT :limit",
        search.parameters | {"limit": limit},
    )
    return [document(row) for row in rows]


def count(connection: sqlite3.Connection, search: Search) -> int:
    """Return the number of matches; `MOST_COUNTED` + 1 if there are more."""
    statement = f"SELECT count(*) FROM ({search.statement()} LIMIT :most)"  # noqa: S608
    parameters = search.parameters | {"most": MOST_COUNTED + 1}
    return int(connection.execute(statement, parameters).fetchone()[0])


def document(row: tuple[Any, ...]) -> Document:
    """Return a row in the form that the page expects."""
    arrival: Document = dict(zip(_NAMES, row, strict=True))
    arrival["ingestedAt"] = rfc3339(arrival["ingestedAt"])
    if isinstance(arrival["time"], int):
        arrival["time"] = rfc3339(arrival["time"])
    return arrival


#: Maximum number of arrivals of the same event in a trace; the oldest are omitted.
ARRIVALS = 100


def trace(
    connection: sqlite3.Connection, context: Context, seq: int
) -> Document | None:
    """Return the trace of arrival number *seq*, or None if it is unknown."""
    meters = context.meters.within(connection)
    one = Search(meters=meters)
    one.add_term("seq = :seq", seq=seq)
    found = newest(connection, one, 1)
    if not found:
        return None
    (event,) = found
    is_stored = event["outcome"] == STORED
    return {
        "event": event,
        "customer": _customer(event["subject"], context.customers.within(connection)),
        "arrivals": _arrivals(connection, event),
        "visible": seq <= context.store.horizon(connection),
        "meters": [_verdict(connection, event, m) for m in meters] if is_stored else [],
    }


def _customer(subject: str | None, customers: list[Document]) -> str | None:
    for customer in customers:
        if subject in subjects_of(customer):
            return str(customer.get("key", customer["id"]))
    return None


def _arrivals(connection: sqlite3.Connection, event: Document) -> list[Document]:
    """Return the arrivals of the same event, the oldest first.

    Two events are the same if their keys in OpenMeter are the same (`Event.key`).
    """
    if event["id"] is None or event["source"] is None:
        return [event]
    same = Search(meters=[])
    key = f"{event['source']}-{event['id']}"
    same.add_term("source || '-' || id = :key", key=key)
    return newest(connection, same, ARRIVALS)[::-1]


def _verdict(
    connection: sqlite3.Connection, event: Document, meter: Document
) -> Document:
    """Return the value that *meter* counts for a stored event, or why it does not."""
    verdict = {
        "slug": meter["slug"],
        "name": meter["name"],
        "aggregation": meter["aggregation"],
        "valueProperty": meter.get("valueProperty"),
    }
    if why := _refusal(event, meter):
        return verdict | {"counted": False, "why": why}
    after, before = Edge(0, event["seq"] - 1), Edge(0, event["seq"])
    groups = tuple(meter.get("groupBy", ()))
    query = Query(group_by=groups, after=after, before=before)
    rows = usage(connection, meter, query)
    if not rows:
        return verdict | {"counted": False, "why": "it has no value for this meter"}
    return verdict | {
        "counted": True,
        "value": rows[0]["value"],
        "groupBy": rows[0]["groupBy"],
    }


def _refusal(event: Document, meter: Document) -> str | None:
    if event["type"] != meter["eventType"]:
        return f"counts events of type {meter['eventType']}"
    since = meter.get("eventFrom")
    if since and parse_time(event["time"]) < parse_time(since):
        return f"counts events from {since} on"
    return flaw_of(meter, event["data"])


#: Maximum number of arrivals in a response.
MOST = 1_000
#: Maximum number of characters of an event's data in the list; the trace has all.
EXCERPT = 300
#: The greatest number of SQLite.
_LAST = 2**63 - 1
#: Maximum number of types, and of subjects, that are offered as filters.
NAMES = 200

routes: Final = Blueprint("arrivals", __name__, url_prefix="/sandbox/api/arrivals")


@routes.get("")
def _list() -> Response:
    context = current_context()
    limit = integer(request.args, "limit", 100, 1, MOST)
    with context.store.reading() as connection:
        meters = context.meters.within(connection)
        search = _search(meters)
        found = newest(connection, search, limit)
        body: Document = {"arrivals": _judged(found, meters)}
        if "after" not in request.args:
            body |= {"matches": count(connection, search)}
            body |= _names(connection)
    body["meters"] = [meter["slug"] for meter in meters]
    return jsonify(body)


def _search(meters: list[Document]) -> Search:
    arguments = request.args
    outcome = arguments.get("outcome") or None
    if outcome is not None and outcome not in OUTCOMES:
        raise refuse("outcome", f"value is not one of {', '.join(OUTCOMES)}")
    search = Search(meters=meters, outcome=outcome)
    search.add_term("seq > :after", after=integer(arguments, "after", 0, 0, _LAST))
    for name in ("type", "subject"):
        if arguments.get(name):
            search.add_term(f"{name} = :{name}", **{name: arguments[name]})
    search.add_words(arguments.get("search", "")[:200])
    return search


def _judged(found: list[Document], meters: list[Document]) -> list[Document]:
    judge = Judge(meters, [])
    for arrival in found:
        if arrival["outcome"] == STORED:
            arrival["flaws"] = judge.flaws(arrival["type"], arrival["data"])
        if arrival["data"] is not None:
            arrival["data"] = arrival["data"][:EXCERPT]
    return found


def _names(connection: sqlite3.Connection) -> Document:
    """Return the types and the subjects of stored events, for the filters."""
    found = {}
    for name in ("type", "subject"):
        statement = f"SELECT DISTINCT {name} FROM events ORDER BY 1 LIMIT ?"  # noqa: S608
        found[f"{name}s"] = [row[0] for row in connection.execute(statement, (NAMES,))]
    return found


@routes.get("/<int:seq>")
def _trace(seq: int) -> Response:
    context = current_context()
    with context.store.reading() as connection:
        result = trace(connection, context, min(seq, _LAST))
    if result is None:
        raise Problem(404, f"arrival {seq} does not exist; it may have been deleted")
    return jsonify(result | {"dedupe": context.store.dedupe})

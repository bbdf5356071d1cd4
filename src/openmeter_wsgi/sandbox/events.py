"""Listing events: v1 by time, v2 in pages, with the flaws that OpenMeter names."""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flask import Blueprint, jsonify, request

from openmeter_wsgi.sandbox.context import context
from openmeter_wsgi.sandbox.meters import flaw_of
from openmeter_wsgi.sandbox.protocol import (
    Problem,
    check,
    integer,
    moment,
    refuse,
    rfc3339,
)
from openmeter_wsgi.sandbox.store import subjects_of

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable

    from flask import Response

    from openmeter_wsgi.sandbox.protocol import Document, Schema


_COLUMNS = "seq, id, source, type, subject, time, data, ingested_at"


@dataclass(slots=True)
class Filter:
    """Which events are listed: an SQL condition grown term by term."""

    terms: list[str] = field(default_factory=lambda: ["1"])
    values: list[Any] = field(default_factory=list)

    def where(self, term: str, *values: Any) -> None:
        """Require *term*, which has a question mark for each of *values*."""
        self.terms.append(term)
        self.values.extend(values)

    def where_in(self, column: str, values: Iterable[str]) -> None:
        """Require *column* to be one of *values*."""
        wanted = list(values)
        self.where(f"{column} IN ({', '.join('?' * len(wanted))})", *wanted)


def select(
    connection: sqlite3.Connection, chosen: Filter, limit: int, order: str = "time"
) -> list[tuple[Any, ...]]:
    """Return the newest events by *order*, as rows of the table."""
    return connection.execute(
        f"SELECT {_COLUMNS} FROM events WHERE {' AND '.join(chosen.terms)}"  # noqa: S608
        f" ORDER BY {order} DESC, seq DESC LIMIT ?",
        (*chosen.values, limit),
    ).fetchall()


class Judge:
    """Says of an event what OpenMeter's list of events says of it."""

    def __init__(self, meters: list[Document], customers: list[Document]) -> None:
        self._meters: dict[str, list[Document]] = {}
        for meter in meters:
            self._meters.setdefault(meter["eventType"], []).append(meter)
        self._customers: dict[str, str] = {}
        for customer in customers:
            for subject in subjects_of(customer):
                self._customers.setdefault(subject, customer["id"])

    def flaws(self, event_type: str, data: str | None) -> list[str]:
        """Return why meters do not count an event."""
        meters = self._meters.get(event_type)
        if not meters:
            return [f"no meter found for event type: {event_type}"]
        return [flaw for meter in meters if (flaw := flaw_of(meter, data))]

    def document(self, row: tuple[Any, ...]) -> Document:
        """Return a row of `select` as the API lists it."""
        _, id_, source, event_type, subject, moment, data, ingested_at = row
        event: Document = {
            "specversion": "1.0",
            "id": id_,
            "source": source,
            "type": event_type,
            "subject": subject,
            "time": rfc3339(moment),
        }
        if data is not None:
            event |= {"datacontenttype": "application/json", "data": json.loads(data)}
        arrived = rfc3339(ingested_at)
        listed = {"event": event, "ingestedAt": arrived, "storedAt": arrived}
        flaws = self.flaws(event_type, data)
        if customer := self._customers.get(subject):
            listed["customerId"] = customer
        else:
            flaws.append(f"no customer found for event subject: {subject}")
        return listed | {"validationError": "\n".join(flaws)} if flaws else listed


#: OpenMeter lists no events older than this.
HORIZON = 32 * 24 * 3600
_OPERATORS = {"$eq": "=", "$ne": "<>", "$like": "LIKE"}
_TEXT: Schema = {"type": "string"}
_CONDITION: Schema = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        **dict.fromkeys(_OPERATORS, _TEXT),
        "$in": {"type": "array", "items": _TEXT},
    },
}
#: The part of OpenMeter's filters that the sandbox knows; it refuses the others.
FILTER: Schema = {
    "type": "object",
    "additionalProperties": False,
    "properties": dict.fromkeys(("id", "source", "type", "subject"), _CONDITION),
}

routes = Blueprint("events", __name__)


def _fetch(chosen: Filter, limit: int) -> tuple[Judge, list[tuple[Any, ...]]]:
    here = context()
    with here.store.reading() as connection:
        meters = here.meters.within(connection)
        judge = Judge(meters, here.customers.within(connection))
        return judge, select(connection, chosen, limit)


@routes.get("/api/v1/events")
def _list_v1() -> Response:
    judge, rows = _fetch(_v1_filter(), _limit())
    return jsonify([judge.document(row) for row in rows])


@routes.get("/api/v2/events")
def _list_v2() -> Response:
    limit = _limit()
    judge, rows = _fetch(_v2_filter(), limit)
    body: dict[str, Any] = {"items": [judge.document(row) for row in rows]}
    if len(rows) == limit:
        body["nextCursor"] = _cursor(rows[-1])
    return jsonify(body)


def _limit() -> int:
    return integer(request.args, "limit", 100, 1, 100)


def _v1_filter() -> Filter:
    arguments = request.args
    chosen = _period()
    for name, term in (("id", "instr(id, ?)"), ("subject", "subject = ?")):
        if name in arguments:
            chosen.where(term, arguments[name])
    if wanted := arguments.getlist("customerId"):
        found = [context().customers.get(customer) for customer in wanted]
        chosen.where_in("subject", [s for one in found for s in subjects_of(one)])
    for name, term in (("ingestedAtFrom", ">="), ("ingestedAtTo", "<=")):
        if (limit := moment(arguments.get(name), name)) is not None:
            chosen.where(f"ingested_at {term} ?", limit)
    return chosen


def _period() -> Filter:
    chosen = Filter()
    horizon = int(context().store.clock()) - HORIZON
    start = moment(request.args.get("from"), "from")
    # A minute of grace, for a client that counts the days itself.
    if start is not None and start < horizon - 60:
        raise Problem(400, f"from must be after {rfc3339(horizon)}")
    end = moment(request.args.get("to"), "to")
    if end is not None and start is not None and end < start:
        raise Problem(400, "to must be after from")
    chosen.where("time >= ?", horizon if start is None else start)
    if end is not None:
        chosen.where("time < ?", end)
    return chosen


def _v2_filter() -> Filter:
    chosen = Filter()
    if cursor := request.args.get("cursor"):
        at, seq = _read_cursor(cursor)
        chosen.where("(time, seq) < (?, ?)", at, seq)
    for name, condition in _conditions().items():
        for operator, value in condition.items():
            if operator == "$in":
                chosen.where_in(name, value)
            else:
                chosen.where(f"{name} {_OPERATORS[operator]} ?", value)
    return chosen


def _conditions() -> dict[str, dict[str, Any]]:
    try:
        conditions: dict[str, dict[str, Any]] = json.loads(
            request.args.get("filter", "{}")
        )
    except ValueError:
        raise refuse("filter", "value must be a JSON object") from None
    if flaw := check(FILTER, conditions):
        raise refuse("filter", str(flaw))
    return conditions


def _cursor(row: tuple[Any, ...]) -> str:
    return base64.urlsafe_b64encode(f"{row[5]},{row[0]}".encode()).decode()


def _read_cursor(cursor: str) -> tuple[int, int]:
    try:
        at, _, seq = base64.urlsafe_b64decode(cursor).decode().partition(",")
        return int(at), int(seq)
    except (ValueError, binascii.Error):
        raise refuse("cursor", "invalid cursor") from None

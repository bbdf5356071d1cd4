"""The routes that list events: v1 by time, v2 in pages with filters.

Each event is listed with the reasons why meters do not count it.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from typing import TYPE_CHECKING, Any, Final

from flask import Blueprint, jsonify, request

from openmeter_wsgi.sandbox.context import current_context
from openmeter_wsgi.sandbox.meter_routes import flaw_of
from openmeter_wsgi.sandbox.request_validation import (
    ULID,
    Problem,
    check,
    integer,
    moment,
    parse_time,
    refuse,
    rfc3339,
)
from openmeter_wsgi.sandbox.store import subjects_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flask import Response

    from openmeter_wsgi.sandbox.request_validation import Document, Schema

_COLUMNS = "seq, id, source, type, subject, time, data, ingested_at, stored_at"
#: Maximum age of events that OpenMeter lists, in seconds.
MAX_AGE = 32 * 24 * 3600
#: An SQL condition and its parameters.
Term = tuple[str, list[Any]]
_TRUE: Term = ("1", [])

routes: Final = Blueprint("events", __name__)


@routes.get("/api/v1/events")
def _list_v1() -> Response:
    return jsonify(list_events([*_period(), *_v1_terms()], _limit())[0])


@routes.get("/api/v2/events")
def _list_v2() -> Response:
    limit = _limit()
    items, last = list_events(_v2_terms(), limit)
    body: Document = {"items": items}
    if last is not None and len(items) == limit:
        body["nextCursor"] = cursor_of(last)
    return jsonify(body)


def list_events(
    terms: list[Term], limit: int
) -> tuple[list[Document], tuple[Any, ...] | None]:
    """Return the newest *limit* events that match *terms*, and the last one's row."""
    context = current_context()
    conditions = " AND ".join(f"({term})" for term, _ in terms)
    values = [value for _, found in terms for value in found]
    with context.store.reading() as connection:
        # Lists leave out events that the sink has not stored yet.
        horizon = context.store.horizon(connection)
        rows = connection.execute(
            f"SELECT {_COLUMNS} FROM events WHERE seq <= ? AND {conditions}"  # noqa: S608
            " ORDER BY time DESC, seq DESC LIMIT ?",
            (horizon, *values, limit),
        ).fetchall()
        meters = context.meters.within(connection)
        judge = Judge(meters, context.customers.within(connection))
    return [judge.document(row) for row in rows], rows[-1] if rows else None


def _limit() -> int:
    return integer(request.args, "limit", 100, 1, 100)


def _period() -> list[Term]:
    start = moment(request.args.get("from"), "from")
    oldest = _check_age("from date is too old: {0}, must be after {1}", start)
    end = moment(request.args.get("to"), "to")
    if start is None:
        start = oldest
    terms: list[Term] = [("time >= ?", [start])]
    if end is not None:
        if end < start:
            dates = f"{rfc3339(end)} < {rfc3339(start)}"
            raise _invalid_input(f"to date is before from date: {dates}")
        terms.append(("time < ?", [end]))
    return terms


def _check_age(sentence: str, start: int | None) -> int:
    """Return the oldest time of listed events; answer 400 if *start* is older."""
    oldest = int(current_context().store.clock()) - MAX_AGE
    if start is not None and start <= oldest:
        raise _invalid_input(sentence.format(rfc3339(start), rfc3339(oldest)))
    return oldest


def _invalid_input(detail: str) -> Problem:
    return Problem(400, f"validation error: validate input: {detail}")


def _v1_terms() -> Iterable[Term]:
    arguments = request.args
    if wanted := arguments.get("id"):
        yield _like("id", f"%{wanted}%")
    if wanted := arguments.get("subject"):
        yield "subject = ?", [wanted]
    if "customerId" in arguments:
        ids = arguments.getlist("customerId")
        schema: Schema = {"type": "array", "items": {"type": "string", "pattern": ULID}}
        if flaw := check(schema, ids):
            raise refuse("customerId", str(flaw))
        yield _of_customers(ids)
    since = moment(arguments.get("ingestedAtFrom"), "ingestedAtFrom")
    _check_age("ingestedAtFrom date is too old, must be after: {0}: {1}", since)
    until = moment(arguments.get("ingestedAtTo"), "ingestedAtTo")
    for sign, limit in ((">=", since), ("<=", until)):
        if limit is not None:
            yield f"ingested_at {sign} ?", [limit]


def _of_customers(ids: list[str]) -> Term:
    customers = [one for one in current_context().customers.all() if one["id"] in ids]
    return one_of("subject", [s for one in customers for s in subjects_of(one)])


def one_of(column: str, values: list[Any]) -> Term:
    """Return the condition that the value in *column* is one of *values*."""
    return f"{column} IN ({', '.join('?' * len(values))})", values


def _like(column: str, pattern: str) -> Term:
    """Return the condition of a case-sensitive LIKE, as in ClickHouse."""
    glob = re.sub(r"[*?\[]", lambda match: f"[{match[0]}]", pattern)
    return f"{column} GLOB ?", [glob.replace("%", "*").replace("_", "?")]


#: The columns by the fields of a filter of version 2. Other fields are ignored.
_FIELDS = {
    "id": "id",
    "source": "source",
    "subject": "subject",
    "type": "type",
    "time": "time",
    "ingestedAt": "ingested_at",
    "storedAt": "stored_at",
    "customerId": "customer",
}
_TIMES = ("time", "ingestedAt", "storedAt")
_SIGNS = {"$eq": "=", "$ne": "<>", "$gt": ">", "$gte": ">=", "$lt": "<", "$lte": "<="}
_MAX_DEPTH = 20
_LISTS = ("$in", "$nin", "$and", "$or")


def _v2_terms() -> list[Term]:
    terms = [_TRUE]
    if cursor := request.args.get("cursor"):
        terms.append(("(time, seq) < (?, ?)", list(read_cursor(cursor))))
    for name, condition in _conditions().items():
        if name in _FIELDS:
            terms.append(_term(name, condition))
    return terms


def _conditions() -> Document:
    text = request.args.get("filter", "{}")
    error = "unmarshaling param filter: Error unmarshaling parameter filter as JSON"
    try:
        conditions = json.loads(text)
    except (ValueError, RecursionError):
        first = f"invalid character {text[:1]!r} looking for beginning of value"
        raise Problem(400, f"{error}: {first}") from None
    if not isinstance(conditions, dict):
        raise Problem(400, f"{error}: expected an object")
    return conditions


def _term(name: str, condition: Any, depth: int = 1) -> Term:
    if not isinstance(condition, dict) or depth > _MAX_DEPTH:
        reason = f"expected an object, at most {_MAX_DEPTH} deep"
        raise Problem(400, f"unmarshaling param filter: {name}: {reason}")
    if not condition:
        return _TRUE
    if len(condition) > 1:
        detail = "validation error: filter is invalid: multiple operators are set"
        raise _invalid_input(f"{name}: {detail}")
    ((operator, value),) = condition.items()
    if operator in _LISTS and not isinstance(value, list):
        raise _invalid_input(f"{name}: {operator} takes a list")
    if operator in ("$and", "$or"):
        parts = [_term(name, part, depth + 1) for part in value] or [_TRUE]
        joined = f" {operator[1:].upper()} ".join(f"({term})" for term, _ in parts)
        return joined, [value for _, values in parts for value in values]
    if name == "customerId":
        ids = value if isinstance(value, list) else [value]
        return _of_customers(ids) if operator in ("$in", "$eq") else _TRUE
    return _comparison(name, operator, value)


def _comparison(name: str, operator: str, value: Any) -> Term:
    column = _FIELDS[name]
    values = [_value(name, one) for one in (value if operator in _LISTS else [value])]
    if operator in ("$in", "$nin"):
        term, values = one_of(column, values)
        return f"{'NOT ' * (operator == '$nin')}{term}", values
    if operator in _SIGNS:
        return f"{column} {_SIGNS[operator]} ?", values
    if operator == "$like":
        return _like(column, str(value))
    raise Problem(501, f"the sandbox does not offer {operator} in a filter")


def _value(name: str, value: Any) -> Any:
    if name not in _TIMES:
        return str(value)
    try:
        return parse_time(str(value))
    except ValueError:
        raise _invalid_input(f"{name}: {value!r} is no time") from None


def cursor_of(row: tuple[Any, ...]) -> str:
    """Return the cursor of the page that begins after *row*."""
    return base64.urlsafe_b64encode(f"{row[5]},{row[0]}".encode()).decode()


def read_cursor(cursor: str) -> tuple[int, int]:
    """Return the time and the number of the row after which the page begins."""
    try:
        at, _, seq = base64.urlsafe_b64decode(cursor).decode().partition(",")
        return min(int(at), 2**62), min(int(seq), 2**62)
    except (ValueError, binascii.Error):
        detail = "validation error: decode cursor: illegal base64 data at input byte 0"
        raise Problem(400, detail) from None


class Judge:
    """A converter of events to the API's form, with the reasons why meters ignore them.

    *customers* are the payers of the events.
    """

    def __init__(self, meters: list[Document], customers: list[Document]) -> None:
        self._meters: dict[str, list[Document]] = {}
        for meter in sorted(meters, key=lambda one: str(one["slug"])):
            self._meters.setdefault(meter["eventType"], []).append(meter)
        self._customers: dict[str, str] = {}
        for customer in customers:
            for subject in subjects_of(customer):
                self._customers.setdefault(subject, customer["id"])

    def flaws(self, event_type: str, data: str | None) -> list[str]:
        """Return the reasons why meters do not count an event."""
        meters = self._meters.get(event_type)
        if not meters:
            return [f"no meter found for event type: {event_type}"]
        return [flaw for meter in meters if (flaw := flaw_of(meter, data))]

    def document(self, row: tuple[Any, ...]) -> Document:
        """Return a row in the form of the API."""
        _, id_, source, event_type, subject, moment, data, ingested_at, stored_at = row
        if "\0" in subject:
            raise Problem(500, reason="PostgreSQL refuses a subject with NUL")
        event: Document = {
            "specversion": "1.0",
            # Only the list of events trims spaces.
            "id": id_.strip(),
            "source": source,
            "type": event_type.strip(),
            "subject": subject.strip(),
            "time": rfc3339(moment),
        }
        if data is not None:
            event["datacontenttype"] = "application/json"
            if (content := json.loads(data)) is not None:
                event["data"] = content
        listed = {
            "event": event,
            "ingestedAt": rfc3339(int(ingested_at)),
            "storedAt": rfc3339(int(stored_at)),
        }
        flaws = self.flaws(event_type, data)
        if customer := self._customers.get(subject):
            listed["customerId"] = customer
        else:
            flaws.append(f"no customer found for event subject: {subject}")
        return listed | {"validationError": "\n".join(flaws)} if flaws else listed

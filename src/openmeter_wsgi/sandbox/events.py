"""The routes that list events: v1 by time, v2 in pages that a cursor turns."""

from __future__ import annotations

import base64
import binascii
import json
from typing import TYPE_CHECKING, Any

from flask import Blueprint, jsonify, request

from openmeter_wsgi.sandbox.listing import Filter, Judge, select, subjects_of
from openmeter_wsgi.sandbox.parameters import integer, moment, refuse
from openmeter_wsgi.sandbox.parts import parts
from openmeter_wsgi.sandbox.problems import Problem
from openmeter_wsgi.sandbox.schema import check
from openmeter_wsgi.sandbox.windows import rfc3339

if TYPE_CHECKING:
    from flask import Response

    from openmeter_wsgi.sandbox.schema import Schema

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
    here = parts()
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
        found = [parts().customers.get(customer) for customer in wanted]
        chosen.where_in("subject", [s for one in found for s in subjects_of(one)])
    for name, term in (("ingestedAtFrom", ">="), ("ingestedAtTo", "<=")):
        if (limit := moment(arguments.get(name), name)) is not None:
            chosen.where(f"ingested_at {term} ?", limit)
    return chosen


def _period() -> Filter:
    chosen = Filter()
    horizon = int(parts().store.clock()) - HORIZON
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

"""The routes behind the page's list of arrivals, and behind one event's journey."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flask import Blueprint, Response, jsonify, request

from openmeter_wsgi.sandbox.arrivals import OUTCOMES, STORED, Search, count, newest
from openmeter_wsgi.sandbox.journey import journey
from openmeter_wsgi.sandbox.listing import Judge
from openmeter_wsgi.sandbox.parameters import integer, refuse
from openmeter_wsgi.sandbox.parts import parts
from openmeter_wsgi.sandbox.problems import Problem

if TYPE_CHECKING:
    import sqlite3

Document = dict[str, Any]

#: Arrivals in one answer.
MOST = 1_000
#: Characters of an event's data in the list; the journey has all of them.
EXCERPT = 300
_LAST = 2**63 - 1
#: Types and subjects that are offered for filtering.
NAMES = 200


routes = Blueprint("arrivals", __name__, url_prefix="/sandbox/api/arrivals")


@routes.get("")
def _list() -> Response:
    here = parts()
    limit = integer(request.args, "limit", 100, 1, MOST)
    search = _search()
    with here.store.reading() as connection:
        meters = here.meters.within(connection)
        found = newest(connection, search, meters, limit)
        body: Document = {"arrivals": _judged(found, meters)}
        if "after" not in request.args:
            body |= {"matches": count(connection, search, meters)}
            body |= _names(connection)
    body["meters"] = [meter["slug"] for meter in meters]
    return jsonify(body)


def _search() -> Search:
    arguments = request.args
    outcome = arguments.get("outcome") or None
    if outcome is not None and outcome not in OUTCOMES:
        raise refuse("outcome", f"value is not one of {', '.join(OUTCOMES)}")
    search = Search(outcome=outcome)
    search.where("seq > :after", after=integer(arguments, "after", 0, 0, _LAST))
    for name in ("type", "subject"):
        if arguments.get(name):
            search.where(f"{name} = :{name}", **{name: arguments[name]})
    search.containing(arguments.get("search", "")[:200])
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
    """Return the types and subjects of stored events, by the index that has them."""
    found = {}
    for name in ("type", "subject"):
        statement = f"SELECT DISTINCT {name} FROM events ORDER BY 1 LIMIT ?"  # noqa: S608
        found[f"{name}s"] = [row[0] for row in connection.execute(statement, (NAMES,))]
    return found


@routes.get("/<int:seq>")
def _journey(seq: int) -> Response:
    here = parts()
    with here.store.reading() as connection:
        told = journey(
            connection,
            min(seq, _LAST),
            meters=here.meters.within(connection),
            customers=here.customers.within(connection),
            horizon=here.store.horizon(connection),
        )
    if told is None:
        raise Problem(404, f"arrival {seq} is not known, or not any more")
    return jsonify(told | {"dedupe": here.store.dedupe})

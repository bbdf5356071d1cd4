"""The sandbox's own routes: the page, and what it shows."""

from __future__ import annotations

from pathlib import Path

from flask import Blueprint, Response, jsonify, request, send_from_directory

from openmeter_wsgi.sandbox.entitlement_table import entitlement_table
from openmeter_wsgi.sandbox.parameters import integer
from openmeter_wsgi.sandbox.parts import parts

PAGE = Path(__file__).with_name("page")
#: Seconds that a plot can span: a minute to a week.
SPANS = (60, 7 * 24 * 3600)


routes = Blueprint("overview", __name__)


@routes.get("/")
def _index() -> Response:
    return send_from_directory(PAGE, "index.html")


@routes.get("/sandbox/page/<path:name>")
def _file(name: str) -> Response:
    return send_from_directory(PAGE, name)


@routes.get("/sandbox/api/overview")
def _overview() -> Response:
    here = parts()
    span = integer(request.args, "span", 900, *SPANS)
    return jsonify(
        {
            "dedupe": here.store.dedupe,
            "persistent": here.store.persistent,
            "visibleAfter": here.store.visible_after,
            "faults": here.faults.document(),
            "counts": here.tally.counts(),
            "refusals": here.tally.refusals(),
            "access": entitlement_table(here),
        }
        | here.dashboards.read(span)
    )

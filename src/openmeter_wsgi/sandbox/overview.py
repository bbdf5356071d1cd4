"""The sandbox's own routes: the page, and what it shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from flask import Blueprint, Response, jsonify, request, send_from_directory

from openmeter_wsgi.sandbox.curves import View
from openmeter_wsgi.sandbox.entitlement_table import entitlement_table
from openmeter_wsgi.sandbox.parameters import integer, refuse
from openmeter_wsgi.sandbox.parts import parts
from openmeter_wsgi.sandbox.schema import check

if TYPE_CHECKING:
    from openmeter_wsgi.sandbox.schema import Schema

PAGE = Path(__file__).with_name("page")
#: Seconds that a plot can span: a minute to a week.
SPANS = (60, 7 * 24 * 3600)
#: How meters are looked at: slug to dimension and subject.
VIEWS: Schema = {
    "type": "object",
    "additionalProperties": {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "by": {"type": "string"},
            "subject": {"type": "string", "nullable": True},
        },
    },
}


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
        | here.dashboards.read(span, _views())
    )


def _views() -> dict[str, View]:
    try:
        asked = json.loads(request.args.get("views", "{}"))
    except (ValueError, RecursionError):
        raise refuse("views", "value must be a JSON object") from None
    if flaw := check(VIEWS, asked):
        raise refuse("views", str(flaw))
    return {slug: View(**view) for slug, view in asked.items()}

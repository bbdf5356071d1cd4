"""The sandbox's own routes: the page, what it shows, and the faults it can set."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flask import Blueprint, Response, jsonify, request, send_from_directory

from openmeter_wsgi.sandbox import documents
from openmeter_wsgi.sandbox.dashboard import dashboard
from openmeter_wsgi.sandbox.parameters import integer
from openmeter_wsgi.sandbox.parts import parts

if TYPE_CHECKING:
    from collections.abc import Hashable

    from openmeter_wsgi.sandbox.resources import Resources
    from openmeter_wsgi.sandbox.store import Store

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
            "faults": here.faults.document(),
            "counts": here.tally.counts(),
            "refusals": here.tally.refusals(),
        }
        | here.usage.read(span)
    )


@routes.put("/sandbox/api/faults")
def _set_faults() -> Response:
    faults = parts().faults
    faults.update(documents.parse(request.get_data()))
    return jsonify(faults.document())


class Usage:
    """The dashboard, computed once however many pages look at it. Any thread."""

    def __init__(self, store: Store, meters: Resources) -> None:
        self._store = store
        self._meters = meters
        self._lock = threading.Lock()
        self._known: dict[int, tuple[Hashable, dict[str, Any]]] = {}

    def read(self, span: int) -> dict[str, Any]:
        """Return the dashboard of the last *span* seconds, at most a second old."""
        with self._lock:
            state = (self._store.version, int(time.time()))
            known, shown = self._known.get(span, (None, {}))
            if known != state:
                with self._store.reading() as connection:
                    meters = self._meters.within(connection)
                    shown = dashboard(connection, meters, span)
                if len(self._known) > 10:
                    self._known.clear()
                self._known[span] = (state, shown)
            return shown

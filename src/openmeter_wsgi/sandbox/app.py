"""The sandbox as a WSGI application: its parts, put together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flask import Flask

from openmeter_wsgi.sandbox import (
    catalog,
    events,
    guard,
    ingest,
    meters,
    overview,
    problems,
)
from openmeter_wsgi.sandbox.dashboard_cache import DashboardCache
from openmeter_wsgi.sandbox.parts import Parts
from openmeter_wsgi.sandbox.resources import Resources
from openmeter_wsgi.sandbox.tally import Tally

if TYPE_CHECKING:
    from openmeter_wsgi.sandbox.faults import Faults
    from openmeter_wsgi.sandbox.store import Store

ROUTES = (
    ingest.routes,
    events.routes,
    meters.routes,
    catalog.customers,
    catalog.features,
    catalog.subjects,
    overview.routes,
)


def create_app(store: Store, faults: Faults, *, host: str) -> Flask:
    """Return the application that serves *store* at the address *host*."""
    # No static folder: the page's few files are routes of their own.
    app = Flask("openmeter_wsgi.sandbox", static_folder=None)
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.json.compact = True  # type: ignore[attr-defined]
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    guard.install(app, host)
    problems.install(app)
    _parts(store, faults).install(app)
    for routes in ROUTES:
        app.register_blueprint(routes)
    return app


def _parts(store: Store, faults: Faults) -> Parts:
    meters = Resources(store, "meter", key="slug")
    return Parts(
        store=store,
        tally=Tally(),
        faults=faults,
        dashboards=DashboardCache(store, meters),
        meters=meters,
        customers=Resources(store, "customer", key="key"),
        features=Resources(store, "feature", key="key"),
        subjects=Resources(store, "subject", key="key"),
    )

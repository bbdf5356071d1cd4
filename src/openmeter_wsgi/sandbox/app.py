"""The sandbox as a WSGI application: its parts, put together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flask import Flask

from openmeter_wsgi.sandbox import (
    arrival_routes,
    catalog,
    customer_routes,
    entitlement_routes,
    events,
    guard,
    ingest,
    meters,
    overview,
    page_actions,
    problems,
)
from openmeter_wsgi.sandbox.access import Access
from openmeter_wsgi.sandbox.customers import Customers
from openmeter_wsgi.sandbox.dashboard_cache import DashboardCache
from openmeter_wsgi.sandbox.entitlements import Entitlements
from openmeter_wsgi.sandbox.parts import Parts
from openmeter_wsgi.sandbox.questions import Questions
from openmeter_wsgi.sandbox.resources import Resources
from openmeter_wsgi.sandbox.tally import Tally

if TYPE_CHECKING:
    from openmeter_wsgi.sandbox.faults import Faults
    from openmeter_wsgi.sandbox.store import Store

ROUTES = (
    ingest.routes,
    events.routes,
    meters.routes,
    customer_routes.routes,
    entitlement_routes.routes,
    catalog.features,
    catalog.subjects,
    overview.routes,
    arrival_routes.routes,
    page_actions.routes,
)


def create_app(parts: Parts, *, host: str) -> Flask:
    """Return the application that serves *parts* at the address *host*."""
    # No static folder: the page's few files are routes of their own.
    app = Flask("openmeter_wsgi.sandbox", static_folder=None)
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.json.compact = True  # type: ignore[attr-defined]
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    guard.install(app, host)
    problems.install(app)
    parts.install(app)
    for routes in ROUTES:
        app.register_blueprint(routes)
    return app


def create_parts(store: Store, faults: Faults) -> Parts:
    """Return the parts of a sandbox that keeps everything in *store*."""
    meters = Resources(store, "meter", key="slug")
    return Parts(
        store=store,
        tally=Tally(),
        faults=faults,
        dashboards=DashboardCache(store, meters),
        meters=meters,
        customers=Customers(store),
        entitlements=Entitlements(store),
        access=Access(store, meters),
        questions=Questions(),
        features=Resources(store, "feature", key="key"),
        subjects=Resources(store, "subject", key="key"),
    )

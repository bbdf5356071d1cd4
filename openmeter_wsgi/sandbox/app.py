"""The WSGI application of the sandbox.

It answers only programs of this machine: it refuses requests that the pages of other
sites make in a browser, because such pages could otherwise read and change its data.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from flask import Flask, request
from werkzeug.routing import BaseConverter

from openmeter_wsgi.sandbox import (
    customer_routes,
    dashboard,
    entitlement_routes,
    event_history,
    event_routes,
    ingest,
    meter_routes,
    request_validation,
    v3,
)
from openmeter_wsgi.sandbox.context import KEY, Context, Questions, Tally
from openmeter_wsgi.sandbox.entitlements import Access, Entitlements, Granting
from openmeter_wsgi.sandbox.request_validation import Problem
from openmeter_wsgi.sandbox.store import Customers, Resources

if TYPE_CHECKING:
    from flask import Response

    from openmeter_wsgi.sandbox.faults import Faults
    from openmeter_wsgi.sandbox.store import Store

ROUTES = (
    ingest.routes,
    event_routes.routes,
    meter_routes.routes,
    customer_routes.customers,
    customer_routes.features,
    customer_routes.subjects,
    entitlement_routes.routes,
    v3.routes,
    dashboard.routes,
    event_history.routes,
)
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
        " connect-src 'self'; base-uri 'none'; form-action 'none';"
        # No script may turn text into markup or code.
        " frame-ancestors 'none'; require-trusted-types-for 'script';"
        " trusted-types 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def control_access(app: Flask, bound: str) -> None:
    """Refuse requests with another site's ``Host``, or from pages of other sites."""

    @app.before_request
    def check() -> None:
        host = request.headers.get("Host", "")
        if not is_allowed(host, bound):
            # DNS rebinding: the name of another site resolves to this machine.
            raise Problem(403, f"host {host!r} is not a name of this sandbox")
        if request.method not in ("GET", "HEAD") and _is_foreign(host):
            raise Problem(403, "requests from pages of other sites are refused")
        # No route of OpenMeter supports these methods.
        if request.url_rule is not None and request.method in ("HEAD", "OPTIONS"):
            raise Problem(405)

    @app.after_request
    def protect(response: Response) -> Response:
        response.headers.update(HEADERS)
        response.headers.setdefault("Cache-Control", "no-store")
        if response.status_code in (202, 204):
            # A response without content has no content type.
            del response.headers["Content-Type"]
        return response


def is_allowed(host: str, bound: str) -> bool:
    """Return True if the header ``Host`` can only name this sandbox.

    :param bound: the address or name on which the sandbox listens.
    """
    name = _name(host)
    if name is None:
        return False
    if name in (bound.lower(), "localhost") or name.endswith(".localhost"):
        return True
    address = _address(name)
    if _is_loopback(bound):
        return address is not None and address.is_loopback
    # The sandbox is reachable from other machines: allow any IP address, and names
    # without a dot (of containers), which no other site can own.
    return address is not None or "." not in name


def _name(host: str) -> str | None:
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        return None
    return name if name and "@" not in host and "/" not in host else None


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _is_loopback(bound: str) -> bool:
    address = _address(bound)
    return bound == "localhost" or (address is not None and address.is_loopback)


def _is_foreign(host: str) -> bool:
    if request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
        return True
    origin = request.headers.get("Origin")
    return origin is not None and urlsplit(origin).netloc.lower() != host.lower()


class _Key(BaseConverter):
    """A URL converter for a path segment that may contain an encoded slash.

    The server leaves ``%2F`` and ``%25`` encoded, so that a slash in a key does not
    separate two segments. This converter decodes them.
    """

    def to_python(self, value: str) -> str:
        return unquote(value)


#: Prefixes of OpenMeter's paths that the sandbox does not offer.
NOT_OFFERED = (
    "/api/v1/<any(addons, apps, billing, debug, entitlements, grants, info):family>",
    "/api/v1/<any(marketplace, notification, plans, portal, stripe):family>",
    "/api/v1/subscriptions",
    "/api/v1/customers/<customer>/<any(apps, stripe, subscriptions):family>",
    "/api/v1/meters/<meter>/group-by",
    "/api/v1/subjects/<subject>/entitlements",
    "/api/v2/<any(entitlements, grants):family>",
    "/api/v2/customers/<customer>/entitlements/<feature>/history",
    "/api/v3/openmeter/<any(addons, apps, billing, credits, currencies):family>",
    "/api/v3/openmeter/<any(customers, 'entitlement-access', features, meters):family>",
    "/api/v3/openmeter/<any('llm-cost', plans, subscriptions, 'tax-codes'):family>",
)


def _refuse_not_offered(app: Flask) -> None:
    """Add routes to *app* that answer 501 to the paths in `NOT_OFFERED`."""

    def refuse(**_: str) -> Response:
        detail = f"the sandbox does not offer {request.method} {request.path}"
        raise Problem(501, detail)

    for rule in NOT_OFFERED:
        for path in (rule, f"{rule}/<path:rest>"):
            app.add_url_rule(
                path,
                "not_offered",
                refuse,
                methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
            )


def create_app(context: Context, *, host: str) -> Flask:
    """Return the application for *context*, of a sandbox that listens on *host*."""
    # No static folder: the dashboard has a route for the files of the page.
    app = Flask("openmeter_wsgi.sandbox", static_folder=None)
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.json.compact = True  # type: ignore[attr-defined]
    app.url_map.merge_slashes = False
    app.url_map.converters["default"] = _Key
    control_access(app, host)
    request_validation.install(app)
    app.extensions[KEY] = context
    for routes in ROUTES:
        app.register_blueprint(routes)
    _refuse_not_offered(app)
    return app


def create_context(store: Store, faults: Faults) -> Context:
    """Return the context of a sandbox that keeps all data in *store*."""
    meters = Resources(store, "meter", key="slug")
    features = Resources(store, "feature")
    customers, entitlements = Customers(store), Entitlements(store)
    return Context(
        store=store,
        tally=Tally(),
        faults=faults,
        meters=meters,
        customers=customers,
        entitlements=entitlements,
        access=Access(store, meters),
        questions=Questions(),
        features=features,
        subjects=Resources(store, "subject"),
        granting=Granting(store, customers, features, meters, entitlements),
    )

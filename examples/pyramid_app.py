"""A Pyramid application that sends its usage to OpenMeter.

::

    OPENMETER_API_URL=http://127.0.0.1:8888 waitress-serve examples.pyramid_app:app
    curl -H 'X-API-Key: acme-key' http://127.0.0.1:8080/products/anvil
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyramid.config import Configurator
from pyramid.events import ContextFound
from pyramid.httpexceptions import HTTPNotFound, HTTPUnauthorized
from pyramid.response import Response

from openmeter_wsgi import (
    OpenMeterMiddleware,
    add_meters,
    require_entitlements,
    route,
    set_route,
    set_subject,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

#: API key to customer. In your application: hashed, in a database.
CUSTOMERS = {"acme-key": "acme", "globex-key": "globex"}


def authenticate(event: ContextFound) -> None:
    """Set subject and route; an unknown caller gets 401, which is not billed."""
    request = event.request
    customer = CUSTOMERS.get(request.headers.get("X-API-Key", ""))
    if customer is None:
        raise HTTPUnauthorized
    set_subject(request, customer)
    if request.matched_route is not None:
        set_route(request, request.script_name + request.matched_route.pattern)


def product(request: Any) -> dict[str, str]:
    """Return a product; a 404 is not billed."""
    if request.matchdict["name"] != "anvil":
        raise HTTPNotFound
    return {"name": request.matchdict["name"]}


def export(request: Any) -> Response:
    """Stream pages for a credit each."""

    def stream() -> Iterator[bytes]:
        for _ in range(int(request.matchdict["pages"])):
            yield b"x" * 1024
            add_meters(request, {"credits": 1})

    return Response(app_iter=stream(), content_type="text/plain")


def report(request: Any) -> dict[str, str]:
    """Return a report for customers with the feature; the middleware denies others."""
    require_entitlements(request, "reports")
    return {"report": "all is well"}


with Configurator() as config:
    config.add_route("product", "/products/{name}")
    config.add_route("export", "/export/{pages}")
    config.add_view(product, route_name="product", renderer="json")
    config.add_view(export, route_name="export")
    config.add_route("report", "/report")
    config.add_view(report, route_name="report", renderer="json")
    config.add_subscriber(authenticate, ContextFound)
    shop = config.make_wsgi_app()

app = OpenMeterMiddleware(
    shop, meter={"type": "api-request", "data": {"route": route()}}
)

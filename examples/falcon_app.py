"""A Falcon application that sends its usage to OpenMeter.

::

    OPENMETER_API_URL=http://127.0.0.1:8888 waitress-serve examples.falcon_app:app
    curl -H 'X-API-Key: acme-key' http://127.0.0.1:8080/products/anvil
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import falcon

from openmeter_wsgi import (
    EntitlementDenied,
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


class Metered:
    """Falcon middleware that sets the subject and the route of a request."""

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Set the subject; an unknown caller gets 401, which is not billed."""
        customer = CUSTOMERS.get(req.get_header("X-API-Key", default=""))
        if customer is None:
            raise falcon.HTTPUnauthorized
        set_subject(req, customer)

    def process_resource(
        self, req: falcon.Request, resp: falcon.Response, *_: Any
    ) -> None:
        if req.uri_template is not None:
            set_route(req, req.root_path + req.uri_template)


class Product:
    def on_get(self, req: falcon.Request, resp: falcon.Response, name: str) -> None:
        """Return a product; a 404 is not billed."""
        if name != "anvil":
            raise falcon.HTTPNotFound
        resp.media = {"name": name}


class Export:
    def on_get(self, req: falcon.Request, resp: falcon.Response, pages: int) -> None:
        """Stream pages for a credit each."""

        def stream() -> Iterator[bytes]:
            for _ in range(pages):
                yield b"x" * 1024
                add_meters(req, {"credits": 1})

        resp.content_type = falcon.MEDIA_TEXT
        resp.stream = stream()


class Report:
    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Return a report, only for customers with the feature "reports"."""
        require_entitlements(req, "reports")
        resp.media = {"report": "all is well"}


def refuse(
    req: falcon.Request, resp: falcon.Response, denied: EntitlementDenied, _: Any
) -> None:
    """Turn a denial into its response: Falcon would answer an exception with 500."""
    answer = denied.get_response(req.env)
    resp.status, resp.data = answer.status, answer.data
    resp.set_headers(list(answer.headers))


shop = falcon.App(middleware=[Metered()])
shop.add_route("/products/{name}", Product())
shop.add_route("/export/{pages:int}", Export())
shop.add_route("/report", Report())
shop.add_error_handler(EntitlementDenied, refuse)

app = OpenMeterMiddleware(
    shop, meter={"type": "api-request", "data": {"route": route()}}
)

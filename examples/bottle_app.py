"""A Bottle application that sends its usage to OpenMeter.

::

    OPENMETER_API_URL=http://127.0.0.1:8888 waitress-serve examples.bottle_app:app
    curl -H 'X-API-Key: acme-key' http://127.0.0.1:8080/products
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bottle import Bottle, HTTPResponse, abort, request

from openmeter_wsgi import (
    EntitlementDenied,
    OpenMeterMiddleware,
    add_meters,
    require_entitlements,
    route,
    set_subject,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: API key to customer. In your application: hashed, in a database.
CUSTOMERS = {"acme-key": "acme", "globex-key": "globex"}

shop = Bottle()


@shop.hook("before_request")
def authenticate() -> None:
    """Set the subject; an unknown caller gets 401, which is not billed."""
    customer = CUSTOMERS.get(request.headers.get("X-API-Key"))
    if customer is None:
        abort(401)
    set_subject(request, customer)


@shop.get("/products/<name>")
def product(name: str) -> dict[str, str]:
    """Return a product; a 404 is not billed."""
    if name != "anvil":
        abort(404)
    return {"name": name}


@shop.get("/export/<pages:int>")
def export(pages: int) -> Iterator[bytes]:
    """Stream pages for a credit each."""
    environ = request.environ
    for _ in range(pages):
        yield b"x" * 1024
        add_meters(environ, {"credits": 1})


def refuse(view: Callable[..., Any]) -> Callable[..., Any]:
    """Turn a denial into its response: Bottle would answer an exception with 500."""

    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return view(*args, **kwargs)
        except EntitlementDenied as denied:
            answer = denied.get_response(request.environ)
            return HTTPResponse(answer.data, answer.status, answer.headers)

    return called


shop.install(refuse)


@shop.get("/report")
def report() -> dict[str, str]:
    """Return a report, only for customers with the feature "reports"."""
    require_entitlements(request, "reports")
    return {"report": "all is well"}


app = OpenMeterMiddleware(
    shop, meter={"type": "api-request", "data": {"route": route()}}
)

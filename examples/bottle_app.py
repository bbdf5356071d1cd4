"""A Bottle application that bills what it delivers.

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

#: API key to customer. Yours are in a database, and hashed.
CUSTOMERS = {"acme-key": "acme", "globex-key": "globex"}

shop = Bottle()


@shop.hook("before_request")
def authenticate() -> None:
    """Whoever is unknown is answered 401, and billed nothing."""
    customer = CUSTOMERS.get(request.headers.get("X-API-Key"))
    if customer is None:
        abort(401)
    set_subject(request, customer)


@shop.get("/products/<name>")
def product(name: str) -> dict[str, str]:
    """Not found is not billed."""
    if name != "anvil":
        abort(404)
    return {"name": name}


@shop.get("/export/<pages:int>")
def export(pages: int) -> Iterator[bytes]:
    """Stream pages, a credit each."""
    environ = request.environ
    for _ in range(pages):
        yield b"x" * 1024
        add_meters(environ, {"credits": 1})


def refuse(view: Callable[..., Any]) -> Callable[..., Any]:
    """Answer who is denied: Bottle would make 500 of an exception."""

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
    """Only for customers who have the feature."""
    require_entitlements(request, "reports")
    return {"report": "all is well"}


app = OpenMeterMiddleware(
    shop, meter={"type": "api-request", "data": {"route": route()}}
)

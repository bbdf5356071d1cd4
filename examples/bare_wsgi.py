"""A WSGI application without a framework that sends its usage to OpenMeter.

::

    OPENMETER_API_URL=http://127.0.0.1:8888 waitress-serve examples.bare_wsgi:app
    curl -H 'X-Customer: acme' http://127.0.0.1:8080/products
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openmeter_wsgi import OpenMeterMiddleware, add_meters

if TYPE_CHECKING:
    from collections.abc import Iterator
    from wsgiref.types import StartResponse

TEXT = [("Content-Type", "text/plain; charset=utf-8")]


def shop(environ: dict[str, Any], start_response: StartResponse) -> Iterator[bytes]:
    """Serve products for a credit each; other paths are not found and not billed."""
    if environ["PATH_INFO"] != "/products":
        start_response("404 Not Found", TEXT)
        yield b"nothing here\n"
        return
    start_response("200 OK", TEXT)
    for name in ("anvil", "rocket skates"):
        yield f"{name}\n".encode()
        add_meters(environ, {"credits": 1})


# Your proxy sets the header after authentication, and removes it from client requests.
app = OpenMeterMiddleware(shop, meters={"api_requests": 1}, subject="header:X-Customer")

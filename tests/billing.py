"""Serve requests through a middleware and return the events that OpenMeter gets."""

from collections.abc import Callable
from typing import Any
from wsgiref.util import setup_testing_defaults

from openmeter_server import OpenMeterServer
from openmeter_wsgi import OpenMeterMiddleware
from openmeter_wsgi.request import adopt_record, record_of

Environ = dict[str, Any]


def environ(**changes: Any) -> Environ:
    """Return the environ of a GET request."""
    made: Environ = {}
    setup_testing_defaults(made)
    return {**made, **changes}


def metered_environ() -> Environ:
    """Return the environ of a request that is being served."""
    made = environ()
    app: Any = OpenMeterMiddleware(handled(print), dry_run=True)
    record_of(made)
    adopt_record(made, app.process().billing, lambda *args: lambda data: None)
    return made


def serve(app: Any, request: Environ) -> bytes:
    """Serve one request as a server does: iterate and close the response."""
    response = app(request, lambda *args: lambda data: None)
    try:
        return b"".join(response)
    finally:
        if hasattr(response, "close"):
            response.close()


def handled(handler: Callable[[Environ], object]) -> Any:
    """Return an application that calls *handler* and answers 200."""

    def app(request: Environ, start_response: Any) -> list[bytes]:
        handler(request)
        start_response("200 OK", [])
        return [b"ok"]

    return app


def bill(
    openmeter: OpenMeterServer,
    handler: Callable[[Environ], object] = lambda request: None,
    *,
    request: Environ | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Serve one request and return the events that OpenMeter gets."""
    options = {"on_missing_subject": "acme", **options}
    middleware = OpenMeterMiddleware(
        handled(handler), api_url=openmeter.url, flush_interval=60, **options
    )
    serve(middleware, environ() if request is None else request)
    middleware.close(40)
    return [event for post in openmeter.requests for event in post.events]


def usage(events: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    """Return type and data of *events*."""
    return [(event["type"], event["data"]) for event in events]

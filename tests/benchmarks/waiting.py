"""Middleware and events shared by several benchmarks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openmeter_wsgi import OpenMeterMiddleware, Policy
from openmeter_wsgi.events import Meter, static_templates
from openmeter_wsgi.values import timestamp
from tests.benchmarks.paths import trivial_app

if TYPE_CHECKING:
    from collections.abc import Iterator
    from wsgiref.types import WSGIApplication

    from openmeter_wsgi.events import RequestIds

#: Bytes of an event with a type, a source and a subject of usual length.
EVENT_BYTES = 250
#: An address at which nobody listens.
NOWHERE = "http://127.0.0.1:9"


def middleware(
    api_url: str = NOWHERE, *, app: WSGIApplication = trivial_app, **options: Any
) -> OpenMeterMiddleware:
    """Return a middleware with room for the events of any benchmark."""
    usual: dict[str, Any] = {
        "api_url": api_url,
        "on_missing_subject": "acme",
        "meters": {"api_requests": 1},
        "max_queue_bytes": 4_000_000_000,
        "max_spool_bytes": 4_000_000_000,
        "shutdown_timeout": 0.0,
    }
    return OpenMeterMiddleware(app, Policy(**{**usual, **options}))


def events(ids: RequestIds, size: int = EVENT_BYTES) -> Iterator[bytes]:
    """Yield events of *size* bytes, like those of a request with a fixed quantity."""
    meter = Meter("api_requests", b'{"total":1}')
    [(head, middle)] = static_templates([meter], "bench")
    tail = f'{timestamp()}","subject":"acme"}}'
    while True:
        event = f"{head}{ids.new()}{middle}{tail}".encode()
        yield event.ljust(size)

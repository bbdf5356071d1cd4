"""Naive wrapper that most people would write first, for comparison."""

from __future__ import annotations

import datetime
import json
import uuid
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable
    from wsgiref.types import StartResponse, WSGIApplication


class NaiveMetering:
    """WSGI middleware that appends one encoded event per request to a queue.

    It counts a request before its response has ended, handles no fork, and sends
    nothing. So it shows only the cost of making an event.
    """

    def __init__(self, app: WSGIApplication) -> None:
        self.app = app
        self.queue: deque[str] = deque(maxlen=10_000)

    def __call__(
        self, environ: dict[str, Any], start_response: StartResponse
    ) -> Iterable[bytes]:
        """Serve one request (PEP 3333)."""
        response = self.app(environ, start_response)
        event = {
            "specversion": "1.0",
            "id": str(uuid.uuid4()),
            "source": "my-api",
            "type": "api-request",
            "subject": environ.get("REMOTE_USER", "acme"),
            "time": datetime.datetime.now(datetime.UTC).isoformat(),
            "data": {"count": 1},
        }
        self.queue.append(json.dumps(event))
        return response

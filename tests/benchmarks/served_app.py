"""Flask "hello" application of `tests.benchmarks.served_cost`, loaded by gunicorn.

The variable `SERVED_AS` selects bare, metered or amberflo; `SERVED_SINK` is the address
of the server that takes the events.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from flask import Flask

if TYPE_CHECKING:
    from collections.abc import Callable

SINK = os.environ["SERVED_SINK"]

app = Flask(__name__)


@app.get("/")
def hello() -> str:
    return "hello"


def bare(app: Any) -> Any:
    return app


def metered(app: Any) -> Any:
    from openmeter_wsgi import OpenMeterMiddleware

    return OpenMeterMiddleware(
        app, api_url=SINK, meters={"api_requests": 1}, on_missing_subject="acme"
    )


def amberflo(app: Any) -> Any:
    """Meter with amberflo as its documentation shows: one record for each request."""
    from metering.ingest import create_ingest_client
    from metering.session import ApiSession, IngestSession

    ApiSession.root_url = IngestSession.root_url = SINK
    # The first request makes the client, as its threads do not outlive a fork.
    clients: list[Any] = []

    def wrapped(environ: Any, start_response: Any) -> Any:
        if not clients:
            clients.append(create_ingest_client(api_key="made-up"))
        clients[0].meter(
            meter_api_name="api_requests", meter_value=1,
            meter_time_in_millis=int(time.time() * 1000), customer_id="acme",
        )  # fmt: skip
        return app(environ, start_response)

    return wrapped


WAYS: dict[str, Callable[[Any], Any]] = {
    "bare": bare, "metered": metered, "amberflo": amberflo,
}  # fmt: skip
application = WAYS[os.environ["SERVED_AS"]](app)

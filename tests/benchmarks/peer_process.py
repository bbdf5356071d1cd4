"""Process of `tests.benchmarks.peers` that serves requests with one peer and times it.

    python -m tests.benchmarks.peer_process PEER APPLICATION URL

It reads a number of requests from each line of its standard input, and answers in JSON
with the seconds of one request, bare and wrapped, or with an error message. Every peer
is set up in the way its documentation shows first, with its defaults, and sends to the
sink.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import sys
import time
import uuid
from typing import TYPE_CHECKING, Any

from tests.benchmarks import paths

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from wsgiref.types import StartResponse, WSGIApplication

    from flask import Flask

    #: The wrapped application, and a function that waits until its events are sent.
    Wrapped = tuple[WSGIApplication, Callable[[], object]]

#: Maximum number of seconds of a turn: slow peers serve fewer requests.
MOST_SECONDS = 0.15
_TRIED = 20


def this_package(app: WSGIApplication, url: str) -> Wrapped:
    from openmeter_wsgi import OpenMeterMiddleware

    wrapped = OpenMeterMiddleware(
        app, api_url=url, meters={"api_requests": 1}, on_missing_subject="acme"
    )
    return wrapped, lambda: wrapped.flush(10)


def moesif(app: WSGIApplication, url: str) -> Wrapped:
    from moesifwsgi import MoesifMiddleware

    settings = {
        "APPLICATION_ID": "bench",
        "LOG_BODY": True,
        "BASE_URI": url,
        "IDENTIFY_USER": lambda *_: "acme",
    }
    wrapped = MoesifMiddleware(app, settings)
    pool = wrapped.worker_pool

    def drain() -> None:
        deadline = time.monotonic() + 10
        while pool.event_queue.qsize() or pool.batch_queue.unfinished_tasks:
            if time.monotonic() > deadline:
                raise TimeoutError("events still wait after 10 s")
            time.sleep(0.01)

    return wrapped, drain


def apitally(app: Flask, url: str) -> Wrapped:
    import apitally
    from opentelemetry import trace

    os.environ["APITALLY_OTLP_ENDPOINT"] = url
    apitally.init(app, write_token="apt_" + "a" * 24, env="dev")
    serve(app.wsgi_app, 1)  # starts its delivery
    return app.wsgi_app, trace.get_tracer_provider().force_flush


def opentelemetry(app: WSGIApplication, url: str) -> Wrapped:
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.instrumentation.wsgi import OpenTelemetryMiddleware
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": "bench"}))
    exporter = OTLPSpanExporter(endpoint=f"{url}/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return OpenTelemetryMiddleware(app), provider.force_flush


def openmeter(app: WSGIApplication, url: str) -> Wrapped:
    from openmeter import Client
    from openmeter.models import Event

    client = Client(endpoint=url, token="bench")

    def calling(
        environ: dict[str, Any], start_response: StartResponse
    ) -> Iterable[bytes]:
        event = Event(
            id=str(uuid.uuid4()), source="my-api", specversion="1.0",
            type="api_requests", subject="acme",
            time=datetime.datetime.now(datetime.UTC), data={"total": 1},
        )  # fmt: skip
        client.events.ingest_event(event)
        return app(environ, start_response)

    return calling, lambda: None


WRAPPERS: dict[str, Callable[[Any, str], Wrapped]] = {
    "this": this_package,
    "moesifwsgi": moesif,
    "apitally": apitally,
    "opentelemetry-instrumentation-wsgi": opentelemetry,
    "openmeter": openmeter,
}


def wrap(peer: str, application: str, url: str) -> tuple[WSGIApplication, Wrapped]:
    """Return the bare application and the wrapped one."""
    wrapper = WRAPPERS[peer.split()[0]]
    if application == "trivial":
        return paths.trivial_app, wrapper(paths.trivial_app, url)
    whole = paths.greeting()  # apitally changes it, so it cannot also be the bare one
    instrumented = whole if wrapper is apitally else whole.wsgi_app
    return paths.flask_app(), wrapper(instrumented, url)


def serve(app: WSGIApplication, requests: int) -> float:
    """Return the seconds per request, with REMOTE_ADDR, which one peer needs."""
    return paths.serve(app, requests, REMOTE_ADDR="127.0.0.1") / requests


def affordable(app: WSGIApplication, requests: int) -> int:
    """Return the number of requests that a turn has time for, at most *requests*."""
    return max(_TRIED, min(requests, int(MOST_SECONDS / serve(app, _TRIED))))


def turns(peer: str, application: str, url: str) -> Iterator[tuple[float, float]]:
    """Yield the seconds of a request, bare and wrapped, for each line of the input."""
    bare, (wrapped, drain) = wrap(peer, application, url)
    for line in sys.stdin:
        requests = int(line)
        gc.collect()
        of_bare, of_wrapped = affordable(bare, requests), affordable(wrapped, requests)
        drain()
        taken = serve(bare, of_bare), serve(wrapped, of_wrapped)
        drain()
        yield taken


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the output of a peer must not mix with the answers
    try:
        for taken in turns(*sys.argv[1:]):
            print(json.dumps(taken), file=answers, flush=True)
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        print(json.dumps(why), file=answers, flush=True)
        raise


if __name__ == "__main__":
    main()

"""Time that the middleware adds to each chunk of a stream.

    python -m tests.benchmarks.stream_cost [--rounds 15] [--chunks 20000]

Every round serves the same stream bare and under each policy, one after the other. A
figure is the time that a chunk takes longer than in the bare application of the same
round, in nanoseconds of processor time: the median over the rounds, the smallest and
the largest. The chunks are events of a language model, 170 bytes each; for larger ones
see ``tests.benchmarks.body_cost``. A second table times the choice of one of 100
routes, and one call of werkzeug's matcher.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from typing import TYPE_CHECKING, Any
from wsgiref.util import setup_testing_defaults

from werkzeug.routing import Map, Rule

from openmeter_wsgi import (
    OpenMeterMiddleware,
    bytes_sent,
    computed,
    llm_usage,
    multi_status,
    records,
)
from openmeter_wsgi.routes import RouteRule, Routes
from tests.benchmarks.body_cost import EVENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from wsgiref.types import StartResponse, WSGIApplication

POLICIES: dict[str, dict[str, Any]] = {
    "one meter": {"meters": {"requests": 1}},
    "bytes_sent": {"meters": {"n": bytes_sent()}},
    "bytes_sent, records": {"meters": {"n": bytes_sent(), "r": records()}},
    "bytes_sent, llm_usage": {"meters": {"n": bytes_sent(), "t": llm_usage("model")}},
    "bytes_sent, a JSON body": {
        "meters": {"n": bytes_sent(), "j": computed(lambda exchange: 1, "json")}
    },
    "bytes_sent, multi_status": {"meters": {"n": bytes_sent(), "m": multi_status()}},
}
#: Number of calls timed together.
CALLS = 5_000


def streaming(chunks: int) -> WSGIApplication:
    def app(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        return (EVENT for _ in range(chunks))

    return app


def serve(app: WSGIApplication, chunks: int) -> float:
    """Serve one stream and return the nanoseconds per chunk."""
    environ: dict[str, Any] = {}
    setup_testing_defaults(environ)
    begun = time.process_time_ns()
    response: Any = app(environ, lambda *_: lambda data: None)
    for _ in response:
        pass
    if hasattr(response, "close"):
        response.close()
    return (time.process_time_ns() - begun) / chunks


def of_chunks(rounds: int, chunks: int) -> dict[str, list[float]]:
    app = streaming(chunks)
    served = {
        name: OpenMeterMiddleware(
            app, api_url="http://127.0.0.1:9", on_missing_subject="acme",
            flush_interval=3_600.0, shutdown_timeout=0, **options,
        )
        for name, options in POLICIES.items()
    }  # fmt: skip
    added: dict[str, list[float]] = {"bare": []}
    for _ in range(rounds):
        gc.collect()
        bare = serve(app, chunks)
        added["bare"].append(bare)
        for name, middleware in served.items():
            added.setdefault(name, []).append(serve(middleware, chunks) - bare)
    return added


def of_routes(rounds: int) -> dict[str, list[float]]:
    rules = [f"/v1/thing{n}/<id>" for n in range(50)]
    rules += [f"/v1/exact{n}" for n in range(50)]
    adapter = Map([Rule(rule, endpoint=rule) for rule in rules]).bind("")
    routes = Routes([(RouteRule(rule), rule) for rule in rules], None)
    calls: dict[str, tuple[Callable[[Any], object], Any]] = {
        "werkzeug's matcher": (adapter.match, "/v1/thing37/5"),
        "a rule with a variable": (routes.find, _request("/v1/thing37/5")),
        "an exact path": (routes.find, _request("/v1/exact37")),
    }
    timed: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, (call, argument) in calls.items():
            begun = time.process_time_ns()
            for _ in range(CALLS):
                call(argument)
            taken = (time.process_time_ns() - begun) / CALLS
            timed.setdefault(name, []).append(taken)
    return timed


def _request(path: str) -> dict[str, str]:
    return {"REQUEST_METHOD": "GET", "PATH_INFO": path}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--chunks", type=int, default=20_000)
    args = parser.parse_args()
    print("| policy | ns added to a chunk |\n|---|---:|")
    for name, taken in of_chunks(args.rounds, args.chunks).items():
        print(_row(name, taken))
    print("\n| among 100 routes | ns |\n|---|---:|")
    for name, taken in of_routes(args.rounds).items():
        print(_row(name, taken))


def _row(name: str, taken: list[float]) -> str:
    middle = statistics.median(taken)
    return f"| {name} | {middle:,.0f} ({min(taken):,.0f} to {max(taken):,.0f}) |"


if __name__ == "__main__":
    main()

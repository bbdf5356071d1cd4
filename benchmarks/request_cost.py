"""How much longer a request takes when it is metered.

    python -m benchmarks.request_cost [--rounds 15] [--requests 2000]

Every round times all variants one after the other, so that what slows the machine
down slows all of them; a figure is the median over the rounds of the ratio to the
bare application of the same round, with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import tempfile
import time
from typing import TYPE_CHECKING, Any
from wsgiref.util import setup_testing_defaults

from flask import Flask

from benchmarks.sink import running_sink
from openmeter_wsgi import OpenMeterMiddleware

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from wsgiref.types import StartResponse, WSGIApplication

BODY = b"Hello, world!"


def trivial_app(
    environ: dict[str, Any], start_response: StartResponse
) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Length", str(len(BODY)))])
    return [BODY]


def flask_app() -> WSGIApplication:
    app = Flask(__name__)
    app.add_url_rule("/", view_func=lambda: BODY)
    return app.wsgi_app


def metered_variants(
    app: WSGIApplication, url: str, spool_dir: str
) -> dict[str, OpenMeterMiddleware]:
    """Return the application under each policy that is compared."""
    common: dict[str, Any] = {
        "api_url": url,
        "on_missing_subject": "acme",
        "flush_interval": 3_600.0,
        "batch_size": 100_000,
        "max_queue_events": 10_000_000,
        "max_queue_bytes": 4_000_000_000,
    }
    one = {"type": "api-request", "data": {"count": 1}}
    three = {"api_requests": 1, "credits": 5, "searches": 2}
    return {
        "no meters": OpenMeterMiddleware(app, **common),
        "filtered by status": OpenMeterMiddleware(
            app, meter=one, meter_on_status_codes="201", **common
        ),
        "one meter": OpenMeterMiddleware(app, meter=one, **common),
        "one meter, in a spool": OpenMeterMiddleware(
            app, meter=one, spool_dir=spool_dir, **common
        ),
        "three meters": OpenMeterMiddleware(app, meters=three, **common),
    }


def serve(app: WSGIApplication, requests: int) -> float:
    """Return the seconds that a server's part of so many requests takes."""
    template: dict[str, Any] = {}
    setup_testing_defaults(template)

    def start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
        return None

    started = time.perf_counter()
    for _ in range(requests):
        response = app(dict(template), start_response)
        for _chunk in response:
            pass
        close: Callable[[], None] | None = getattr(response, "close", None)
        if close is not None:
            close()
    return time.perf_counter() - started


def measure(
    app: WSGIApplication, url: str, spool_dir: str, *, rounds: int, requests: int
) -> list[tuple[str, list[float], list[float]]]:
    """Return for each variant its ratios to the bare one and what it adds in µs."""
    variants = metered_variants(app, url, spool_dir)
    ratios: dict[str, list[float]] = {name: [] for name in variants}
    added: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        gc.collect()
        bare = serve(app, requests)
        for name, variant in variants.items():
            taken = serve(variant, requests)
            variant.flush(60)
            if turn:  # the first round warms up
                ratios[name].append(taken / bare)
                added[name].append((taken - bare) / requests * 1e6)
    for variant in variants.values():
        variant.close(60)
    return [(name, ratios[name], added[name]) for name in variants]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--requests", type=int, default=2_000)
    given = parser.parse_args()
    print(f"{platform.python_implementation()} {platform.python_version()}, ", end="")
    print(f"{given.rounds} rounds of {given.requests} requests\n")
    print("| application | metering | time, ratio to bare | added |")
    print("|---|---|---|---:|")
    with running_sink() as url, tempfile.TemporaryDirectory() as spool_dir:
        for label, app in (("trivial", trivial_app), ("Flask", flask_app())):
            for name, ratios, added in measure(
                app, url, spool_dir, rounds=given.rounds, requests=given.requests
            ):
                spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
                print(
                    f"| {label} | {name} | {statistics.median(ratios):.2f} ({spread}) "
                    f"| {statistics.median(added):.1f} µs |"
                )


if __name__ == "__main__":
    main()

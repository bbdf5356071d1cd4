"""The applications that are measured: bare, naively metered, and with each policy."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any
from wsgiref.util import setup_testing_defaults

from flask import Flask

from openmeter_wsgi import OpenMeterMiddleware, Policy
from openmeter_wsgi.process import Process, client_factory
from openmeter_wsgi.sandbox import Sandbox
from openmeter_wsgi.spool.delivery import SpoolDelivery
from openmeter_wsgi.spool.files import WRITTEN
from openmeter_wsgi.stats import Counts
from tests.benchmarks.naive import NaiveMetering

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from wsgiref.types import StartResponse, WSGIApplication

BODY = b"Hello, world!"

BARE = "bare"
NAIVE = "naive wrapper"
NO_METERS = "nothing to meter"
FILTERED = "filtered by status"
MEMORY = "one meter in memory"
SPOOL = "one meter in the spool"
WRITTEN_SPOOL = "one meter in the spool, os.write"
THREE = "three meters in memory"
ENTITLED = "nothing to meter, a cached entitlement"
ROUTED = "nothing to meter, by one of 100 routes"
UNMETERED_ROUTE = "a route that is not metered"

_ONE = {"type": "api-request", "data": {"count": 1}}
_THREE = [{"type": name, "data": {"count": 1}} for name in ("a", "b", "c")]
_ROUTES: dict[str, Any] = {f"/v1/{n}": {"meters": {"calls": n}} for n in range(98)}


def trivial_app(
    environ: dict[str, Any], start_response: StartResponse
) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Length", str(len(BODY)))])
    return [BODY]


def greeting() -> Flask:
    app = Flask(__name__)
    app.add_url_rule("/", "greet", view_func=lambda: BODY)
    return app


def flask_app() -> WSGIApplication:
    return greeting().wsgi_app


def policies(spool_dir: str, delivery: str) -> dict[str, dict[str, Any]]:
    """Return the options of each policy, without the address of OpenMeter."""
    spool = {"meter": _ONE, "delivery": delivery}
    return {
        NO_METERS: {},
        FILTERED: {"meter": _ONE, "meter_on_status_codes": "201"},
        MEMORY: {"meter": _ONE},
        SPOOL: {**spool, "spool_dir": f"{spool_dir}/mapped"},
        WRITTEN_SPOOL: {**spool, "spool_dir": f"{spool_dir}/written"},
        THREE: {"meter": _THREE},
        ROUTED: {"routes": {**_ROUTES, "/": {}}},
        UNMETERED_ROUTE: {"routes": {**_ROUTES, "/": None}},
    }  # fmt: skip


def written_process(policy: Policy) -> Process:
    """Return a process whose spool uses os.write even if a memory map is possible."""
    counts = Counts()
    transport = SpoolDelivery(policy, client_factory(policy), counts, form=WRITTEN)
    return Process(policy, counts=counts, transport=transport)


def applications(
    app: WSGIApplication, spool_dir: str, delivery: str = "thread", **options: Any
) -> dict[str, WSGIApplication]:
    """Return *app* bare, in the naive wrapper, and metered with each policy."""
    common: dict[str, Any] = {
        "on_missing_subject": "acme",
        "flush_interval": 3_600.0,
        "batch_size": 100_000,
        "max_queue_bytes": 4_000_000_000,
        **options,
    }
    metered = {
        name: OpenMeterMiddleware(app, Policy(**{**common, **own}))
        for name, own in policies(spool_dir, delivery).items()
    }
    metered[WRITTEN_SPOOL].replace_process(written_process)
    return {BARE: app, NAIVE: NaiveMetering(app), **metered}


def entitled_app() -> WSGIApplication:
    """Return an application that has the entitlement of its subject in the cache."""
    with Sandbox() as sandbox:
        sandbox.grant("acme", "api_requests", config={"on": True})
        app = OpenMeterMiddleware(
            trivial_app,
            Policy(
                api_url=sandbox.url,
                on_missing_subject="acme",
                required_entitlements=["api_requests"],
                allow_ttl=86_400.0,
                entitlement_timeout=60.0,
            ),
        )
        serve(app, 1)  # fills the cache
        return app


def serve(app: WSGIApplication, requests: int, **variables: str) -> float:
    """Serve *requests* requests as a server does, and return the seconds."""
    template: dict[str, Any] = {**variables}
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

"""WSGI application with a metrics page, for servers of several processes.

This file is also the gunicorn configuration that the multi-process mode of
prometheus_client needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, make_wsgi_app, multiprocess

from openmeter_wsgi import OpenMeterMiddleware
from openmeter_wsgi.prometheus import export_metrics

if TYPE_CHECKING:
    from collections.abc import Iterable
    from wsgiref.types import StartResponse


def child_exit(server: Any, worker: Any) -> None:
    multiprocess.mark_process_dead(worker.pid)


def answer(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
    found = environ["PATH_INFO"] != "/missing"
    start_response("200 OK" if found else "404 Not Found", [])
    return [b"answered"]


def _make() -> Any:
    metered = OpenMeterMiddleware(
        answer,
        meters={"requests": 1},
        subject=lambda _: "acme",
        flush_interval=0.05,
        shutdown_timeout=10,
    )
    export_metrics(metered, interval=0.1)
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    metrics = make_wsgi_app(registry)

    def application(environ: dict[str, Any], start_response: StartResponse) -> Any:
        serve = metrics if environ["PATH_INFO"] == "/metrics" else metered
        return serve(environ, start_response)

    return application


def __getattr__(name: str) -> Any:
    if name != "application":
        raise AttributeError(name)
    made = globals()["application"] = _make()
    return made

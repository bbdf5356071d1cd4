# ruff: noqa: N999 - the name that gunicorn looks for
"""Gunicorn for a metered application: ``gunicorn -c examples/gunicorn.conf.py app``.

The middleware needs nothing of this: each worker delivers from a thread of its own,
which its first request starts.
"""

from __future__ import annotations

import atexit
import os
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from gunicorn.workers.base import Worker

bind = os.environ.get("BIND", "127.0.0.1:8000")
workers = 2
worker_class = "gthread"
threads = 4
# Longer than a load balancer keeps its idle connections.
keepalive = 75
# Time for the requests under way and, after them, for the usage that still waits: the
# middleware's shutdown_timeout, 5 s by default. Then gunicorn kills what is left.
graceful_timeout = 30


def post_worker_init(worker: Worker) -> None:
    """Let the worker say at its end what it billed, what not, and why."""
    middleware = worker.wsgi.wsgi_app

    def say() -> None:
        counts = msgspec.json.encode(middleware.stats()).decode()
        worker.log.info("usage %s", counts)

    # Exit hooks run in reverse: the middleware's own, which comes with its first
    # event, runs before this one, and sends what waits.
    atexit.register(say)

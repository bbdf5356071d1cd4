# ruff: noqa: N999 - gunicorn's name for its configuration
"""Configuration of gunicorn: ``gunicorn -c examples/gunicorn.conf.py app``.

The middleware works without these settings: the first request of each worker starts
a thread that delivers the events of this worker.
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
# Time for the running requests and then for the waiting events, which takes up to
# shutdown_timeout (5 s by default). After that gunicorn kills the workers.
graceful_timeout = 30


def post_worker_init(worker: Worker) -> None:
    """Make the worker log the middleware's statistics when it ends."""
    middleware = worker.wsgi.wsgi_app

    def log_stats() -> None:
        counts = msgspec.json.encode(middleware.stats()).decode()
        worker.log.info("usage %s", counts)

    # Exit hooks run in reverse order. The middleware registers its own later, at its
    # first event, so it sends the waiting events before this hook runs.
    atexit.register(log_stats)

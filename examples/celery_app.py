"""A Flask endpoint that answers 202, and a Celery job that is billed if it succeeds.

With a Redis and an OpenMeter on this machine::

    openmeter-wsgi sandbox &
    export OPENMETER_API_URL=http://127.0.0.1:8888 OPENMETER_SPOOL_DIR=/tmp/videos \
        OPENMETER_TICKET_SECRET=not-a-secret-in-production
    celery -A examples.celery_app:queue worker &
    gunicorn examples.celery_app:app
    curl -X POST -H 'X-Customer: acme' http://127.0.0.1:8000/videos/holiday
"""

from __future__ import annotations

import os
import time
from typing import Any

from celery import Celery, signals
from flask import Flask, request

from openmeter_wsgi import OpenMeterMiddleware, Policy, Usage, defer

REDIS = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0")

policy = Policy.from_env(
    meters={"requests": 1},
    event_source="videos",
    # Your authentication must set this header: clients that can set it can bill others.
    subject="header:X-Customer",
)
app = Flask(__name__)
app.wsgi_app = OpenMeterMiddleware(app.wsgi_app, policy)  # type: ignore[method-assign]
usage = Usage(policy)
queue = Celery("videos", broker=REDIS, backend=REDIS)
# An interrupted job runs again. Its ticket is still billed only once.
queue.conf.update(
    task_acks_late=True, task_reject_on_worker_lost=True, worker_prefetch_multiplier=1
)


@app.post("/videos/<name>")
def submit(name: str) -> tuple[dict[str, str], int]:
    """Start the job. The request is billed now, the video by the job."""
    job = encode.delay(defer(request, "videos"), name)
    return {"job": job.id}, 202


@queue.task  # type: ignore[untyped-decorator]
def encode(ticket: str, name: str) -> str:
    """Do the work, then bill it. If the work fails, it is not billed."""
    time.sleep(0.02)
    if name.startswith("broken"):
        raise ValueError(f"{name} is no video")
    usage.settle(ticket, {"type": "videos", "data": {"total": 1, "name": name}})
    return name


@signals.worker_process_shutdown.connect  # type: ignore[untyped-decorator]
def close(**_: Any) -> None:
    """Send the waiting events: Celery ends processes without Python's exit hooks."""
    usage.close()

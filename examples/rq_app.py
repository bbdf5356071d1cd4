"""A Flask endpoint that answers 202, and an RQ job that is billed if it succeeds.

With a Redis and an OpenMeter on this machine::

    openmeter-wsgi sandbox &
    export OPENMETER_API_URL=http://127.0.0.1:8888 OPENMETER_SPOOL_DIR=/tmp/videos \
        OPENMETER_TICKET_SECRET=not-a-secret-in-production
    rq worker videos &
    gunicorn examples.rq_app:app
    curl -X POST -H 'X-Customer: acme' http://127.0.0.1:8000/videos/holiday
"""

from __future__ import annotations

import os
import time

from flask import Flask, request
from redis import Redis
from rq import Queue, Retry

from openmeter_wsgi import OpenMeterMiddleware, Policy, Usage, defer

REDIS = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0")

policy = Policy.from_env(
    meters={"requests": 1},
    # RQ runs each job in a process that ends without exit hooks. A spool keeps the
    # events of such a process; the web server, or `openmeter-wsgi ship`, sends them.
    spool_dir=os.environ["OPENMETER_SPOOL_DIR"],
    event_source="videos",
    # Your authentication must set this header: clients that can set it can bill others.
    subject="header:X-Customer",
)
app = Flask(__name__)
app.wsgi_app = OpenMeterMiddleware(app.wsgi_app, policy)  # type: ignore[method-assign]
usage = Usage(policy)
queue = Queue("videos", connection=Redis.from_url(REDIS))


@app.post("/videos/<name>")
def submit(name: str) -> tuple[dict[str, str], int]:
    """Start the job. The request is billed now, the video by the job."""
    job = queue.enqueue(encode, defer(request, "videos"), name, retry=Retry(max=3))
    return {"job": job.id}, 202


def encode(ticket: str, name: str) -> str:
    """Do the work, then bill it. If the work fails, it is not billed."""
    time.sleep(0.02)
    if name.startswith("broken"):
        raise ValueError(f"{name} is no video")
    usage.settle(ticket, {"type": "videos", "data": {"total": 1, "name": name}})
    return name

"""Worker of the Celery example that soon repeats the tasks of killed workers."""

from __future__ import annotations

from typing import Any

from celery import signals
from redis import Redis

from examples.celery_app import REDIS, queue

queue.conf.update(
    # Seconds after which the task of a killed worker is given to another one. A task
    # that waits or takes longer runs twice.
    broker_transport_options={
        "visibility_timeout": 5,
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
        "unacked_mutex_expire": 5,
    },
    # The test runs some tasks again, with the same arguments.
    result_extended=True,
)


@signals.task_prerun.connect  # type: ignore[untyped-decorator]
def count(**_: Any) -> None:
    """Count the runs of tasks."""
    with Redis.from_url(REDIS) as redis:
        redis.incr("runs")

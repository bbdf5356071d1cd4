"""Exactly the jobs that succeed are billed, even if workers are killed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from rq import Queue

from conftest import LONG, Process
from openmeter_wsgi import Policy, Usage
from spooling import until

if TYPE_CHECKING:
    from collections.abc import Callable

    import redis

    from test_sandbox_support import Api

KILLS = 20


def names_of(jobs: int) -> list[str]:
    """Return the names of *jobs* videos; a third of the jobs fail."""
    return [f"broken-{n}" if n % 3 == 0 else f"video-{n}" for n in range(jobs)]


def billed(api: Api, variables: dict[str, str], jobs: int) -> list[str]:
    """Deliver the rest of the spool and return the names of the billed videos."""
    usage = Usage(Policy(api_url=api.url, spool_dir=variables["OPENMETER_SPOOL_DIR"]))
    assert usage.flush(LONG)
    usage.close()
    # The requests themselves were billed when they were answered.
    assert api.value("requests") == jobs
    return sorted(row["groupBy"]["name"] for row in api.rows("videos", groupBy="name"))


def make_meters(api: Api) -> None:
    api.meter("requests", "SUM", "$.total", eventType="requests")
    api.meter(
        "videos", "SUM", "$.total", eventType="videos", groupBy={"name": "$.name"}
    )


@pytest.mark.timeout(900)
def test_a_thousand_jobs_of_celery(
    broker: redis.Redis, variables: dict[str, str], submit: Callable[..., Any], api: Api
) -> None:
    make_meters(api)
    names = names_of(1_000)

    def results() -> dict[str, dict[str, Any]]:
        keys = list(broker.scan_iter("celery-task-meta-*", count=1_000))
        found = map(json.loads, broker.mget(keys) if keys else [])
        return {result["task_id"]: result for result in found}

    def is_idle() -> bool:
        return not broker.llen("celery") and not broker.hlen("unacked")

    def drained() -> dict[str, dict[str, Any]]:
        until(is_idle, LONG, failure=lambda: (len(results()), broker.hlen("unacked")))
        return results()

    command = ("celery", "-A", "celery_worker:queue", "worker", "--concurrency", "2")
    with Process(*command, variables=variables) as worker:
        submit("examples.celery_app:app", names)
        for kill in range(KILLS):
            some = kill * len(names) // (KILLS + 1)
            until(lambda some=some: is_idle() or len(results()) >= some, LONG)
            worker.kill()
            worker.start()
        first = drained()
        succeeded = [done for done in first.values() if done["status"] == "SUCCESS"]
        again(variables, succeeded[:50])
        drained()

    assert int(broker.get("runs") or 0) >= len(first) + 50
    # A job is lost if its worker is killed at the moment of taking it from Redis.
    lost = len(names) - len(first)
    assert lost < KILLS
    assert len(first) - len(succeeded) >= len(names) // 3 - lost
    found = billed(api, variables, len(names))
    missing = {done["result"] for done in succeeded} - set(found)
    assert not missing
    assert len(found) - len(succeeded) <= lost
    assert not [name for name in found if name.startswith("broken")]
    assert api.value("videos") == len(found) == len(set(found))


def again(variables: dict[str, str], done: list[dict[str, Any]]) -> None:
    """Run tasks a second time, with the same tickets."""
    from celery import Celery

    with Celery("videos", broker=variables["REDIS_URL"]) as queue:
        for each in done:
            queue.send_task(each["name"], each["args"], task_id=each["task_id"])


def test_a_few_jobs_of_rq(
    broker: redis.Redis, variables: dict[str, str], submit: Callable[..., Any], api: Api
) -> None:
    make_meters(api)
    names = names_of(15)
    queue = Queue("videos", connection=broker)
    submit("examples.rq_app:app", names)

    def counts() -> tuple[int, ...]:
        registries = (queue.started_job_registry, queue.finished_job_registry)
        return (queue.count, *(len(each.get_job_ids()) for each in registries))

    command = ("rq.cli", "worker", "videos", "--url", variables["REDIS_URL"])
    with Process(*command, variables=variables) as worker:
        for _ in range(3):
            worker.kill_a_child()
        until(lambda: counts()[:2] == (0, 0), LONG, failure=counts)
        succeeded = counts()[2]

    videos = sorted(name for name in names if name.startswith("video"))
    assert succeeded == len(videos)
    assert billed(api, variables, len(names)) == videos
    assert api.value("videos") == len(videos)

"""Metrics for Prometheus, which equal the counts of one or of many processes."""

import http.client
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from entitling import LARGE, NO, YES, Entitled, ask, middleware
from metrics_app import answer
from openmeter_server import Answer
from openmeter_wsgi.prometheus import export_metrics
from servers import GUNICORN, TIMEOUT, Server, environment

TWO_WORKERS = [*GUNICORN, "--workers", "2", "--config", "python:metrics_app"]


def figures(text):
    """Return each sample by its name, and the values of its labels if it has any."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removeprefix("openmeter_wsgi_")
            labels = sample.labels.values()
            found[(name, *labels) if labels else name] = sample.value
    return found


def scraped(registry):
    return figures(prometheus_client.generate_latest(registry).decode())


@pytest.fixture
def registry():
    return prometheus_client.CollectorRegistry()


def test_every_figure_of_a_process_is_there(openmeter, registry):
    entitled = Entitled(openmeter)
    entitled.values["acme"] = {"searches": YES}
    entitled.values["beta"] = {"searches": NO}
    app = middleware(openmeter, answer)
    export_metrics(app, registry=registry)
    for path in ("/", "/", "/missing"):
        ask(app, "acme", PATH_INFO=path)
    ask(app, "beta")
    before = scraped(registry)
    assert app.flush(40)
    after = scraped(registry)
    app.close(TIMEOUT)

    assert before["queue_events"] == 2
    assert before["queue_bytes"] > 200
    assert 0 < before["queue_oldest_age_seconds"] < 60
    assert after["queue_events"] == after["queue_oldest_age_seconds"] == 0
    assert after["requests_settled_total"] == 4
    assert after["requests_metered_total"] == 2
    assert after["requests_not_metered_total", "default", "status"] == 1
    assert after["requests_not_metered_total", "default", "denied"] == 1
    assert after["events_total"] == after["events_delivered_total"] == 2
    assert after["events_dead_lettered_total"] == 0
    assert after["entitlement_decisions_total", "allowed", "openmeter"] == 1
    assert after["entitlement_decisions_total", "allowed", "cache"] == 2
    assert after["entitlement_decisions_total", "denied", "openmeter"] == 1
    assert after["entitlement_denials_total", "no_access", "denied"] == 1
    assert after["attempt_seconds_count"] == after["delivery_seconds_count"] == 1
    assert after["attempt_seconds_bucket", "+Inf"] == 1
    assert 0 < after["attempt_seconds_sum"] < 10


def test_what_goes_wrong_with_delivery_is_counted(openmeter, registry):
    app = middleware(
        openmeter,
        answer,
        required_entitlements=[],
        max_queue_bytes=3_000,
        batch_size=3,
        **LARGE,
    )
    export_metrics(app, registry=registry)
    openmeter.poison = {"poison"}
    for subject in ("acme", "poison", "acme", "one too many"):
        ask(app, subject)
    openmeter.script.append(Answer(503))
    openmeter.wait_for_requests(1)
    assert app.flush(40)
    read = scraped(registry)
    app.close(TIMEOUT)

    assert read["events_dropped_total", "queue_full"] == 1
    assert read["events_dead_lettered_total"] == 1
    assert read["events_delivered_total"] == 2
    assert read["delivery_retries_total"] >= 1
    assert read["attempt_seconds_count"] == len(openmeter.requests)


def test_two_middlewares_have_two_names(openmeter, registry):
    one, two = (middleware(openmeter, answer) for _ in range(2))
    export_metrics(one, registry=registry)
    with pytest.raises(ValueError, match="export each middleware once"):
        export_metrics(two, registry=registry)

    export_metrics(two, registry=registry, prefix="second")

    assert b"second_requests_settled_total 0.0" in prometheus_client.generate_latest(
        registry
    )


def get(address, path):
    connection = http.client.HTTPConnection(*address, timeout=TIMEOUT)
    try:
        connection.request("GET", path)
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def read_until(address, condition):
    """Scrape until *condition* holds: other processes write now and then."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        text = get(address, "/metrics")
        # prometheus_client fails to read a file that another process just creates.
        read = figures("" if text.startswith("<html>") else text)
        if condition(read):
            return read
        assert time.monotonic() < deadline, read
        time.sleep(0.05)


def workers(server):
    pid = server.process.pid
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.parametrize("preload", [False, True])
@pytest.mark.parametrize("spooled", [False, True])
def test_many_processes_are_counted_together(openmeter, tmp_path, preload, spooled):
    (tmp_path / "metrics").mkdir()
    variables = {
        "OPENMETER_API_URL": openmeter.url,
        "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "metrics"),
    }
    if spooled:
        variables["OPENMETER_SPOOL_DIR"] = str(tmp_path / "spool")
    command = [*TWO_WORKERS, "--preload"] if preload else TWO_WORKERS
    openmeter.down()
    with Server(
        command, "metrics_app:application", tmp_path / "log", **variables
    ) as server:
        for n in range(60):
            get(server.address, "/missing" if n % 3 == 0 else "/")
        waiting = read_until(
            server.address,
            lambda read: (
                read.get("requests_settled_total") == 60
                and read.get("queue_events") == 40
            ),
        )
        openmeter.up()
        os.kill(int(workers(server)[0]), signal.SIGTERM)
        for _ in range(10):
            get(server.address, "/")
        read = read_until(
            server.address,
            lambda read: (
                read.get("events_delivered_total") == 50
                and read.get("queue_events") == 0
            ),
        )
        assert server.stop() == 0

    assert waiting["queue_oldest_age_seconds"] > 0
    assert waiting["queue_bytes"] > 40 * 100
    assert read["requests_settled_total"] == 70
    assert read["requests_not_metered_total", "default", "status"] == 20
    assert read["events_total"] == 50
    assert read["delivery_retries_total"] > 0
    assert read["delivery_seconds_count"] == read["delivery_seconds_bucket", "+Inf"] > 0
    assert len(openmeter.ids) == 50


PUBLISHED_LATE = """
from apps import listed, metered
from openmeter_wsgi.prometheus import export_metrics
from servers import Consumer, make_environ
import sys
middleware = metered(listed, api_url=sys.argv[1], flush_interval=3600.0)
Consumer().serve(middleware, make_environ(HTTP_X_SUBJECT="acme"))
export_metrics(middleware, interval=3600.0)
Consumer().serve(middleware, make_environ(HTTP_X_SUBJECT="acme"))
"""


def test_what_the_exit_delivers_is_published(openmeter, tmp_path):
    """The delivery may have begun before the metrics exist."""
    env = environment(PROMETHEUS_MULTIPROC_DIR=str(tmp_path))
    command = [sys.executable, "-c", PUBLISHED_LATE, openmeter.url]
    subprocess.run(command, env=env, check=True, timeout=120)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(tmp_path))

    delivered = registry.get_sample_value("openmeter_wsgi_events_delivered_total")

    assert delivered == len(openmeter.ids) == 2

"""Health: the current problems that a process can know."""

import json
import shutil
import threading

import pytest

from entitling import LARGE, ask, middleware
from metrics_app import answer
from openmeter_server import HANG, Answer, problem
from openmeter_wsgi import Health, HealthEndpoint, OpenMeterMiddleware, Problem
from servers import Consumer, make_environ


@pytest.fixture
def make(openmeter):
    made = []

    def make(**options):
        usual = {"required_entitlements": [], "flush_interval": 0.02}
        made.append(middleware(openmeter, answer, **{**usual, **options}))
        return made[-1]

    yield make
    openmeter.heal()
    for each in made:
        each.close(40)


def codes(app, **options):
    return [problem.code for problem in app.health(**options).problems]


def until(app, *expected):
    """Wait until the health of *app* has the codes *expected*."""
    looking = threading.Event()
    for _ in range(400):
        if codes(app) == list(expected):
            return app.health()
        looking.wait(0.05)
    raise AssertionError(app.health())


def test_a_process_is_well_before_and_while_it_delivers(make):
    app = make()

    assert app.health() == Health()
    ask(app)
    assert app.flush(40)
    assert app.health().ok


@pytest.mark.parametrize(
    ("answer", "code", "text"),
    [
        (
            problem(401, "no such key"),
            "held",
            "until the key or the address is corrected",
        ),
        (Answer(503), "unavailable", "kept and sent again"),
    ],
)
def test_what_keeps_usage_from_openmeter_is_told_until_it_is_over(
    make, openmeter, answer, code, text
):
    app = make()
    openmeter.rule = lambda _: answer
    ask(app)
    openmeter.wait_for_requests(1)

    health = until(app, code)

    assert not health.ok
    assert not health.loses
    assert text in health.problems[0].text
    assert f"answered {answer.status}" in health.problems[0].text
    openmeter.heal()
    assert app.flush(40)
    assert app.health().ok


def test_a_server_that_refuses_every_event_is_told(make, openmeter):
    app = make()
    openmeter.poison = {"acme"}
    ask(app)
    ask(app)
    openmeter.wait_for_requests(3)

    until(app, "refused")


def test_a_full_queue_loses(make, openmeter):
    app = make(max_queue_bytes=2_000, flush_interval=60, **LARGE)
    ask(app)
    assert app.health().ok
    ask(app)

    health = app.health()

    assert [problem.code for problem in health.problems] == ["queue_full"]
    assert health.loses
    assert app.flush(40)
    assert app.health().ok


def test_what_waits_for_too_long_is_a_backlog(make):
    app = make(flush_interval=60)
    ask(app)

    assert codes(app, max_age=0) == ["backlog"]
    assert codes(app) == []


def test_what_waits_in_a_spool_is_seen_by_every_process(make, openmeter, tmp_path):
    openmeter.rule = lambda _: HANG
    app = make(spool_dir=str(tmp_path / "spool"))
    ask(app)
    other = make(spool_dir=str(tmp_path / "spool"))

    (found,) = other.health(max_age=0).problems

    assert found.code == "backlog"
    assert found.text.startswith("1 events wait")


def test_events_without_a_thread_to_deliver_them_are_told(make, monkeypatch):
    start = threading.Thread.start

    def refuse(thread):
        if thread.name == "openmeter_wsgi.delivery":
            raise RuntimeError("can't start new thread")
        start(thread)

    app = make()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        ask(app)
        assert codes(app) == ["not_delivering"]
    assert app.flush(40)
    assert app.health().ok


def test_a_spool_that_takes_nothing_is_told(make, tmp_path):
    spool = tmp_path / "spool"
    app = make(spool_dir=str(spool), flush_interval=60)
    shutil.rmtree(spool)
    spool.write_text("in the way")
    ask(app)

    health = app.health()

    assert "spool_failing" in [problem.code for problem in health.problems]
    assert not health.loses
    spool.unlink()


def test_a_spool_that_takes_nothing_loses_where_another_process_delivers(
    make, tmp_path
):
    spool = tmp_path / "spool"
    app = make(spool_dir=str(spool), delivery="ship")
    shutil.rmtree(spool)
    spool.write_text("in the way")
    ask(app)

    assert codes(app) == ["spool_dropping"]
    assert app.health().loses
    spool.unlink()


def test_questions_without_answers_are_told(make, openmeter):
    app = make(required_entitlements=["searches"])
    openmeter.down()
    ask(app)

    assert "entitlements" in codes(app)


# -- Served


def served(health, method="GET", **options):
    consumer = Consumer()
    return consumer.serve(
        HealthEndpoint(lambda: health, **options), make_environ(method)
    )


DELAYED = Problem("unavailable", "OpenMeter answered 503 for 7 s now")
LOST = Problem("queue_full", "new ones are dropped", loses=True)


@pytest.mark.parametrize(
    ("problems", "fail_on", "status"),
    [
        ((), "loss", "200 OK"),
        ((DELAYED,), "loss", "200 OK"),
        ((DELAYED,), "problem", "503 Service Unavailable"),
        ((DELAYED, LOST), "loss", "503 Service Unavailable"),
    ],
)
def test_the_endpoint_fails_on_what_it_is_told_to(problems, fail_on, status):
    consumer = served(Health(problems), fail_on=fail_on)

    assert consumer.status == status
    document = json.loads(b"".join(consumer.body))
    assert document["ok"] is not bool(problems)
    assert [each["code"] for each in document["problems"]] == [
        each.code for each in problems
    ]


def test_the_endpoint_answers_head_without_a_body():
    consumer = served(Health(), "HEAD")

    assert consumer.body == []
    assert dict(consumer.headers)["Content-Length"] == str(
        len(b'{"ok":true,"problems":[]}')
    )


def test_the_endpoint_knows_only_two_ways():
    with pytest.raises(ValueError, match="got 'anything'"):
        HealthEndpoint(Health, fail_on="anything")


def test_the_endpoint_serves_a_middleware(make):
    app = make()

    consumer = Consumer().serve(HealthEndpoint(app.health), make_environ())

    assert isinstance(app, OpenMeterMiddleware)
    assert consumer.status == "200 OK"

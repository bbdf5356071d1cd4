"""Log lines at the beginning and at the end of an outage."""

import logging
import re

import pytest

from entitling import LARGE, Entitled, ask, middleware
from metrics_app import answer
from openmeter_server import RESET, Answer, problem
from openmeter_wsgi import log
from openmeter_wsgi.delivery.sender import Outage
from openmeter_wsgi.errors import Misconfigured, Unavailable


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


def lines(caplog):
    return [
        f"{r.levelname} {r.getMessage().removeprefix(log.PREFIX)}"
        for r in caplog.records
    ]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


# -- An outage


def test_the_end_of_an_outage_is_told_with_its_length_and_what_follows(caplog):
    clock = Clock()
    trouble = Outage(lambda: 234, clock)
    trouble.note(Unavailable("refused"))
    clock.now = 40
    trouble.note(Unavailable("", status=503))
    clock.now = 42

    assert trouble.problem.text == (
        "OpenMeter answered 503 (Service Unavailable) for 42 s now; all events are "
        "kept and sent again"
    )
    trouble.end(100)

    assert trouble.problem is None
    assert lines(caplog) == [
        "WARNING OpenMeter accepts events again after 42 s; 100 events are delivered, "
        "the 134 that still wait follow now"
    ]


def test_the_end_of_one_vain_attempt_is_not_told(caplog):
    clock = Clock()
    trouble = Outage(clock=clock)
    trouble.note(Misconfigured("no such key", status=401))
    clock.now = 1

    assert trouble.problem.code == "held"
    trouble.end(3)

    assert lines(caplog) == []
    assert trouble.problem is None


def test_a_new_outage_is_told_although_the_last_began_a_moment_ago(caplog):
    logger = log.get_logger("openmeter_wsgi.test_of_trouble")

    logger.warning("OpenMeter %s", "does not answer")
    logger.warning("OpenMeter %s", "does not answer")
    logger.warning("OpenMeter answers again", extra=log.OVER)
    logger.warning("OpenMeter %s", "does not answer")
    logger.warning("OpenMeter answers again", extra=log.OVER)

    assert lines(caplog) == 2 * [
        "WARNING OpenMeter does not answer",
        "WARNING OpenMeter answers again",
    ]


@pytest.mark.parametrize(
    ("script", "line"),
    [
        (
            Answer(503),
            r"WARNING OpenMeter answered 503 \(Service Unavailable\); 1 events and all "
            r"behind them are kept, next attempt in \d\.\d s",
        ),
        (
            problem(401, "no such key"),
            r"ERROR OpenMeter answered 401 \(no such key\); 1 events and all behind "
            r"them are kept until the key or the address is corrected, next attempt in "
            r"\d\.\d s",
        ),
        (
            RESET,
            r"WARNING OpenMeter did not answer \(127.0.0.1:\d+: Connection reset by "
            r"peer\); 1 events and all behind them are kept, next attempt in \d\.\d s",
        ),
    ],
)
def test_what_fails_is_one_line(make, openmeter, caplog, script, line):
    openmeter.script.append(script)
    app = make()

    ask(app)
    assert app.flush(40)

    (told,) = lines(caplog)
    assert re.fullmatch(line, told)


def test_an_event_that_is_refused_for_good_says_where_it_is(
    make, openmeter, caplog, tmp_path
):
    openmeter.poison = {"poison"}
    for app, place in (
        (make(), "kept only in this line"),
        (make(spool_dir=str(tmp_path / "spool")), "kept among the dead letters"),
    ):
        for subject in ("acme", "poison", "acme"):
            ask(app, subject)
        assert app.flush(40)
        (told,) = [line for line in lines(caplog) if "for good" in line]
        assert told.endswith(f"others are accepted; it is {place}")
        caplog.clear()


# -- A full queue


def test_a_full_queue_is_told_when_it_begins_and_when_it_is_over(make, caplog):
    app = make(max_queue_bytes=2_000, flush_interval=60, **LARGE)
    for _ in range(5):
        ask(app)
    app.close(40)

    begins, ends = lines(caplog)
    assert begins.startswith("ERROR max_queue_bytes: the queue is")
    assert re.search(r"room again after \d s, in which 3 events were lost$", ends)
    assert app.stats().dropped == {"queue_full": 3}


# -- A spool that takes nothing


@pytest.mark.parametrize(
    ("delivery", "fate"), [("thread", "put into memory"), ("ship", "lost")]
)
def test_a_failing_spool_is_told_when_it_begins_and_when_it_is_over(
    make, openmeter, caplog, tmp_path, delivery, fate
):
    spool = tmp_path / "spool"
    app = make(spool_dir=str(spool), delivery=delivery, flush_interval=60)
    in_the_way = tmp_path / "moved"
    spool.rename(in_the_way)
    spool.write_text("no directory")
    ask(app)
    ask(app)
    spool.unlink()
    in_the_way.rename(spool)
    while not [line for line in lines(caplog) if "events again" in line]:
        ask(app)

    told = [line for line in lines(caplog) if "spool takes" in line]
    assert len(told) == 2
    assert told[0].startswith("ERROR ")
    assert "no event" in told[0]
    assert re.search(rf"again after \d+ s, in which \d+ events were {fate}$", told[1])


def test_what_stays_in_a_spool_at_the_end_is_told(make, openmeter, caplog, tmp_path):
    openmeter.rule = lambda _: Answer(503)
    app = make(spool_dir=str(tmp_path / "spool"))
    for _ in range(3):
        ask(app)
    openmeter.wait_for_requests(1)

    app.close(0.2)

    told = [line for line in lines(caplog) if "shutdown" in line]
    assert len(told) == 1
    assert re.match(
        r"WARNING shutdown: 3 events are kept in .*/spool/.* and are", told[0]
    )


# -- Entitlements


def test_a_denial_is_no_alarm_and_what_is_let_through_is(make, openmeter, caplog):
    caplog.set_level(logging.INFO, "openmeter_wsgi.entitlements")
    Entitled(openmeter)  # knows nobody
    ask(make(required_entitlements=["searches"]))
    ask(make(required_entitlements=["searches"], enforce=False))
    ask(make(required_entitlements=["searches"], enforce=False), "hooli")

    assert [line.split(" (")[0] for line in lines(caplog)] == [
        "INFO subject 'acme', feature 'searches': unknown_customer, denied",
        # One line a minute for all subjects: a fail mode may let thousands through.
        "WARNING feature 'searches', unknown_customer: subject 'acme' is let through",
    ]

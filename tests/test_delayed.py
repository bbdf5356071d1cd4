"""Events dated ahead of OpenMeter's clock are kept until they are due, no others.

The server is told to lose, behind a 204, what Kafka loses: all events of a request with
one that is dated more than 59 minutes ahead of its clock.
"""

import json
import threading
import time
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing import environ, handled, serve
from openmeter_server import Answer
from openmeter_wsgi import OpenMeterMiddleware, set_meters
from openmeter_wsgi.delivery.batch import MAX_AHEAD, Delayed, split_by_date
from openmeter_wsgi.delivery.queue import ListedBatch, NumberedBatch
from openmeter_wsgi.spool.batches import Slice, SpoolBatch
from openmeter_wsgi.values import moment_of
from spooling import PATIENCE, Process, segments, spool_queue, until

HOUR = 3_600.0


def text_of(moment):
    return datetime.fromtimestamp(moment, UTC).isoformat().replace("+00:00", "Z")


def dated(id_, ahead, **data):
    """Encode an event whose time is *ahead* seconds ahead of our clock."""
    document = {
        "specversion": "1.0", "type": "a", "source": "s", "data": data, "id": id_,
        "time": text_of(time.time() + ahead), "subject": "acme",
    }  # fmt: skip
    return json.dumps(document, separators=(",", ":")).encode()


@pytest.fixture
def kafka(openmeter):
    """An OpenMeter that loses events from the future, as Kafka does."""
    lost = []

    def rule(request):
        limit = openmeter.clock() + 59 * 60
        if any(moment_of(json.dumps(e).encode()) > limit for e in request.events):
            lost.append(request.ids)
            return Answer(204, takes=False)
        return None

    openmeter.clock = time.time
    openmeter.rule = rule
    openmeter.lost = lost
    return openmeter


@pytest.fixture(params=["memory", "spool"])
def queue(request, kafka, tmp_path):
    """A queue in memory or a spool, whose events are delivered."""
    spool_dir = str(tmp_path / "spool") if request.param == "spool" else None
    middleware = OpenMeterMiddleware(
        handled(lambda environ: None), api_url=kafka.url, flush_interval=0.05,
        spool_dir=spool_dir,
    )  # fmt: skip
    yield middleware.process().transport
    middleware.close(PATIENCE)


def put(queue, *events):
    queue.start()
    for event in events:
        queue.put(event)


# -- In memory and in a spool


def test_what_is_dated_ahead_waits_and_nothing_else_does(queue, kafka, caplog):
    put(
        queue,
        dated("a", 0),
        dated("late", 2 * HOUR),
        dated("b", -HOUR),
        dated("later", 30 * 24 * HOUR),
        dated("soon", 25 * 60),
    )
    kafka.wait_for(3)
    put(queue, dated("c", 0))
    kafka.wait_for(4)

    assert kafka.lost == []
    assert sorted(kafka.ids) == ["a", "b", "c", "soon"]
    assert not kafka.duplicates
    until(lambda: queue.waiting == 2)  # when the answer has come
    assert not queue.flush(0.05)
    assert "1 events are dated 7200 s or more ahead of OpenMeter's time" in caplog.text


def test_what_was_ahead_is_sent_by_itself_as_soon_as_it_is_due(queue, kafka):
    put(queue, dated("late", MAX_AHEAD + 2), dated("a", 0))
    kafka.wait_for(1)
    assert kafka.ids == ["a"]

    kafka.wait_for(2)

    assert [r.ids for r in kafka.requests if "late" in r.ids] == [["late"]]
    assert queue.flush(PATIENCE)
    assert queue.waiting == 0


def test_a_host_whose_clock_is_ahead_of_openmeters_loses_nothing(queue, kafka, caplog):
    kafka.clock = lambda: time.time() - 50 * 60
    put(queue, dated("first", 0))
    kafka.wait_for(1)

    put(queue, dated("late", 0), dated("a", -HOUR))
    kafka.wait_for(2)

    assert kafka.ids == ["first", "a"]
    until(lambda: queue.waiting == 1)
    messages = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert any("This host's clock is 300" in m and "ahead of" in m for m in messages)


def test_data_that_names_a_time_is_no_date(queue, kafka):
    booked = dated("booked", 0, time=text_of(time.time() + 365 * 24 * HOUR))
    put(queue, booked, dated("a", 0))

    kafka.wait_for(2)

    assert queue.flush(PATIENCE)


# -- In a spool


def test_what_is_delayed_when_the_sender_is_killed_is_delivered_once(kafka, tmp_path):
    """The next sender has the same clock, and OpenMeter's is right again."""
    kafka.clock = lambda: time.time() - 50 * 60
    directory = tmp_path / "spool"
    with Process(_SENDER, str(directory), kafka.url) as process:
        assert process.line() == "started"
        kafka.wait_for(1)
        process.process.stdin.write(b"\n")
        process.process.stdin.flush()
        assert process.line() == "put"
        kafka.wait_for(1 + 50)
        process.kill()
    assert sorted(kafka.ids) == sorted(["first", *[f"due-{n}" for n in range(50)]])
    assert segments(directory)

    kafka.clock = time.time
    queue = spool_queue(directory, kafka.url)
    queue.start()
    kafka.wait_for(1 + 100)
    assert queue.flush(PATIENCE)
    queue.close(PATIENCE)

    # The one of which the kill may have cut off the answer.
    assert set(kafka.duplicates) <= {"due-49"}
    assert len(kafka.ids) == 101
    assert kafka.lost == []


_SENDER = """
import sys
from pathlib import Path
from spooling import spool_queue
from test_delayed import HOUR, dated
queue = spool_queue(Path(sys.argv[1]), sys.argv[2])
queue.start()
queue.put(dated("first", 0))
print("started", flush=True)
sys.stdin.readline()
for n in range(50):
    queue.put(dated(f"late-{n}", 0))
    queue.put(dated(f"due-{n}", -HOUR))
print("put", flush=True)
sys.stdin.readline()
"""


def test_segments_are_deleted_when_the_last_delayed_event_has_gone(kafka, tmp_path):
    directory = tmp_path / "spool"
    queue = spool_queue(directory, kafka.url)
    queue.start()
    for n in range(60):
        queue.put(dated(f"{n}", MAX_AHEAD + 3 if n % 3 == 0 else 0, text="x" * 1_000))
    kafka.wait_for(40)
    assert len(kafka.ids) == 40

    kafka.wait_for(60)

    assert queue.flush(PATIENCE)
    queue.close(PATIENCE)
    until(lambda: not segments(directory))
    assert not kafka.duplicates
    assert kafka.lost == []


# -- The parts


AHEAD = st.lists(
    st.sampled_from([-HOUR, 0.0, MAX_AHEAD - 60, MAX_AHEAD + 60, 2 * HOUR]), min_size=1
)


@given(AHEAD, st.sampled_from([-HOUR, 0.0, 2 * HOUR]), st.sampled_from([0, 1, 2]))
def test_a_batch_is_cut_where_dates_are_too_far_ahead(aheads, clock_ahead, kind):
    events = [dated(str(n), ahead) for n, ahead in enumerate(aheads)]
    batch = [
        ListedBatch(events),
        NumberedBatch(events, first=7),
        SpoolBatch(
            [Slice("one", b"".join(e + b"\n" for e in events), 0, len(events), False)]
        ),
    ][kind]

    parts = list(split_by_date(batch, clock_ahead))

    assert [event for part, _ in parts for event in part] == events
    left = iter(aheads)
    for part, wait in parts:
        waits = [next(left) + clock_ahead - MAX_AHEAD for _ in part]
        assert all((each > 0) == (wait > 0) for each in waits)
        if wait:
            assert abs(wait - min(waits)) < 30


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10))))
def test_what_is_delayed_is_handed_out_when_it_is_due_and_once(steps):
    now = [0.0]
    delayed = Delayed(lambda: now[0])
    due, found = {}, []
    for number, (seconds, passes) in enumerate(steps):
        delayed.add(number, seconds)
        due[number] = now[0] + seconds
        now[0] += passes
        while (taken := delayed.take_due()) is not None:
            assert due[taken] <= now[0]
            found.append(taken)
        assert all(due[n] > now[0] for n in due.keys() - set(found))
        assert (delayed.due_in is None) == (len(found) == len(due))

    assert len(found) == len(set(found))


def test_a_middleware_closes_at_once_and_says_what_it_could_not_send(kafka, caplog):
    kafka.clock = lambda: time.time() - 2 * HOUR
    before = {"type": "a", "time": text_of(time.time() - 3 * HOUR)}
    middleware = OpenMeterMiddleware(
        handled(lambda request: set_meters(request, next(documents))),
        api_url=kafka.url, flush_interval=0.01, on_missing_subject="acme",
    )  # fmt: skip
    documents = iter([before, {"type": "b"}])
    serve(middleware, environ())
    kafka.wait_for(1)
    serve(middleware, environ())
    until(lambda: "clock: 1 events are dated" in caplog.text)

    closing = threading.Thread(target=middleware.close, args=(PATIENCE,))
    closing.start()
    closing.join(PATIENCE / 2)

    assert not closing.is_alive()
    assert "1 events could not be delivered" in caplog.text
    assert kafka.lost == []
    assert middleware.stats().unaccounted == 0

"""Up to when all is delivered: the same of a queue in memory and of a spool."""

import os
import time

import pytest

from openmeter_server import Answer
from openmeter_wsgi.delivery.number_ranges import Marks
from openmeter_wsgi.delivery.queue import MemoryDelivery, MemoryQueue
from openmeter_wsgi.policy import Policy
from openmeter_wsgi.spool import watermark
from openmeter_wsgi.spool.watermark import Watermark
from openmeter_wsgi.stats import Counts
from spooling import event, new_client, server_dir, spool_queue, threads, until


@pytest.fixture(params=["memory", "spool"])
def queue(request, openmeter, tmp_path):
    if request.param == "memory":
        options = {"api_url": openmeter.url, "api_key": "secret"}
        policy = Policy(flush_interval=0.05, **options)
        queue = MemoryDelivery(policy, new_client(openmeter.url), Counts())
    else:
        queue = spool_queue(tmp_path / "spool", openmeter.url, flush_interval=0.05)
    queue.start()
    yield queue
    openmeter.rule, openmeter.poison = None, set()
    queue.close()


def passes(queue, moment):
    """Wait until all that was put before *moment* is known to be delivered."""
    until(lambda: queue.delivered_until() > moment)


def test_a_queue_that_holds_nothing_is_delivered_until_now(queue):
    passes(queue, time.time())


def test_what_is_delivered_is_passed(openmeter, queue):
    queue.put(event("1"))
    put_at = time.time()
    passes(queue, put_at)
    assert [e["id"] for e in openmeter.taken] == ["1"]


def test_what_waits_or_is_being_sent_is_not_passed(openmeter, queue):
    passes(queue, time.time())
    openmeter.rule = lambda _: Answer(503)
    queue.put(event("1"))
    put_at = time.time()
    for n in range(3):
        queue.put(event(f"later-{n}"))
        until(lambda n=n: len(openmeter.requests) > n or queue.flush(0.01))
        assert 0 < queue.delivered_until() <= put_at
    openmeter.rule = None
    queue.flush()
    passes(queue, put_at)


def test_what_was_put_with_a_time_of_its_own_is_not_passed_either(openmeter, queue):
    passes(queue, time.time())
    openmeter.rule = lambda _: Answer(503)
    soon = time.strftime("%Y-%m-%dT%H:%M", time.gmtime(time.time() + 1_200)).encode()
    queue.put(event("1").replace(b"2026-01-01T00:00", soon))
    put_at = time.time()
    until(lambda: len(openmeter.requests) > 1 or queue.flush(0.01))
    assert queue.delivered_until() <= put_at


def test_what_is_refused_for_good_is_passed(openmeter, queue):
    openmeter.poison = {"mallory"}
    queue.put(event("1", "mallory"))
    queue.put(event("2", "acme"))
    put_at = time.time()
    until(lambda: queue.counts.dead_lettered == 1)
    passes(queue, put_at)


def test_the_next_sender_goes_on_from_the_last_ones_watermark(openmeter, tmp_path):
    first = spool_queue(tmp_path, openmeter.url, flush_interval=0.05)
    first.start()
    began = time.time()
    passes(first, began)
    first.close()
    openmeter.down()
    second = spool_queue(tmp_path, openmeter.url, flush_interval=0.05)
    second.put(event("1"))
    put_at = time.time()
    assert began < second.delivered_until() <= put_at
    openmeter.up()
    second.flush()
    passes(second, put_at)
    second.close()


def test_a_spool_without_a_sender_has_no_watermark(tmp_path):
    queue = spool_queue(tmp_path, "http://127.0.0.1:1", delivery="ship")
    queue.put(event("1"))
    assert queue.delivered_until() == 0.0
    queue.close()


def test_the_watermark_of_a_spool_moves_when_what_a_mark_saw_is_delivered(
    openmeter, tmp_path
):
    worker = spool_queue(tmp_path, openmeter.url, delivery="ship")
    worker.put(event("1"))
    directory = server_dir(tmp_path)
    mark = Watermark(directory)
    ends = watermark.ends(directory)
    mark.publish(1_000.0, ends)
    assert watermark.read(directory) == 0.0

    sender = spool_queue(tmp_path, openmeter.url, flush_interval=0.05)
    sender.start()
    until(lambda: watermark.all_done(directory, ends))
    sender.close()
    until(lambda: not threads("openmeter_wsgi.journal"))
    (directory / watermark.WATERMARK_NAME).unlink(missing_ok=True)
    mark.publish(2_000.0, {**ends, next(iter(ends)): 10**9})
    assert watermark.read(directory) == 1_000.0  # later events are not
    worker.close()


def test_a_watermark_from_the_future_is_of_a_clock_that_was_put_back(tmp_path):
    (tmp_path / watermark.WATERMARK_NAME).touch()
    future = time.time() + 3_600
    os.utime(tmp_path / watermark.WATERMARK_NAME, (future, future))
    mark = Watermark(tmp_path)
    moment = mark.begin_mark()
    mark.publish(moment, {})
    assert watermark.read(tmp_path) == pytest.approx(moment, abs=0.001)


def test_events_that_step_aside_hold_the_watermark_of_a_queue_in_memory():
    events = MemoryQueue(max_bytes=1_000, counts=Counts())
    lines = [event(str(n)) for n in range(3)]
    events.put(lines[0])
    first = time.time()
    assert events.delivered_until() == 0.0
    events.put(lines[1])
    events.put(lines[2])
    aside, others = events.take(max_events=3, max_bytes=1_000).split_at(1)
    events.done(others)
    assert events.delivered_until() == 0.0
    events.done(aside)
    assert events.delivered_until() >= first


def test_marks_are_bounded_and_still_reach_the_end():
    marks = Marks()
    for n in range(100_000):
        marks.add(float(n), n)
        assert len(marks._marks) < 1_000
    assert marks.reached(lambda put: put < 50_000) == pytest.approx(49_999, rel=0.01)
    assert marks.reached(lambda put: True) == pytest.approx(99_999, rel=0.01)
    marks.add(100_000.0, 100_000)
    assert marks.reached(lambda put: True) == 100_000.0


def test_marks_that_are_thinned_out_keep_what_each_of_them_stood_for():
    marks = Marks(join=lambda older, newer: older | newer)
    new = set()
    for n in range(5_000):
        new |= {n}
        if marks.add(float(n), new):
            new = set()
    done = set(range(5_000)) - {1_234}

    assert marks.reached(lambda put: put <= done) == pytest.approx(1_234, abs=20)
    assert marks.reached(lambda put: True) == pytest.approx(4_999, abs=20)


def test_a_mark_of_many_segments_holds_only_what_is_new(tmp_path):
    mark = Watermark(tmp_path)
    ends = {f"179546838235{n}-{'a' * 24}-00000001.mapped": 10 for n in range(1_000)}
    for name in ends:
        (tmp_path / name).touch()
    mark.publish(1.0, ends)
    for n in range(100):
        mark.publish(2.0 + n, {**ends, next(iter(ends)): 11 + n})

    assert sum(len(put) for _, put in mark._marks._marks) <= 1_000 + 100
    assert watermark.read(tmp_path) == 0.0

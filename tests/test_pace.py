"""A backlog is delivered beside the application, not in its place."""

import itertools
import threading
import time
from functools import partial

import pytest

from openmeter_wsgi.delivery import worker as workers
from openmeter_wsgi.delivery.queue import MemoryDelivery, MemoryQueue
from openmeter_wsgi.delivery.worker import Pace
from openmeter_wsgi.policy import Policy
from openmeter_wsgi.stats import Counts
from spooling import event, new_client, spool_queue


class Process:
    """The clocks of a process whose sender works and whose others may."""

    def __init__(self):
        self.now = self.own = self.all = 0.0
        self.pace = Pace(
            clock=lambda: self.now, own=lambda: self.own, process=lambda: self.all
        )
        self.pace.rest()

    def batch(self, *, took, own, others):
        self.now += took
        self.own += own
        self.all += own + others
        return self.pace.rest()


def test_a_process_that_does_nothing_else_is_not_slowed():
    assert Process().batch(took=0.01, own=0.002, others=0.0) == 0.0


def test_an_application_that_computes_gets_twenty_times_as_much():
    process = Process()

    rest = process.batch(took=0.004, own=0.002, others=0.002)

    assert rest == pytest.approx((20 * 0.002 - 0.002) * 0.5)


def test_what_the_application_had_meanwhile_is_not_given_again():
    assert Process().batch(took=0.05, own=0.002, others=0.048) == 0.0


def test_an_application_that_computes_all_the_time_keeps_nine_tenths():
    process = Process()
    began = process.now
    for _ in range(100):
        # Both want the GIL, and the sender has it for its part.
        rest = process.batch(took=0.004, own=0.002, others=0.002)
        process.now += rest
        process.all += rest
    assert process.own / (process.now - began) < 0.1


def test_the_sender_rests_beside_a_thread_that_computes():
    ended = threading.Event()

    def compute():
        while not ended.is_set():
            sum(range(1_000))

    others = threading.Thread(target=compute)
    others.start()
    try:
        pace = Pace()
        pace.rest()
        rests = []
        for _ in range(20):
            before = time.thread_time()
            while time.thread_time() < before + 0.002:
                pass
            rests.append(pace.rest())
    finally:
        ended.set()
        others.join()
    assert sum(rests) > 0


@pytest.fixture(params=["memory", "spool"])
def resting(request, openmeter, tmp_path, monkeypatch):
    """Return a queue that rests for half an hour after each batch but the first."""
    busy = partial(
        Pace,
        own=partial(next, itertools.count(0, 100)),
        process=partial(next, itertools.count(0, 300)),
    )
    monkeypatch.setattr(workers, "Pace", busy)
    if request.param == "memory":
        policy = Policy(api_url=openmeter.url, api_key="secret", flush_interval=0.05)
        queue = MemoryDelivery(policy, new_client(openmeter.url), Counts())
    else:
        queue = spool_queue(tmp_path / "spool", openmeter.url, flush_interval=0.05)
    queue.start()
    yield queue
    queue.close(40)  # at once, but a thread that rests has to notice


def put_a_backlog(queue, openmeter, *, prefix):
    """Put more than two batches, and wait until the sender rests after the second."""
    before = len(openmeter.requests)
    for number in range(5_000):
        queue.put(event(f"{prefix}{number}"))
    openmeter.wait_for_requests(before + 2)


def test_a_flush_does_not_rest(resting, openmeter):
    put_a_backlog(resting, openmeter, prefix="")

    assert resting.flush(30)
    assert len(openmeter.ids) == 5_000


def test_a_close_does_not_rest(resting, openmeter):
    put_a_backlog(resting, openmeter, prefix="")

    resting.close(30)
    assert len(openmeter.ids) == 5_000


def test_a_queue_that_is_half_full_is_pressed():
    events = MemoryQueue(max_bytes=100, counts=Counts())
    events.put(b"1" * 49)
    assert not events.is_half_full
    events.put(b"2")
    assert events.is_half_full

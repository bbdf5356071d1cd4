"""A backlog is delivered beside the application, not in its place."""

import threading
import time

import pytest

from openmeter_wsgi.delivery.pace import Pace


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

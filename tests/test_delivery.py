import logging
import os
import ssl
import subprocess
import sys
import threading
import time
import tracemalloc

import pytest
import trustme

from openmeter_server import (
    CLOSE,
    HANG,
    PAGE,
    PATIENCE,
    RESET,
    TAKEN_BUT_RESET,
    Answer,
    OpenMeterServer,
    problem,
    redirect,
)
from openmeter_wsgi import OpenMeterMiddleware
from openmeter_wsgi.delivery import worker as workers
from openmeter_wsgi.delivery.batch import ListedBatch
from openmeter_wsgi.delivery.queue import MemoryQueue
from openmeter_wsgi.delivery.sender import Sender
from openmeter_wsgi.delivery.worker import Source, Worker
from openmeter_wsgi.policy import Policy
from openmeter_wsgi.stats import Counts
from openmeter_wsgi.threads import ExitHook
from spooling import event, new_client, threads, until

THREAD = "openmeter_wsgi.delivery"
NEVER = 3_600.0
HANGS_THEN_TAKES = Answer(takes=True, hangs=True)
SINGLE = "application/cloudevents+json"
BATCH = "application/cloudevents-batch+json"


def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"hello"]


class Service:
    """A trivial application behind the middleware, and its clients."""

    def __init__(self, url, **options):
        defaults = {
            "api_url": url,
            "flush_interval": 0.02,
            "meters": {"api_requests": 1},
            "subject": "header:X-Customer",
        }
        if "meter" in options:
            del defaults["meters"]
        self.middleware = OpenMeterMiddleware(app, **(defaults | options))

    def request(self, *customers):
        for customer in customers:
            environ = {"REQUEST_METHOD": "GET", "HTTP_X_CUSTOMER": customer}
            body = self.middleware(environ, lambda *_: lambda _: None)
            assert list(body) == [b"hello"]
            body.close()

    @property
    def stats(self):
        return self.middleware.stats()

    def flush(self, timeout=PATIENCE):
        return self.middleware.flush(timeout)

    def drain(self):
        """Flush again and again, which cuts every wait short."""
        deadline = time.monotonic() + PATIENCE
        while not self.flush(0.1):
            assert time.monotonic() < deadline, self.stats


@pytest.fixture
def serve(openmeter):
    """Makes services; at the end the server is well and they deliver the rest."""
    made = []

    def serve(url=None, **options):
        made.append(Service(url or openmeter.url, **options))
        return made[-1]

    yield serve
    openmeter.heal()
    for service in made:
        service.middleware.close(PATIENCE)


@pytest.fixture
def busy(openmeter, serve):
    """Makes a service whose first event hangs at the server until it is released."""

    def busy(**options):
        service = serve(flush_interval=0.001, **options)
        openmeter.script.append(HANGS_THEN_TAKES)
        service.request("first")
        openmeter.wait_for_requests(1)
        return service

    return busy


def customers(count):
    return [f"customer-{n}" for n in range(count)]


def delivery_threads():
    return threads(THREAD)


def add_up(stats, requests):
    """Nothing is unaccounted for."""
    lost = sum(stats.dropped.values())
    known = stats.delivered + stats.waiting + stats.dead_lettered + lost
    return (stats.settled, stats.events, known) == (requests,) * 3


# -- Requests


def test_one_event_is_sent_bare_and_several_as_a_batch(openmeter, serve):
    service = serve(flush_interval=NEVER)

    service.request("alice")
    assert service.flush()
    service.request("bob", "carol")
    assert service.flush()

    one, several = openmeter.requests
    assert one.headers.get_all("Content-Type") == [SINGLE]
    assert one.payload["subject"] == "alice"
    assert several.headers.get_all("Content-Type") == [BATCH]
    assert [event["subject"] for event in several.payload] == ["bob", "carol"]


def test_a_batch_size_of_one_never_sends_an_array(openmeter, busy):
    service = busy(batch_size=1)
    service.request(*customers(20))
    openmeter.release()
    assert service.flush()

    assert openmeter.subjects == ["first", *customers(20)]
    assert not any(request.is_array for request in openmeter.requests)
    assert {r.headers["Content-Type"] for r in openmeter.requests} == {SINGLE}


def test_no_request_holds_more_events_than_a_batch(openmeter, busy):
    service = busy(batch_size=1_000)
    service.request(*customers(2_500))
    openmeter.release()
    assert service.flush()

    sizes = [len(request.events) for request in openmeter.requests]
    assert sizes == [1, 1_000, 1_000, 500]
    assert openmeter.subjects == ["first", *customers(2_500)]


def test_a_backlog_goes_in_batches_of_a_megabyte(openmeter, busy):
    data = {"text": "x" * 300_000}
    service = busy(meter={"type": "files", "data": data})
    service.request(*customers(10))
    openmeter.release()
    assert service.flush()

    sizes = [len(request.events) for request in openmeter.requests]
    assert sizes == [1, 3, 3, 3, 1]
    assert all(len(request.body) <= 1_000_000 for request in openmeter.requests)


def test_a_batch_size_beyond_a_thousand_is_kept(openmeter, busy):
    service = busy(batch_size=1_200)
    service.request(*customers(1_300))
    openmeter.release()
    assert service.flush()

    sizes = [len(request.events) for request in openmeter.requests]
    assert sizes == [1, 1_200, 100]


# -- When it is sent


def test_a_full_batch_goes_before_the_interval(openmeter, serve):
    service = serve(flush_interval=NEVER, batch_size=10)

    service.request(*customers(9))
    assert openmeter.requests == []
    service.request("customer-9")
    openmeter.wait_for(10)

    assert [request.subjects for request in openmeter.requests] == [customers(10)]


def test_every_full_batch_goes_without_waiting(openmeter, serve):
    service = serve(flush_interval=NEVER, batch_size=2)
    service.request(*customers(2))
    openmeter.wait_for(2)

    service.request("alice", "bob", "carol", "dave", "erin")
    openmeter.wait_for(6)
    assert service.flush()

    sizes = [len(request.subjects) for request in openmeter.requests]
    assert sizes == [2, 2, 2, 1]


def test_the_interval_sends_what_is_there(openmeter, serve):
    service = serve(flush_interval=0.2, batch_size=1_000)
    began = time.monotonic()

    service.request(*customers(3))
    openmeter.wait_for(3)

    assert openmeter.requests[-1].at - began >= 0.19
    assert openmeter.subjects == customers(3)


def test_a_flush_sends_at_once_and_says_that_it_is_done(openmeter, serve):
    service = serve(flush_interval=NEVER)
    assert service.flush(0)

    service.request(*customers(3))

    assert service.flush()
    assert openmeter.subjects == customers(3)
    assert service.stats.waiting == 0


def test_a_flush_sends_more_than_one_batch(openmeter, serve):
    data = {"text": "x" * 300_000}
    service = serve(flush_interval=NEVER, meter={"type": "files", "data": data})
    service.request(*customers(10))

    assert service.flush()

    assert [len(request.events) for request in openmeter.requests] == [3, 3, 3, 1]


def test_a_flush_ends_in_time_and_says_that_it_is_not_done(openmeter, serve):
    service = serve(flush_interval=NEVER)
    openmeter.script.append(HANG)
    service.request("alice")
    began = time.monotonic()

    assert not service.flush(0.2)
    assert not service.flush(0)

    assert 0.2 <= time.monotonic() - began < PATIENCE / 2
    openmeter.release()
    service.drain()
    assert openmeter.subjects == ["alice"]


def test_a_flush_in_a_backoff_tries_at_once(openmeter, serve):
    service = serve()
    openmeter.script.append(Answer(503, b"", {"Retry-After": "3600"}))
    service.request("alice")
    openmeter.wait_for_requests(1)

    assert service.flush()

    assert openmeter.subjects == ["alice"]


def test_a_flush_in_a_backoff_also_sends_what_came_after(openmeter, serve):
    service = serve(flush_interval=NEVER, batch_size=2)
    openmeter.script.append(Answer(503, b"", {"Retry-After": "3600"}))
    service.request("alice", "bob")
    openmeter.wait_for_requests(1)
    service.request("carol")

    assert service.flush(40)

    assert openmeter.subjects == ["alice", "bob", "carol"]


def test_a_flush_whose_first_attempt_fails_still_sends_what_came_after(
    openmeter, serve
):
    service = serve(flush_interval=NEVER, batch_size=2)
    openmeter.script += [Answer(429, b"", {"Retry-After": "1"})] * 2
    service.request("alice", "bob")
    openmeter.wait_for_requests(1)
    service.request("carol")

    assert service.flush(40)

    assert openmeter.subjects == ["alice", "bob", "carol"]


def test_a_flush_tries_again_what_was_refused_alone(openmeter, serve):
    service = serve()
    openmeter.script.append(problem(400, "not now"))
    service.request("alice")
    openmeter.wait_for_requests(1)

    service.drain()

    assert openmeter.subjects == ["alice"]


def test_after_a_flush_the_server_is_not_hammered(openmeter, serve):
    service = serve()
    openmeter.rule = lambda _: Answer(503, b"", {"Retry-After": "3600"})
    service.request("alice")
    openmeter.wait_for_requests(1)

    assert not service.flush(0.5)

    assert len(openmeter.requests) <= 3


def test_what_was_refused_alone_is_tried_again_without_a_flush(
    openmeter, serve, monkeypatch
):
    monkeypatch.setattr(workers, "MAX_DELAY", 0.1)
    service = serve()
    openmeter.script += [problem(400, "not now")] * 2
    service.request("alice")

    openmeter.wait_for(1)

    assert len(openmeter.requests) == 3


# -- Threads


def test_nothing_runs_before_the_first_event(openmeter, serve):
    service = serve()
    assert delivery_threads() == []
    assert service.flush(0)
    service.middleware.close(PATIENCE)
    assert delivery_threads() == []
    assert openmeter.requests == []

    service.request("alice")
    (thread,) = delivery_threads()

    assert thread.daemon
    openmeter.wait_for(1)


def test_the_idle_thread_waits_without_a_timeout(openmeter, serve):
    def waits():
        """The timeouts of all waits that the thread is in."""
        frame = sys._current_frames().get(thread.ident)
        found = []
        while frame is not None:
            if frame.f_code.co_name == "wait":
                found.append(frame.f_locals["timeout"])
            frame = frame.f_back
        return found

    service = serve()
    service.request("alice")
    (thread,) = delivery_threads()
    assert service.flush()

    deadline = time.monotonic() + PATIENCE
    while waits() != [None]:
        assert time.monotonic() < deadline, waits()
        threading.Event().wait(0.01)


def test_many_threads_lose_and_double_nothing(openmeter, serve, caplog):
    service = serve(flush_interval=0.001)
    start = threading.Barrier(8)

    def requests(number):
        start.wait()
        service.request(*[f"{number}-{n}" for n in range(5_000)])

    threads = [threading.Thread(target=requests, args=(n,)) for n in range(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert service.flush()

    assert len(openmeter.ids) == 40_000
    assert not openmeter.duplicates
    by_thread = {str(n): [] for n in range(8)}
    for subject in openmeter.subjects:
        thread, n = subject.split("-")
        by_thread[thread].append(int(n))
    assert all(numbers == list(range(5_000)) for numbers in by_thread.values())
    assert service.stats.delivered == service.stats.settled == 40_000
    assert add_up(service.stats, 40_000)
    assert caplog.records == []


@pytest.mark.parametrize("closes", [False, True])
def test_no_event_is_overlooked_wherever_the_thread_is(openmeter, serve, closes):
    """One is put before each line of its loop, and nothing else wakes it."""
    loop = {
        function.__code__
        for function in (
            Worker._run,
            Worker._is_finished,
            Worker._gather,
            Worker._wait_for,
        )
    }
    for line in range(200):
        service = serve(flush_interval=NEVER, batch_size=1)
        before = len(openmeter.ids)
        countdown = iter(range(line, -1, -1))
        was_put = threading.Event()

        def put_once(frame, what, _, service=service, left=countdown, done=was_put):
            if frame.f_code not in loop:
                return None
            if what == "line" and next(left, None) == 0:
                service.request("between")
                done.set()
            return put_once

        threading.settrace(put_once)
        try:
            service.request("first")
            openmeter.wait_for(before + 1)
            if closes:
                service.middleware.close(PATIENCE)
            if not was_put.wait(3):
                break
            openmeter.wait_for(before + 2)
        finally:
            threading.settrace(None)

    assert 15 < line < 199
    assert not openmeter.duplicates


def no_delivery_thread(monkeypatch):
    start = threading.Thread.start

    def refuse(thread):
        if thread.name == THREAD:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)


@pytest.mark.parametrize("how", ["flush", "close"])
def test_where_no_thread_can_be_started_the_caller_delivers(
    openmeter, serve, monkeypatch, caplog, how
):
    service = serve()
    with monkeypatch.context() as patch:
        no_delivery_thread(patch)
        service.request("alice", "bob")
        assert openmeter.requests == []
        assert "can't start new thread" in caplog.text

        if how == "flush":
            assert service.flush()
        else:
            service.middleware.close(PATIENCE)

        assert openmeter.subjects == ["alice", "bob"]
        assert service.stats.waiting == 0

    service.request("carol")
    openmeter.wait_for(3)
    assert len(delivery_threads()) == 1


def test_the_caller_delivers_in_spite_of_failures(openmeter, serve, monkeypatch):
    service = serve()
    no_delivery_thread(monkeypatch)
    openmeter.script += [RESET, Answer(503, b"", {"Retry-After": "3600"})]
    openmeter.poison = {"customer-3"}
    service.request(*customers(7))

    assert service.flush()

    assert len(openmeter.ids) == 6
    assert service.stats.dead_lettered == 1


def test_the_caller_gives_up_in_time(openmeter, serve, monkeypatch):
    service = serve()
    no_delivery_thread(monkeypatch)
    openmeter.down()
    service.request("alice")
    began = time.monotonic()

    assert not service.flush(0.3)

    assert time.monotonic() - began < PATIENCE / 2
    assert service.stats.waiting == 1


# -- Composition


class ListSource(Source):
    """Events in a list: a source that knows nothing of memory queues and spools."""

    def __init__(self, events):
        self.events = events

    def __len__(self):
        return len(self.events)

    def take(self, *, max_events, max_bytes):
        batch = ListedBatch(self.events[:max_events])
        del self.events[:max_events]
        return batch


@pytest.mark.parametrize("thread", [True, False], ids=["thread", "caller"])
def test_a_worker_delivers_a_list_without_a_queue_or_a_spool(openmeter, thread):
    policy = Policy(api_url=openmeter.url, api_key="secret", flush_interval=NEVER)
    source = ListSource([event(str(n)) for n in range(2_500)])
    done = []
    client = new_client(openmeter.url)
    sender = Sender(client, Counts(), done.extend)
    hook = ExitHook(lambda: None)
    worker = Worker(source, sender, policy, exit_hook=hook, idle=client.close)

    if thread:
        worker.start()
    assert worker.finish(time.monotonic() + PATIENCE)

    assert openmeter.ids == [str(n) for n in range(2_500)]
    assert len(done) == 2_500
    assert not worker.is_running


# -- Bounds


def test_the_queue_is_bounded_by_bytes_those_being_sent_included(
    openmeter, busy, caplog
):
    data = {"text": "x" * 300_000}
    service = busy(meter={"type": "files", "data": data}, max_queue_bytes=1_000_000)
    service.request(*customers(5))

    assert service.stats.waiting == 3
    assert service.stats.dropped == {"queue_full": 3}
    assert [r.levelname for r in caplog.records] == ["ERROR"]
    assert "max_queue_bytes: the queue is full" in caplog.text

    openmeter.release()
    assert service.flush()
    assert openmeter.subjects == ["first", "customer-0", "customer-1"]
    service.request("later")
    assert service.flush()
    assert add_up(service.stats, 7)


def test_a_queue_in_memory_counts_what_it_holds_until_it_is_done():
    counts = Counts()
    events = MemoryQueue(max_bytes=10, counts=counts)

    assert [events.put(b"1234"), events.put(b"123"), events.put(b"1234")] == [
        True,
        True,
        False,
    ]
    batch = events.take(max_events=1, max_bytes=100)
    assert (batch, len(events), events.waiting) == ([b"1234"], 1, 2)
    assert not events.put(b"1234")
    assert not events.wait_until_done(0)
    events.done(batch)
    assert (len(events), events.waiting) == (1, 1)
    assert events.put(b"1234567")
    assert counts.dropped == {"queue_full": 2}


def test_an_event_that_is_taken_at_once_is_not_taken_for_a_full_queue():
    events = MemoryQueue(max_bytes=100, counts=Counts())
    taken = []

    def take_between_lines(frame, *_):
        if frame.f_code is MemoryQueue.put.__code__:
            taken.extend(events.take(max_events=10, max_bytes=100))
            return take_between_lines
        return None

    before = sys.gettrace()
    sys.settrace(take_between_lines)
    try:
        answer = events.put(b"event")
    finally:
        sys.settrace(before)

    assert taken == [b"event"]
    assert answer


def test_a_batch_holds_one_event_however_large():
    events = MemoryQueue(max_bytes=100, counts=Counts())
    events.put(b"12345")
    events.put(b"1")
    events.put(b"2")

    assert events.take(max_events=9, max_bytes=2) == [b"12345"]
    assert events.take(max_events=9, max_bytes=2) == [b"1", b"2"]
    assert events.take(max_events=9, max_bytes=2) == []


def test_waiting_for_what_is_there_does_not_wait_for_what_comes_later():
    events = MemoryQueue(max_bytes=100, counts=Counts())
    events.put(b"1")
    answers = []
    waiting = threading.Thread(
        target=lambda: answers.append(events.wait_until_done(PATIENCE))
    )
    batch = events.take(max_events=1, max_bytes=100)
    waiting.start()
    events.done(batch)
    waiting.join()
    events.put(b"2")

    assert answers == [True]
    assert not events.wait_until_done(0)


# -- When OpenMeter is not well


OUTAGES = {
    "500": problem(500),
    "502": Answer(502, b"<html>Bad gateway</html>", {"Content-Type": "text/html"}),
    "503": problem(503),
    "408": Answer(408),
    "429": Answer(429, b"", {"Retry-After": "0"}),
    "401": problem(401, "no such key"),
    "403": problem(403, "not this key"),
    "404": problem(404),
    "405": problem(405),
    "301": redirect(301, "/api/v1/events"),
    "302": redirect(302, "http://127.0.0.1:1/login"),
    "307": redirect(307, "/api/v1/events"),
    "308": redirect(308, "/api/v1/events"),
    "page": PAGE,
    "close": CLOSE,
    "reset": RESET,
}


@pytest.mark.parametrize("name", OUTAGES)
def test_an_outage_loses_and_doubles_nothing_and_keeps_the_order(
    openmeter, serve, caplog, name
):
    service = serve(batch_size=5)
    openmeter.rule = lambda _: OUTAGES[name] if len(openmeter.requests) < 6 else None
    service.request(*customers(12))
    service.drain()

    subjects = openmeter.subjects
    if name == "500":
        # The first one is tried alone, in turn with the others.
        subjects.insert(0, subjects.pop(subjects.index("customer-0")))
    assert subjects == customers(12)
    assert not openmeter.duplicates
    failed = openmeter.requests[:6]
    assert len({request.body for request in failed}) == (3 if name == "500" else 1)
    assert {r.target for r in openmeter.requests} == {"/api/v1/events"}
    assert {r.method for r in openmeter.requests} == {"POST"}
    stats = service.stats
    assert (stats.delivered, stats.waiting, stats.dead_lettered) == (12, 0, 0)
    # After a 500 the remaining events go in two requests.
    assert stats.retries == (7 if name == "500" else 6)
    assert stats.ambiguous == (
        6 if name in {"500", "502", "503", "close", "reset"} else 0
    )
    assert add_up(stats, 12)
    assert "openmeter_wsgi.delivery.sender" in {r.name for r in caplog.records}


@pytest.mark.parametrize("status", [400, 413])
def test_a_proxy_that_refuses_everything_for_a_while_loses_and_buries_nothing(
    openmeter, serve, status
):
    service = serve(batch_size=5)
    openmeter.rule = lambda _: (
        problem(status, "not today") if len(openmeter.requests) < 15 else None
    )
    service.request(*customers(7))
    service.drain()

    assert sorted(openmeter.subjects) == customers(7)
    assert service.stats.dead_lettered == 0
    assert service.stats.delivered == 7
    assert add_up(service.stats, 7)


def test_what_arrived_without_an_answer_is_repeated_with_the_same_ids(openmeter, serve):
    service = serve(batch_size=5)
    openmeter.script += [TAKEN_BUT_RESET] * 3
    service.request(*customers(5))
    service.drain()

    assert [len(set(openmeter.ids)), len(openmeter.subjects)] == [5, 20]
    assert set(openmeter.duplicates.values()) == {4}
    assert len({request.body for request in openmeter.requests}) == 1
    assert service.stats.ambiguous == 3
    assert service.stats.delivered == 5
    assert add_up(service.stats, 5)


def test_a_server_that_is_down_for_a_while_gets_everything_once(openmeter, serve):
    service = serve(batch_size=5)
    service.request(*customers(3))
    assert service.flush()
    openmeter.down()
    service.request(*[f"later-{n}" for n in range(12)])
    assert not service.flush(0.3)
    assert service.stats.waiting == 12
    assert add_up(service.stats, 15)

    openmeter.up()
    service.drain()

    assert openmeter.subjects == customers(3) + [f"later-{n}" for n in range(12)]
    assert not openmeter.duplicates
    assert service.stats.ambiguous == 0


def test_a_server_that_comes_back_is_found_without_a_flush(openmeter, serve):
    service = serve()
    openmeter.script += [RESET]
    service.request("alice")

    openmeter.wait_for(1)


def test_a_server_that_hangs_is_given_up_and_asked_again(openmeter, serve):
    service = serve(request_timeout=2)
    openmeter.script.append(HANGS_THEN_TAKES)
    service.request("alice")
    service.drain()

    first, second = openmeter.requests
    assert second.at - first.at >= 0.1  # a busy server notes the first one late
    assert first.ids == second.ids
    assert service.stats.ambiguous == 1

    openmeter.release()
    openmeter.wait_until(lambda: len(openmeter.taken) == 2)
    assert openmeter.ids == first.ids


def test_retry_after_is_waited_for(openmeter, serve):
    service = serve()
    openmeter.script.append(Answer(503, b"", {"Retry-After": "2"}))
    service.request("alice")

    openmeter.wait_for(1)

    first, second = openmeter.requests
    assert second.at - first.at >= 2


@pytest.mark.parametrize("value", ["soon", "-5", "1e9", ""])
def test_a_retry_after_that_is_none_is_ignored(openmeter, serve, value):
    service = serve()
    openmeter.script.append(Answer(429, b"", {"Retry-After": value}))
    service.request("alice")

    openmeter.wait_for(1)

    first, second = openmeter.requests
    assert second.at - first.at < 2


@pytest.mark.parametrize("name", ["401", "403", "404", "301", "page"])
def test_a_wrong_key_or_address_is_said_loudly(openmeter, serve, caplog, name):
    service = serve(api_key="om_secret")
    openmeter.script.append(OUTAGES[name])
    service.request("alice")
    service.drain()

    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert record.levelno == logging.ERROR
    assert "are kept" in record.getMessage()
    assert "om_secret" not in caplog.text


# -- Refused events


@pytest.mark.parametrize(
    "poison",
    [{0}, {50}, {1, 2, 77}, {0, 98}, {96, 97, 98}],
    ids=["first", "middle", "several", "outer", "last"],
)
def test_the_poison_is_buried_and_the_others_are_delivered(
    openmeter, serve, caplog, poison
):
    service = serve(flush_interval=NEVER, batch_size=99)
    everybody = customers(99)
    openmeter.poison = {everybody[n] for n in poison}
    service.request(*everybody)
    openmeter.wait_for(99 - len(poison))
    service.request("later")
    service.drain()

    good = [name for name in everybody if name not in openmeter.poison]
    assert openmeter.requests[0].subjects == everybody
    assert openmeter.subjects == [*good, "later"]
    assert not openmeter.duplicates
    stats = service.stats
    assert (stats.delivered, stats.dead_lettered) == (len(good) + 1, len(poison))
    assert add_up(stats, 100)
    buried = [r.getMessage() for r in caplog.records if "for good" in r.getMessage()]
    assert len(buried) == len(poison)
    for name in openmeter.poison:
        (line,) = [line for line in buried if f'"{name}"' in line]
        assert f"must be an object ({name})" in line
        assert '"id":"' in line


@pytest.mark.parametrize("count", [1, 3])
def test_a_batch_of_poison_waits_until_another_event_is_accepted(
    openmeter, serve, count
):
    service = serve(flush_interval=NEVER, batch_size=count)
    openmeter.poison = set(customers(count))
    service.request(*customers(count))
    for _ in range(10):
        assert not service.flush(0.05)
    assert service.stats.waiting == count
    assert service.stats.dead_lettered == 0

    service.request("good")
    service.drain()

    assert openmeter.subjects == ["good"]
    assert service.stats.dead_lettered == count
    assert add_up(service.stats, count + 1)


def test_a_batch_that_is_too_large_is_sent_in_pieces(openmeter, serve):
    service = serve(flush_interval=NEVER, batch_size=100)
    openmeter.rule = lambda request: problem(413) if len(request.events) > 10 else None
    service.request(*customers(100))
    openmeter.wait_for(100)
    service.drain()

    assert openmeter.subjects == customers(100)
    assert service.stats.dead_lettered == 0


# -- The key


def authorize(key):
    def rule(request):
        right = request.headers["Authorization"] == f"Bearer {key}"
        return None if right else problem(401, "bad key")

    return rule


def test_a_rotated_key_file_is_read_without_a_wait(openmeter, serve, tmp_path):
    file = tmp_path / "key"
    file.write_text("old\n")
    service = serve(api_key_file=file, flush_interval=NEVER)
    openmeter.rule = authorize("new")
    file.write_text("new\n")
    service.request("alice", "bob")
    assert service.flush()

    assert openmeter.subjects == ["alice", "bob"]
    assert len(openmeter.requests) == 2
    assert service.stats.retries == 0


def test_nothing_is_sent_without_the_key(openmeter, serve, caplog):
    answers = iter([OSError("sealed"), OSError("sealed"), "om_secret"])

    def key():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    service = serve(api_key=key)
    service.request("alice")
    service.drain()

    (request,) = openmeter.requests
    assert request.headers["Authorization"] == "Bearer om_secret"
    assert "sealed" in caplog.text
    assert "om_secret" not in caplog.text
    assert service.stats.delivered == 1


# -- Certificates


def test_an_unknown_authority_holds_everything(serve, monkeypatch, tmp_path, caplog):
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    with OpenMeterServer(tls=context) as secure:
        service = serve(secure.url)
        service.request("alice")
        until(lambda: "certificate" in caplog.text.lower())
        assert secure.requests == []
        assert service.stats.waiting == 1

        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
        service.drain()

        assert secure.subjects == ["alice"]


# -- The end


def test_close_delivers_ends_the_thread_and_may_be_repeated(openmeter, serve, caplog):
    service = serve(flush_interval=NEVER)
    service.request("alice", "bob")

    service.middleware.close(PATIENCE)
    service.middleware.close(PATIENCE)

    assert openmeter.subjects == ["alice", "bob"]
    assert delivery_threads() == []
    assert caplog.records == []


def test_what_comes_after_close_is_delivered(openmeter, serve):
    service = serve()
    service.request("alice")
    service.middleware.close(PATIENCE)

    service.request("bob")
    openmeter.wait_for(2)
    service.middleware.close(PATIENCE)

    assert openmeter.subjects == ["alice", "bob"]
    assert delivery_threads() == []


@pytest.mark.parametrize("state", ["hangs", "is down", "is busy"])
def test_close_ends_in_time_and_says_what_is_left(openmeter, serve, caplog, state):
    service = serve()
    if state == "hangs":
        openmeter.rule = lambda _: HANG
    elif state == "is down":
        openmeter.down()
    else:
        openmeter.rule = lambda _: Answer(503, b"", {"Retry-After": "3600"})
    service.request(*customers(3))
    began = time.monotonic()

    service.middleware.close(0.5)

    assert 0.5 <= time.monotonic() - began < PATIENCE / 2
    assert "3 events could not be delivered within 0.5 s" in caplog.text
    assert service.stats.waiting == 3

    openmeter.heal()
    service.drain()
    assert set(openmeter.subjects) == set(customers(3))


def test_close_cuts_a_backoff_short(openmeter, serve):
    service = serve()
    openmeter.script += [Answer(503, b"", {"Retry-After": "3600"})] * 3
    service.request("alice")
    openmeter.wait_for_requests(1)

    service.middleware.close(PATIENCE)

    assert openmeter.subjects == ["alice"]


def test_close_tries_again_what_was_refused_alone(openmeter, serve, caplog):
    service = serve()
    openmeter.script.append(problem(400, "a proxy's mood"))
    service.request("alice")
    openmeter.wait_for_requests(1)

    service.middleware.close(PATIENCE)

    assert openmeter.subjects == ["alice"]
    assert service.stats.waiting == 0


SCRIPT = """
import logging, sys, threading
from openmeter_wsgi import OpenMeterMiddleware
logging.basicConfig(level="WARNING")
def app(environ, start_response):
    start_response("200 OK", [])
    return [b"hello"]
middleware = OpenMeterMiddleware(
    app, meters={"api_requests": 1}, subject=lambda environ: "alice"
)
def refuse(thread):
    raise RuntimeError("can't start new thread")
if sys.argv[1] == "no threads":
    threading.Thread.start = refuse
body = middleware({"REQUEST_METHOD": "GET"}, lambda *_: None)
list(body)
body.close()
"""


def run(server, *, threads="threads", **options):
    """Serve one request in a process that ends by itself; return its stderr."""
    variables = {f"OPENMETER_{name.upper()}": str(v) for name, v in options.items()}
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-X", "dev", "-c", SCRIPT, threads],
        env={**os.environ, "OPENMETER_API_URL": server.url, **variables},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    return ended.stderr, time.monotonic() - began


@pytest.mark.parametrize("threads", ["threads", "no threads"])
def test_a_process_that_ends_delivers_what_it_has(openmeter, threads):
    stderr, _ = run(openmeter, threads=threads, flush_interval=NEVER)

    assert openmeter.subjects == ["alice"]
    assert "Traceback" not in stderr
    assert "could not be delivered" not in stderr


@pytest.mark.parametrize("state", ["hangs", "is down"])
def test_a_process_that_cannot_deliver_ends_in_time_and_says_so(openmeter, state):
    if state == "hangs":
        openmeter.rule = lambda _: HANG
    else:
        openmeter.down()

    stderr, seconds = run(
        openmeter, shutdown_timeout=1, request_timeout=600, flush_interval=NEVER
    )

    assert 1 <= seconds < 40  # with the start of an interpreter on a busy machine
    assert "1 events could not be delivered within 1.0 s" in stderr
    assert "Traceback" not in stderr


def test_a_flood_of_random_subjects_costs_little_more_than_its_events(serve, openmeter):
    openmeter.down()
    service = serve()
    service.request(*customers(100))
    tracemalloc.start()
    try:
        service.request(*[os.urandom(16).hex() for _ in range(20_000)])
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert used < 8 * 2**20

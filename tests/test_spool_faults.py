"""A disk that fails, files that are none, a clock that is set, a dropped delivery."""

import errno
import gc
import os

import pytest

from apps import listed, metered
from openmeter_server import problem
from openmeter_wsgi.errors import Expired, Unavailable
from openmeter_wsgi.spool import progress
from openmeter_wsgi.spool.progress import RecordingClient
from servers import make_environ
from spool_support import run, status_of
from spooling import event, server_dir, spool_queue, threads, until

NAME = "1700000000000-918420eaf38c404fa12e3311-00000001"


@pytest.fixture
def queue(openmeter, tmp_path):
    made = spool_queue(tmp_path / "spool", openmeter.url)
    yield made
    openmeter.heal()
    made.close(40)


def test_a_progress_file_that_is_deleted_is_made_anew(queue, openmeter, tmp_path):
    queue.start()
    queue.put(event("1"))
    assert queue.flush(40)
    path = server_dir(tmp_path / "spool") / progress.PROGRESS_NAME
    path.unlink()

    queue.put(event("2"))
    assert queue.flush(40)

    assert path.exists()
    assert openmeter.ids == ["1", "2"]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "directory"])
@pytest.mark.parametrize("ending", [".mapped", ".written.sealed"])
def test_what_is_no_file_holds_nobody(queue, openmeter, tmp_path, make, ending):
    make(tmp_path / "spool" / (NAME + ending))
    queue.start()

    queue.put(event("1"))
    assert queue.flush(40)

    assert openmeter.ids == ["1"]
    assert queue.in_spool.events == 0


def test_a_disk_that_fails_to_sync_leaves_the_books_right(
    queue, openmeter, monkeypatch, caplog
):
    def fail(fd):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    monkeypatch.setattr(os, "fdatasync", fail)
    queue.start()
    ids = [str(n) for n in range(2_000)]
    for id_ in ids:
        queue.put(event(id_))

    assert queue.flush(40)
    assert openmeter.ids == ids
    assert queue.counts.delivered == 2_000
    assert queue.waiting == 0
    assert "Input/output error" in caplog.text

    openmeter.poison = {"bad"}
    queue.put(event("bad", subject="bad"))
    queue.put(event("good"))
    until(lambda: queue.flush(1) and queue.counts.dead_lettered == 1)
    assert queue.counts.dropped == {}


class Record:
    """Keeps in memory since when each batch is in flight."""

    def __init__(self):
        self.since = {}

    def in_flight_since(self, batch):
        return self.since.get(batch)

    def record(self, batch, since):
        self.since[batch] = since

    def withdraw(self, batch):
        del self.since[batch]

    def check_is_sender(self):
        pass


class Away:
    def ingest(self, batch):
        raise Unavailable("no answer", ambiguous=True)


def test_a_clock_that_is_set_forward_expires_nothing():
    wall, monotonic = [1_000.0], [0.0]
    client = RecordingClient(
        Away(), Record(), resend_window=86_400.0,
        clock=lambda: wall[0], monotonic=lambda: monotonic[0],
    )  # fmt: skip
    for _ in range(3):
        with pytest.raises(Unavailable):
            client.ingest("batch")
        wall[0] += 2 * 86_400.0
        monotonic[0] += 10.0

    monotonic[0] += 86_400.0
    with pytest.raises(Expired):
        client.ingest("batch")


def serve(middleware):
    response = middleware(
        make_environ(HTTP_X_SUBJECT="acme"), lambda *_: lambda _: None
    )
    list(response)
    response.close()


@pytest.mark.parametrize("spooled", [False, True])
def test_a_middleware_that_is_dropped_delivers_and_ends(openmeter, tmp_path, spooled):
    spool = {"spool_dir": str(tmp_path / "spool")} if spooled else {}
    for _ in range(5):
        middleware = metered(
            listed, api_url=openmeter.url, flush_interval=3_600.0, **spool
        )
        serve(middleware)
        assert threads("openmeter_wsgi.delivery")
        del middleware
        gc.collect()

    until(lambda: not threads("openmeter_wsgi"))

    assert len(openmeter.ids) == 5


def test_a_middleware_that_is_dropped_waits_for_a_server_that_is_away(openmeter):
    openmeter.down()
    middleware = metered(listed, api_url=openmeter.url, flush_interval=0.01)
    serve(middleware)
    del middleware
    gc.collect()

    openmeter.up()
    until(lambda: not threads("openmeter_wsgi"))

    assert len(openmeter.ids) == 1


def test_the_status_says_why_events_wait(queue, openmeter, tmp_path):
    openmeter.rule = lambda _: problem(403, "not this key")
    queue.start()
    queue.put(event("1"))
    until(lambda: status_of(tmp_path / "spool")["last_answer"] is not None)

    status = status_of(tmp_path / "spool")
    assert status["last_answer"] == "answered 403 (not this key)"
    assert status["last_answer_age"] >= 0
    assert status["next_attempt_in"] <= 30
    assert "answered 403" in run(tmp_path / "spool", "status").stdout

    openmeter.heal()
    assert queue.flush(40)
    until(lambda: status_of(tmp_path / "spool")["last_answer"] is None)

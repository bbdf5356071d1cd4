"""Somebody else removes files of a spool in use: a deploy, a cleaner, a mount."""

import contextlib
import os
import shutil
import signal
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from openmeter_wsgi.lock import ELECTION, LOCK
from openmeter_wsgi.spool import delivery as deliveries
from openmeter_wsgi.spool import progress, reader, writer
from openmeter_wsgi.spool.files import MAPPED, WRITTEN
from spooling import Process, event, files, segments, server_dir, spool_queue, until

NEVER = 3_600.0


@pytest.fixture
def queue(openmeter, tmp_path):
    made = spool_queue(tmp_path / "spool", openmeter.url, segment_bytes=64 * 1024)
    made.start()
    yield made
    openmeter.heal()
    made.close(40)


@pytest.fixture
def waiting(openmeter, tmp_path):
    """A delivery whose server is down, so that all events wait."""
    openmeter.down()
    made = spool_queue(tmp_path / "spool", openmeter.url, segment_bytes=64 * 1024)
    made.start()
    yield made
    openmeter.heal()
    made.close(40)


def put(queue, count, prefix="e"):
    for n in range(count):
        queue.put(event(f"{prefix}{n}"))
    return {f"{prefix}{n}" for n in range(count)}


def removed(path):
    """Remove a directory in which others make files meanwhile."""
    while path.exists():
        shutil.rmtree(path, ignore_errors=True)


def replaced(path):
    removed(path)
    with contextlib.suppress(FileExistsError):  # they were faster
        path.mkdir(mode=0o700)


@pytest.mark.parametrize("remove", [removed, replaced])
def test_a_directory_that_is_removed_loses_nothing(
    waiting, openmeter, tmp_path, remove, caplog
):
    ids = put(waiting, 1_000)
    remove(tmp_path / "spool")
    ids |= put(waiting, 1_000, "later")
    assert not waiting.flush(0.2)

    openmeter.up()
    assert waiting.flush(40)

    assert set(openmeter.ids) == ids
    assert "removed or replaced" in caplog.text


@pytest.mark.parametrize("form", [MAPPED, WRITTEN])
def test_segments_that_are_removed_are_put_back(openmeter, tmp_path, form):
    """Live ones and sealed ones, in either form."""
    openmeter.down()
    queue = spool_queue(tmp_path / "spool", openmeter.url, form=form)
    try:
        queue.start()
        ids = put(queue, 300)
        assert len(segments(tmp_path / "spool")) >= 3
        for path in segments(tmp_path / "spool"):
            path.unlink(missing_ok=True)
        assert not queue.flush(0.2)
        openmeter.up()
        assert queue.flush(40)
        assert set(openmeter.ids) == ids
    finally:
        queue.close(40)


def test_no_flush_says_yes_while_another_thread_puts_back(waiting, openmeter, tmp_path):
    for number in range(20):
        put(waiting, 100, str(number))
        for path in segments(tmp_path / "spool"):
            path.unlink(missing_ok=True)
        assert answers_together(lambda: waiting.flush(0)) == {False}
    openmeter.up()


def answers_together(call, threads=8):
    """Return the set of results of *call* in threads that start it at once."""
    together = threading.Barrier(threads)

    def answer(_):
        together.wait(40)
        return call()

    with ThreadPoolExecutor(threads) as pool:
        return set(pool.map(answer, range(threads)))


def test_what_was_delivered_before_is_not_put_back(queue, openmeter, tmp_path):
    ids = put(queue, 100)
    assert queue.flush(40)
    openmeter.down()
    ids |= put(queue, 100, "later")
    for path in segments(tmp_path / "spool"):
        path.unlink(missing_ok=True)
    assert not queue.flush(0.2)

    openmeter.up()
    assert queue.flush(40)

    assert Counter(openmeter.ids) == Counter(ids)


def test_without_a_progress_file_all_comes_back_under_the_same_ids(
    queue, openmeter, tmp_path
):
    ids = put(queue, 100)
    assert queue.flush(40)
    removed(tmp_path / "spool")
    ids |= put(queue, 10, "later")

    assert queue.flush(40)

    assert set(openmeter.ids) == ids


def test_segments_that_are_delivered_are_not_taken_for_removed(
    queue, openmeter, tmp_path, caplog
):
    ids = put(queue, 3_000)
    assert queue.flush(40)
    until(lambda: len(segments(tmp_path / "spool")) <= 2)

    assert queue.flush(40)

    assert Counter(openmeter.ids) == Counter(ids)
    assert "removed" not in caplog.text


def test_a_close_puts_back_what_was_removed(waiting, openmeter, tmp_path):
    ids = put(waiting, 100)
    for path in segments(tmp_path / "spool"):
        path.unlink(missing_ok=True)
    openmeter.up()

    waiting.close(40)

    assert set(openmeter.ids) == ids


def test_a_process_that_serves_notices_by_itself(waiting, openmeter, tmp_path):
    ids = put(waiting, 100)
    for path in segments(tmp_path / "spool"):
        path.unlink(missing_ok=True)
    openmeter.up()

    openmeter.wait_until(lambda: set(openmeter.ids) == ids)


# -- Locks


def test_an_owner_whose_lock_is_deleted_loses_nothing(queue, openmeter, tmp_path):
    ids = put(queue, 10)
    assert queue.flush(40)
    (lock,) = [p for p in files(tmp_path / "spool", LOCK) if p.name != ELECTION]
    lock.unlink()

    ids |= put(queue, 100, "later")
    assert queue.flush(40)

    assert Counter(openmeter.ids) == Counter(ids)
    assert lock.name not in [p.name for p in files(tmp_path / "spool", LOCK)]


def test_a_segment_without_a_lock_is_read_like_a_live_one(tmp_path, monkeypatch):
    """It is deleted when it has not grown for an hour."""
    name = "1700000000000-918420eaf38c404fa12e3311-00000001.mapped"
    path = tmp_path / name
    path.write_bytes(event("1") + b"\n" + bytes(100))
    spool = reader.SpoolReader(tmp_path, None)
    spool.refresh(everything=True)
    spool.done(spool.take(max_events=10, max_bytes=1_000_000))
    spool.refresh(everything=True)
    assert path.exists()

    with path.open("r+b") as file:
        file.write(event("1") + b"\n" + event("2") + b"\n")
    spool.refresh(everything=True)
    batch = spool.take(max_events=10, max_bytes=1_000_000)
    assert list(batch) == [event("2")]
    spool.done(batch)

    monkeypatch.setattr(reader, "LOCKLESS_TIME", 0.0)
    spool.refresh(everything=True)
    spool.refresh(everything=True)
    assert not path.exists()
    spool.close()


def test_a_sender_whose_lock_is_deleted_steps_down(queue, openmeter, tmp_path):
    ids = put(queue, 10)
    assert queue.flush(40)
    lock = server_dir(tmp_path / "spool") / ELECTION
    lock.rename(tmp_path / "deleted")  # under another name its number is not used again

    ids |= put(queue, 10, "later")
    assert queue.flush(40)

    until(lock.exists)
    assert not lock.samefile(tmp_path / "deleted")
    assert Counter(openmeter.ids) == Counter(ids)


def test_locks_say_every_hour_that_they_are_in_use(queue, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "TOUCH_INTERVAL", 0.0)
    put(queue, 1)
    until(lambda: len(files(tmp_path / "spool", LOCK)) == 2)  # the sender's, too
    locks = files(tmp_path / "spool", LOCK)
    for path in locks:
        os.utime(path, (0, 0))
    put(queue, 1)

    until(lambda: all(path.stat().st_mtime > 0 for path in locks))


# -- Senders that are stuck


@contextlib.contextmanager
def stuck(queue):
    """Let the attempts of a delivery hang in a way that no deadline ends."""
    released = threading.Event()
    entered = threading.Event()
    client = queue._own_sender.sender._client._client
    ingest = client.ingest

    def hang(events):
        client.ingest = ingest
        ingest(events)
        entered.set()
        released.wait()

    client.ingest = hang
    try:
        yield entered, released
    finally:
        released.set()


def test_another_thread_takes_the_place_of_a_sender_that_is_stuck(
    openmeter, tmp_path, caplog
):
    queue = spool_queue(tmp_path / "spool", openmeter.url, request_timeout=0.2)
    queue.start()
    try:
        with stuck(queue) as (entered, released):
            ids = put(queue, 10)
            assert entered.wait(40)
            ids |= put(queue, 10, "later")
            openmeter.wait_until(lambda: set(openmeter.ids) == ids)
            assert "an attempt to deliver has not ended for" in caplog.text
            written = (
                server_dir(tmp_path / "spool") / progress.PROGRESS_NAME
            ).read_bytes()
            assert queue.flush(40)
            delivered = queue.counts.delivered
            stuck_one = queue._abandoned[0]
            written = (
                server_dir(tmp_path / "spool") / progress.PROGRESS_NAME
            ).read_bytes()

            released.set()
            until(lambda: not stuck_one.worker.is_running)

        # It wrote nothing; its events are counted by the process that sent them again.
        assert (
            server_dir(tmp_path / "spool") / progress.PROGRESS_NAME
        ).read_bytes() == written
        assert queue.counts.delivered == delivered == 20
    finally:
        queue.close(40)


SENDER = """
import sys
from pathlib import Path
from spooling import event, spool_queue
queue = spool_queue(Path(sys.argv[1]), sys.argv[2])
queue.start()
queue.put(event("frozen"))
assert queue.flush(40)
print("sending", flush=True)
sys.stdin.read()
"""


def test_a_frozen_sender_is_reported_by_the_others(
    openmeter, tmp_path, monkeypatch, caplog
):
    spool = tmp_path / "spool"
    monkeypatch.setattr(deliveries, "FROZEN_AFTER", 0.5)
    with Process(SENDER, str(spool), openmeter.url) as sender:
        assert sender.line() == "sending"
        queue = spool_queue(spool, openmeter.url)
        try:
            queue.start()
            os.kill(sender.process.pid, signal.SIGSTOP)
            put(queue, 3)
            until(lambda: [p.code for p in queue.problems] == ["not_delivering"])
            assert "has not moved for" in queue.problems[0].text
            put(queue, 1, "wakes")
            until(lambda: "has not moved for" in caplog.text)
        finally:
            os.kill(sender.process.pid, signal.SIGCONT)
            sender.kill()
            queue.close(40)


# -- Room


ENDING = """
import os, sys
from pathlib import Path
from spooling import event, spool_queue
queue = spool_queue(Path(sys.argv[1]), sys.argv[4], segment_bytes=2**21,
                    shutdown_timeout=0.0, max_spool_bytes=2**24)
for n in range(5):
    queue.put(event(f"{sys.argv[2]}-{n}"))
if sys.argv[3] == "killed":
    os.kill(os.getpid(), 9)
queue.close()
"""


def used(spool):
    return sum(path.stat().st_size for path in segments(spool))


@pytest.mark.load
@pytest.mark.parametrize("end", ["closed", "killed"])
def test_short_lived_processes_do_not_fill_the_spool(openmeter, tmp_path, end):
    spool = tmp_path / "spool"
    openmeter.down()
    queue = spool_queue(spool, openmeter.url)
    if end == "killed":
        queue.start()  # the sender adopts the segments
    try:
        for n in range(9):
            with Process(ENDING, str(spool), str(n), end, openmeter.url) as process:
                process.wait()
            until(lambda: used(spool) < 100_000)
        openmeter.up()
        queue.start()
        assert queue.flush(40)
        assert set(openmeter.ids) == {f"{n}-{i}" for n in range(9) for i in range(5)}
        assert queue.counts.dropped == {}
    finally:
        queue.close(40)

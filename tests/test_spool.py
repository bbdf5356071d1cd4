"""A spool in use: through the middleware, to OpenMeter."""

import json
import os
import re
import shutil
import threading
from pathlib import Path

import pytest

from billing import environ, handled, serve
from openmeter_server import HANG, RESET, TAKEN_BUT_RESET, Answer
from openmeter_wsgi import OpenMeterMiddleware
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.policy import Policy
from openmeter_wsgi.spool import files as directory
from openmeter_wsgi.spool import progress
from openmeter_wsgi.spool.dead_letters import DEAD_LETTERS
from openmeter_wsgi.spool.files import WRITTEN, file_system, journal_form
from spooling import (
    PATIENCE,
    Process,
    event,
    segments,
    server_dir,
    spool_queue,
    threads,
    until,
)


@pytest.fixture
def spool(tmp_path):
    return tmp_path / "spool"


@pytest.fixture
def queue(spool, openmeter):
    """Return a function that makes queues on the one spool."""
    made = []

    def make(**options):
        made.append(spool_queue(spool, openmeter.url, **options))
        return made[-1]

    yield make
    openmeter.heal()
    for one in made:
        one.close(PATIENCE)


@pytest.fixture
def middleware(spool, openmeter):
    made = []

    def make(**options):
        options = {"flush_interval": 0.1, "meters": {"a": 1}, **options}
        made.append(
            OpenMeterMiddleware(
                handled(lambda request: None),
                api_url=openmeter.url,
                spool_dir=str(spool),
                on_missing_subject="acme",
                **options,
            )
        )
        return made[-1]

    yield make
    openmeter.heal()
    for one in made:
        one.close(PATIENCE)


def put(queue, *ids, **data):
    for id_ in ids:
        queue.put(event(id_, **data))


def numbered(prefix, count):
    return [f"{prefix}{n}" for n in range(count)]


def doubts(spool):
    return progress.load_progress(server_dir(spool)).in_flight


def dead_letters(spool):
    path = server_dir(spool) / DEAD_LETTERS
    return (
        [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
    )


# -- Delivery


def test_requests_are_billed_once_and_leave_nothing_behind(
    middleware, openmeter, spool
):
    service = middleware()
    for _ in range(500):
        assert serve(service, environ()) == b"ok"

    assert service.flush(30)
    assert len(openmeter.ids) == 500
    assert not openmeter.duplicates
    assert service.stats().delivered == service.stats().events == 500
    service.close()
    assert segments(spool) == []


def test_no_thread_starts_and_nothing_is_opened_before_the_first_request(middleware):
    service = middleware()
    assert threads("openmeter_wsgi") == []

    serve(service, environ())
    assert {t.name for t in threads("openmeter_wsgi")} == {
        "openmeter_wsgi.delivery", "openmeter_wsgi.journal",
    }  # fmt: skip


def test_the_first_request_delivers_what_a_dead_process_left(
    middleware, openmeter, spool, queue
):
    put(queue(delivery="ship"), *numbered("old-", 10))
    service = middleware(meter_on_status_codes="500")

    serve(service, environ())  # is not billed itself

    openmeter.wait_for(10)


def test_events_leave_in_the_order_in_which_they_were_put(queue, openmeter):
    openmeter.down()
    one = queue()
    ids = numbered("", 3_000)
    put(one, *ids)
    openmeter.up()

    assert one.flush(30)
    assert openmeter.ids == ids


def test_a_batch_waits_for_others_no_longer_than_the_flush_interval(queue, openmeter):
    one = queue(flush_interval=0.5, batch_size=100)
    put(one, *numbered("", 5))

    openmeter.wait_for(5)
    assert len(openmeter.requests) == 1


def test_a_flush_does_not_wait_for_the_interval(queue, openmeter):
    one = queue(flush_interval=3_600)
    put(one, "1")

    assert one.flush(30)
    assert openmeter.ids == ["1"]


def test_a_flush_in_a_process_that_is_not_the_sender_waits_for_its_own(
    queue, openmeter
):
    first = queue()
    put(first, "first")
    openmeter.wait_for(1)
    second = queue()
    put(second, "second")

    assert second.flush(30)
    assert set(openmeter.ids) == {"first", "second"}
    openmeter.rule = lambda request: Answer(503)
    put(second, "third")
    assert not second.flush(0.3)
    openmeter.heal()
    assert second.flush(30)


def test_two_middlewares_of_a_process_share_one_directory(middleware, openmeter, spool):
    services = [middleware(), middleware()]
    for _ in range(100):
        for service in services:
            serve(service, environ())
    for service in services:
        assert service.flush(30)
        service.close()

    assert len(openmeter.ids) == 200
    assert not openmeter.duplicates
    assert sum(service.stats().delivered for service in services) == 200
    # A segment that the last one closed may still be there, with nothing in it to do.
    assert services[-1].stats().waiting == 0


def test_the_one_left_delivers_when_the_sender_closes(queue, openmeter):
    first, second = queue(), queue()
    put(first, "1")
    openmeter.wait_for(1)
    put(second, "2")
    first.close(5)
    put(second, "3")

    openmeter.wait_for(3)
    assert not openmeter.duplicates


def test_a_closed_queue_begins_anew_with_the_next_event(queue, openmeter, spool):
    one = queue()
    put(one, "1")
    one.close(5)
    assert (openmeter.ids, segments(spool)) == (["1"], [])

    put(one, "2")
    openmeter.wait_for(2)


def test_a_process_that_ships_starts_no_thread_and_sends_nothing(queue, openmeter):
    one = queue(delivery="ship")
    one.start()
    put(one, *numbered("", 2_000))

    assert threads("openmeter_wsgi") == []
    assert one.waiting == 2_000
    assert not one.flush(0.1)
    one.close()
    assert openmeter.requests == []
    other = queue()
    other.start()
    openmeter.wait_for(2_000)


def test_waiting_counts_what_any_process_has_in_the_directory(queue, openmeter):
    openmeter.down()
    one, other = queue(), queue(form=WRITTEN)
    put(one, *numbered("a", 150))
    put(other, *numbered("b", 250))

    assert one.waiting == other.waiting == 400
    openmeter.up()
    openmeter.wait_for(400)
    assert one.flush(30)
    assert one.waiting == 0


# -- Outages and doubt


@pytest.mark.load
def test_fifty_thousand_events_wait_on_the_disk_and_not_in_memory(openmeter, spool):
    openmeter.down()
    with Process(OUTAGE, str(spool), openmeter.url) as process:
        before, after = int(process.line()), int(process.line())
        assert after - before <= 6 * 1024, "KiB"
        openmeter.up()
        openmeter.wait_for(50_000, timeout=120)
    assert openmeter.ids == numbered("", 50_000)
    assert not openmeter.duplicates


OUTAGE = """
import re, sys
from pathlib import Path
from openmeter_wsgi.spool.files import SEGMENT_BYTES
from spooling import event, spool_queue, until

def anonymous():
    return re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]

print(anonymous(), flush=True)
queue = spool_queue(Path(sys.argv[1]), sys.argv[2], segment_bytes=SEGMENT_BYTES)
queue.start()
for n in range(50_000):
    queue.put(event(str(n), padding="x" * 100))
until(lambda: queue.counts.retries)
print(anonymous(), flush=True)
sys.stdin.read()
"""


def test_an_outage_leaves_files_by_their_size_and_not_by_the_time(
    queue, openmeter, spool
):
    openmeter.down()
    workers = [queue(flush_interval=0.02) for _ in range(8)]
    for n in range(30):
        for worker in workers:
            put(worker, str(n), padding="x" * 200)
        threading.Event().wait(0.03)  # longer than the interval

    until(lambda: any(worker.counts.retries for worker in workers))
    # 12 kB of each worker: the segment in use, of 16 kB, and the next one.
    assert len(segments(spool)) <= 16
    assert workers[0].waiting == 8 * 30


def test_the_sender_brings_on_the_disk_what_any_process_puts(
    queue, openmeter, spool, monkeypatch
):
    """So a power loss costs only the events put since the sender's last look."""
    synced = set()

    def sync(fd, kernel=os.fdatasync):
        kernel(fd)
        synced.add(os.fstat(fd).st_ino)

    monkeypatch.setattr(os, "fdatasync", sync)
    openmeter.down()
    sender, other = queue(), queue(delivery="ship")
    sender.start()
    put(sender, "own")
    put(other, "of another")

    for id_ in ("own", "of another"):
        (segment,) = [p for p in segments(spool) if event(id_) in p.read_bytes()]
        inode = segment.stat().st_ino
        until(lambda inode=inode: inode in synced)


def test_at_most_one_batch_comes_twice_when_answers_are_lost(queue, openmeter):
    openmeter.script += [TAKEN_BUT_RESET]
    one = queue()
    put(one, *numbered("", 50))

    openmeter.wait_for_requests(2)
    assert one.flush(30)
    first, second = openmeter.requests[:2]
    assert first.ids == second.ids
    assert one.counts.ambiguous == 1
    assert one.counts.delivered == 50


def test_a_batch_in_doubt_is_on_the_disk_before_it_is_sent(queue, openmeter, spool):
    openmeter.script += [HANG]
    one = queue()
    put(one, "1")
    openmeter.wait_for_requests(1)

    (doubt,) = doubts(spool)
    assert list(doubt.lines.values()) == [[(0, len(event("1")) + 1)]]
    openmeter.release()
    assert one.flush(30)
    assert doubts(spool) == []


def test_a_refused_connection_leaves_no_doubt(queue, openmeter, spool):
    openmeter.down()
    one = queue()
    put(one, "1")

    until(lambda: one.counts.retries > 1)
    until(lambda: not doubts(spool))
    assert one.counts.ambiguous == 0


def test_a_batch_too_long_in_doubt_is_set_aside_alone(queue, openmeter, spool):
    openmeter.script += [RESET]
    openmeter.rule = lambda request: Answer(429)
    one = queue(resend_window=0.01)
    put(one, "doubtful")
    openmeter.wait_for_requests(1)
    put(one, "behind")
    until(lambda: one.counts.dead_lettered)
    openmeter.heal()

    assert one.flush(30)
    assert openmeter.ids == ["behind"]
    (letter,) = dead_letters(spool)
    assert letter["event"]["id"] == "doubtful"
    assert letter["reason"].startswith("expired")
    assert letter["status"] is None
    assert segments(spool) == [] or one.waiting == 0


def test_a_poison_event_is_a_dead_letter_with_the_servers_reason(
    queue, openmeter, spool
):
    openmeter.poison = {"carol"}
    one = queue()
    put(one, *numbered("a", 5))
    put(one, "poison", subject="carol")
    put(one, *numbered("b", 5))

    until(lambda: one.counts.dead_lettered)
    assert one.flush(30)
    assert openmeter.ids == [*numbered("a", 5), *numbered("b", 5)]
    (letter,) = dead_letters(spool)
    assert (letter["event"]["id"], letter["status"]) == ("poison", 400)
    assert "carol" in letter["reason"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", letter["time"])
    assert (server_dir(spool) / DEAD_LETTERS).stat().st_mode & 0o777 == 0o600


# -- Errors of the disk


@pytest.mark.load
def test_a_full_spool_lets_events_wait_in_memory_and_counts_them(
    queue, openmeter, caplog
):
    openmeter.down()
    one = queue(max_spool_bytes=16 * 1024**2, segment_bytes=1024**2)
    ids = numbered("", 400)
    put(one, *ids, padding="x" * 50_000)

    assert 0 < one.counts.unspooled < 200
    assert one.waiting == 400
    assert "lost if this process dies" in caplog.text
    openmeter.up()
    openmeter.wait_for(400)
    assert one.flush(30)
    put(one, "after")
    openmeter.wait_for(401)
    assert one.counts.dropped == {}


def test_a_full_spool_of_one_who_ships_drops_and_counts(queue, openmeter):
    one = queue(delivery="ship", max_spool_bytes=16 * 1024**2, segment_bytes=1024**2)
    put(one, *numbered("", 400), padding="x" * 50_000)

    dropped = one.counts.dropped["spool_full"]
    assert 0 < dropped < 200
    assert one.waiting == 400 - dropped


def test_a_directory_that_vanishes_is_made_again(queue, openmeter, spool):
    one = queue()
    put(one, "1")
    openmeter.wait_for(1)
    one.close(5)
    shutil.rmtree(spool)

    put(one, "2")
    openmeter.wait_for(2)


def test_an_event_larger_than_a_segment_is_dropped_and_counted(
    queue, openmeter, caplog
):
    one = queue()
    put(one, "large", padding="x" * 20_000)
    put(one, "small")

    openmeter.wait_for(1)
    assert openmeter.ids == ["small"]
    assert one.counts.dropped == {"too_large": 1}
    assert "expected at most 16384" in caplog.text


# -- The directory


def refused(path, **options):
    with pytest.raises(ConfigError) as raised:
        OpenMeterMiddleware(
            handled(lambda request: None), spool_dir=str(path), api_key="x", **options
        )
    return str(raised.value)


def test_a_missing_directory_is_made_for_its_owner_alone(middleware, spool):
    middleware()

    assert spool.stat().st_mode & 0o7777 == 0o700
    assert (spool / "format").read_text() == "openmeter_wsgi spool 1\n"


def test_a_directory_whose_parent_is_missing_is_refused(tmp_path):
    assert "No such file or directory" in refused(tmp_path / "a" / "b")


def test_a_symlink_is_refused(tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")

    assert "a symlink is not followed" in refused(tmp_path / "link")


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")

    assert "is no directory" in refused(tmp_path / "file")


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777])
def test_a_directory_that_others_can_write_into_is_refused(tmp_path, mode):
    tmp_path.chmod(mode)

    assert "can be written by others" in refused(tmp_path)


def test_a_directory_of_somebody_else_is_refused(tmp_path, monkeypatch):
    """Not given away, which only root can do: we are taken for somebody else."""
    monkeypatch.setattr(os, "geteuid", lambda: 12_345)

    uid = tmp_path.stat().st_uid
    assert f"belongs to user {uid}, expected 12345" in refused(tmp_path)


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "smb3", "fuse.sshfs"])
def test_a_file_system_of_another_machine_is_refused(tmp_path, monkeypatch, kind):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"1 0 0:1 / / rw - {kind} /dev/a rw\n")
    monkeypatch.setattr(directory, "_MOUNTS", mounts)

    assert f"is on {kind}" in refused(tmp_path)


def test_a_directory_of_another_format_is_refused(spool):
    spool.mkdir(mode=0o700)
    (spool / "format").write_text("openmeter_wsgi spool 9\n")

    assert "got 'openmeter_wsgi spool 9'" in refused(spool)


def test_to_ship_needs_a_directory():
    with pytest.raises(ConfigError, match="spool_dir: expected a directory"):
        Policy(api_key="x", delivery="ship")


@pytest.mark.parametrize(
    ("kind", "form"),
    [("ext4", "mapped"), ("xfs", "mapped"), ("tmpfs", "mapped"), ("btrfs", "written")],
)
def test_the_form_follows_the_file_system(tmp_path, monkeypatch, kind, form):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        f"1 0 0:1 / / rw - ext4 /dev/a rw\n2 1 0:2 / {tmp_path} rw - {kind} b rw\n"
    )
    monkeypatch.setattr(directory, "_MOUNTS", mounts)
    assert file_system(tmp_path) == kind
    assert file_system(Path("/")) == "ext4"
    assert journal_form(tmp_path) == form


def test_many_threads_lose_nothing(queue, openmeter):
    one = queue(batch_size=1_000)

    def put_many(thread):
        put(one, *numbered(f"{thread}-", 2_000))

    writers = [threading.Thread(target=put_many, args=(n,)) for n in range(6)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()

    assert one.flush(30)
    assert len(openmeter.ids) == 12_000
    assert not openmeter.duplicates

"""Processes that are killed with -9: their acknowledged events are delivered."""

import logging
import os
import random
import signal

import pytest

from openmeter_server import OpenMeterServer
from openmeter_wsgi.spool import watermark
from openmeter_wsgi.spool.files import MAPPED, WRITTEN
from spooling import Process, segments, server_dir, spool_queue, until

logger = logging.getLogger(__name__)

#: How many processes are killed; a long form is OPENMETER_TEST_KILLS=200.
KILLS = int(os.environ.get("OPENMETER_TEST_KILLS") or "20")

#: Puts events from several threads and prints each id once `put` has returned.
PUTTING = """
import os, sys, threading
from pathlib import Path
from spooling import event, spool_queue

directory, url, name, form, segment_bytes = sys.argv[1:]
queue = spool_queue(
    Path(directory), url, form=form, segment_bytes=int(segment_bytes)
)
queue.start()

def put(thread):
    n = 0
    while True:
        n += 1
        id_ = f"{name}-{thread}-{n}"
        queue.put(event(id_, subject=f"{name}-{thread}", padding="x" * (n % 700)))
        os.write(1, id_.encode() + b"\\n")

for thread in range(3):
    threading.Thread(target=put, args=(thread,), daemon=True).start()
sys.stdin.read()
"""

#: Puts three events and then does nothing but live.
IDLE = """
import sys
from pathlib import Path
from spooling import event, spool_queue

directory, url, name = sys.argv[1:]
queue = spool_queue(Path(directory), url)
queue.start()
for n in range(3):
    queue.put(event(f"{name}-{n}"))
print("ready", flush=True)
sys.stdin.read()
queue.close(0)
"""


@pytest.mark.load
@pytest.mark.timeout(240 + 10 * KILLS)
@pytest.mark.parametrize("form", [MAPPED, WRITTEN])
def test_what_was_acknowledged_before_a_kill_is_delivered(openmeter, tmp_path, form):
    acknowledged: set[str] = set()
    attempts = random.Random(form)
    for n in range(KILLS):
        with Process(
            PUTTING, str(tmp_path / "spool"), openmeter.url, str(n), form, "32768"
        ) as process:
            said = [process.line() for _ in range(attempts.randrange(1, 2_000))]
            acknowledged.update(said, process.kill())

    queue = spool_queue(tmp_path / "spool", openmeter.url)
    queue.start()
    try:
        assert queue.flush(120)
    finally:
        queue.close(10)
    assert acknowledged - set(openmeter.ids) == set()
    assert again(openmeter) <= KILLS
    for subject in {event["subject"] for event in openmeter.taken}:
        assert in_order(openmeter, subject)
    assert queue.waiting == 0
    assert segments(tmp_path / "spool") == []
    logger.info(
        "%s: %d kills, %d acknowledged, %d delivered, %d doubled",
        form, KILLS, len(acknowledged), len(openmeter.ids),
        len(openmeter.duplicates),
    )  # fmt: skip


def again(openmeter: OpenMeterServer) -> int:
    """Return the number of requests with events that were taken before."""
    seen: set[str] = set()
    count = 0
    for request in openmeter.requests:
        count += not seen.isdisjoint(request.ids)
        seen.update(request.ids)
    return count


def in_order(openmeter: OpenMeterServer, subject: str) -> bool:
    """Return True if the events of one thread came in the order of their numbers."""
    ids = dict.fromkeys(e["id"] for e in openmeter.taken if e["subject"] == subject)
    numbers = [int(id_.rpartition("-")[2]) for id_ in ids]
    return numbers == sorted(numbers)


def test_another_process_takes_over_when_the_sender_is_killed(openmeter, tmp_path):
    spool = str(tmp_path / "spool")
    with (
        Process(IDLE, spool, openmeter.url, "first") as first,
    ):
        first.line()
        openmeter.wait_for(3)
        with Process(IDLE, spool, openmeter.url, "second") as second:
            second.line()
            openmeter.wait_for(6)  # by the first: the second only waits
            until(lambda: not watermark.backlog(server_dir(tmp_path / "spool")).events)
            first.kill()
            with Process(IDLE, spool, openmeter.url, "third") as third:
                third.line()
                openmeter.wait_for(9)
                third.kill()
            assert second.end() == 0

    assert not openmeter.duplicates


def test_what_a_process_could_not_send_is_adopted_by_one_that_lives(
    openmeter, tmp_path
):
    spool = str(tmp_path / "spool")
    openmeter.down()
    with Process(IDLE, spool, openmeter.url, "dead") as process:
        process.line()
        process.kill()
    with (
        Process(IDLE, spool, openmeter.url, "a") as a,
        Process(IDLE, spool, openmeter.url, "b") as b,
    ):
        a.line()
        b.line()
        openmeter.up()
        openmeter.wait_for(9)
        assert a.end() == 0
        assert b.end() == 0

    assert not openmeter.duplicates


#: A child forked by the handler of a request lives on after its parent's death.
FORKING = """
import os, signal, sys
from pathlib import Path
from spooling import event, spool_queue

directory, url = sys.argv[1:]
queue = spool_queue(Path(directory), url)
queue.start()
for n in range(3):
    queue.put(event(f"parent-{n}"))
child = os.fork()
if child:
    print(child, flush=True)
    sys.stdin.read()
else:
    signal.pause()
"""


def test_a_child_that_lives_on_keeps_nothing_of_its_dead_parent(openmeter, tmp_path):
    spool = tmp_path / "spool"
    openmeter.down()
    with Process(FORKING, str(spool), openmeter.url) as parent:
        child = int(parent.line())
        parent.process.kill()
        parent.process.wait()
        try:
            openmeter.up()
            queue = spool_queue(spool, openmeter.url)
            queue.start()
            openmeter.wait_for(3)
            assert queue.flush(120)
            queue.close(10)
            assert segments(spool) == []
            os.kill(child, 0)  # it lives
        finally:
            os.kill(child, signal.SIGKILL)
    assert not openmeter.duplicates

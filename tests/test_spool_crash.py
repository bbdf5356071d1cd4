"""A process is killed before any of its system calls, and loses nothing."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import signal
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from openmeter_wsgi.delivery.sender import Sender
from openmeter_wsgi.lock import election
from openmeter_wsgi.spool.dead_letters import DeadLetters
from openmeter_wsgi.spool.files import MAPPED, WRITTEN
from openmeter_wsgi.spool.journal import Journal
from openmeter_wsgi.spool.progress import RecordingClient
from openmeter_wsgi.spool.reader import SpoolReader
from openmeter_wsgi.stats import Counts
from spooling import event, segments

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

#: System calls that change files or their owners. `pathlib` uses only these.
CALLS = [
    (os, "open"), (os, "close"), (os, "write"), (os, "pwrite"), (os, "fsync"),
    (os, "fdatasync"), (os, "rename"), (os, "unlink"), (os, "posix_fallocate"),
    (os, "listdir"), (fcntl, "lockf"),
]  # fmt: skip
BATCH = 2
EVENTS = 7
#: Room for three of them.
SEGMENT_BYTES = 400


class Note:
    """A file in which a process records its actions; it survives the process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # The originals: die_at() replaces these functions later.
        self._open, self._write, self._close = os.open, os.write, os.close

    def add(self, *ids: str) -> None:
        fd = self._open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._write(fd, "".join(f"{id_}\n" for id_ in ids).encode())
        self._close(fd)

    def read(self) -> list[str]:
        return self._path.read_text().split() if self._path.exists() else []


class Taking:
    """An OpenMeter that takes everything."""

    def __init__(self, taken: Note) -> None:
        self._taken = taken

    def ingest(self, events: Sequence[bytes]) -> None:
        self._taken.add(*(json.loads(event)["id"] for event in events))


def deliver(directory: Path, taken: Note) -> None:
    """Deliver the events of the directory, as the elected sender does."""
    counts = Counts()
    with election(directory):
        letters = DeadLetters(directory, counts)
        spool = SpoolReader(directory, letters, max_events=BATCH)
        client = RecordingClient(Taking(taken), spool, resend_window=86_400)
        sender = Sender(client, counts, spool.done, keep_dead_letter=letters.add_event)
        spool.refresh(everything=True)
        while batch := spool.take(max_events=BATCH, max_bytes=1_000_000):
            sender.load(batch)
            assert sender.attempt() == 0
            spool.refresh(everything=True)


def live(directory: Path, form: str, settled: Note, taken: Note) -> None:
    """Put, seal, deliver while the own segment is live, put more, close, deliver."""
    journal = Journal(
        directory, form=form, max_bytes=2**30, segment_bytes=SEGMENT_BYTES
    )
    for n in range(EVENTS):
        journal.append(event(str(n)) + b"\n")
        settled.add(str(n))
        if n == 1:
            journal.prepare()
        if n == EVENTS // 2:
            deliver(directory, taken)
    journal.close()
    deliver(directory, taken)


def die_at(call: int) -> None:
    """Kill this process before its system call number *call*."""
    calls = itertools.count(1)

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **named: Any) -> Any:
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return called

    for module, name in CALLS:
        setattr(module, name, dying(getattr(module, name)))


def run_and_die(
    call: int, directory: Path, form: str, settled: Note, taken: Note
) -> int:
    """Live in a process that dies at *call*, and return how it ended."""
    child = os.fork()
    if not child:
        status = 1
        try:
            die_at(call)
            live(directory, form, settled, taken)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("form", [MAPPED, WRITTEN])
def test_a_death_before_any_call_loses_nothing_and_repeats_one_batch_at_most(
    form: str, quick_path: Path
) -> None:
    for call in itertools.count(1):
        directory = quick_path / str(call)
        directory.mkdir(mode=0o700)
        settled, taken = (
            Note(quick_path / f"{call}.{n}") for n in ("settled", "taken")
        )

        ended = run_and_die(call, directory, form, settled, taken)
        deliver(directory, taken)

        times = Counter(taken.read())
        assert set(settled.read()) <= set(times), call
        # One more may be on the disk, of which its process could not say so.
        assert len(times) <= len(settled.read()) + 1, call
        assert sum(times.values()) - len(times) <= BATCH, call
        assert segments(directory) == [], call
        if ended == 0:
            break
        assert ended == -signal.SIGKILL, call

    assert call > 50
    assert times == Counter(map(str, range(EVENTS)))

"""State machine of a spool: it loses no event and delivers no foreign one."""

import contextlib
import json
import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from openmeter_wsgi import lock
from openmeter_wsgi.delivery.sender import Sender
from openmeter_wsgi.errors import Rejected, Unavailable
from openmeter_wsgi.spool.dead_letters import DeadLetters
from openmeter_wsgi.spool.files import MAPPED, WRITTEN
from openmeter_wsgi.spool.journal import Journal, JournalClosed
from openmeter_wsgi.spool.progress import RecordingClient
from openmeter_wsgi.spool.reader import SpoolReader
from openmeter_wsgi.stats import Counts
from spooling import event, segments


class Server:
    """A client whose answers the machine says beforehand."""

    def __init__(self):
        self.taken = []
        self.answer = "takes"
        self.poison = set()

    def ingest(self, events):
        ids = [json.loads(line)["id"] for line in events]
        if self.poison.intersection(ids):
            raise Rejected("poison", status=400)
        if self.answer in {"takes", "takes and says nothing"}:
            self.taken += ids
        if self.answer == "takes and says nothing":
            raise Unavailable("reset", ambiguous=True)
        if self.answer == "is away":
            raise Unavailable("refused")


class Writer:
    """Model of a process: it uses the directory as a process does."""

    def __init__(self, directory, name, form):
        self.name = name
        self.journal = Journal(
            directory, form=form, max_bytes=2**30, segment_bytes=1_024
        )
        self.count = 0

    def put(self):
        id_ = f"{self.name}-{self.count}"
        line = event(id_) + b"\n"
        self.count += 1
        try:
            self.journal.write(line)
        except ValueError:
            self.journal.append(line)
        return id_

    def die(self):
        """Leave as one that is killed: nothing is sealed, the lock is gone."""
        owner = self.journal._owner
        lock._held.discard((os.getpid(), owner.token))
        os.close(owner._fd)


class Child:
    """A forked process: it has all that its parent had open, and puts into its own."""

    def __init__(self, directory, name, form, count):
        told, tell = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            try:
                writer = Writer(directory, name, form)
                ids = [writer.put() for _ in range(count)]
                os.write(tell, json.dumps([writer.journal.owner, ids]).encode())
                os.close(tell)
                signal.pause()
            finally:
                os._exit(1)
        os.close(tell)
        with open(told, "rb") as said:
            self.owner, self.ids = json.load(said)

    def kill(self):
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


class SpoolMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(dir=ROOM))
        self.server = Server()
        self.writers = []
        self.children = []
        self.put_ids = []
        self.crashes = 0
        self.names = 0
        self.elect()

    @initialize(poisonous=st.booleans())
    def choose(self, poisonous):
        # With poisonous events the final checks are weaker.
        self.poisonous = poisonous

    def elect(self):
        """A new sender: all that it knows, it reads."""
        self.counts = Counts()
        letters = DeadLetters(self.directory, self.counts)
        self.spool = SpoolReader(self.directory, letters, max_events=5)
        client = RecordingClient(self.server, self.spool, resend_window=86_400)
        self.sender = Sender(
            client,
            self.counts,
            self.spool.done,
            lambda a, b: 0.0,
            keep_dead_letter=letters.add_event,
        )

    def teardown(self):
        for writer in self.writers:
            writer.die()
        for child in self.children:
            child.kill()
        shutil.rmtree(self.directory)

    @precondition(lambda self: len(self.writers) < 3)
    @rule(form=st.sampled_from([MAPPED, WRITTEN]))
    def begin(self, form):
        self.names += 1
        self.writers.append(Writer(self.directory, f"p{self.names}", form))

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), count=st.integers(1, 12))
    def put(self, data, count):
        writer = data.draw(st.sampled_from(self.writers))
        self.put_ids += [writer.put() for _ in range(count)]

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def prepare(self, data):
        data.draw(st.sampled_from(self.writers)).journal.prepare()

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def close(self, data):
        writer = data.draw(st.sampled_from(self.writers))
        self.writers.remove(writer)
        writer.journal.close()
        try:
            writer.put()
        except JournalClosed:
            return
        raise AssertionError("a closed journal took an event")

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), torn=st.integers(0, 60))
    def kill(self, data, torn):
        writer = data.draw(st.sampled_from(self.writers))
        self.writers.remove(writer)
        if torn:
            with contextlib.suppress(ValueError):
                writer.journal.write(event("torn")[:torn])
        writer.die()

    @precondition(lambda self: len(self.children) < 2)
    @rule(form=st.sampled_from([MAPPED, WRITTEN]), count=st.integers(1, 12))
    def fork(self, form, count):
        """Fork a child, which lives on whether or not its parent's journals do."""
        self.names += 1
        child = Child(self.directory, f"p{self.names}", form, count)
        self.put_ids += child.ids
        self.children.append(child)

    @precondition(lambda self: self.children)
    @rule()
    def kill_a_child(self):
        self.children.pop().kill()

    @precondition(lambda self: self.writers and len(self.children) < 2)
    @rule(data=st.data())
    def fork_and_kill_the_parent(self, data):
        """A child's open files do not keep the sender from adopting its parent's."""
        self.fork(MAPPED, 1)
        self.kill(data, 0)
        self.deliver_all()

    @precondition(lambda self: self.put_ids and self.poisonous)
    @rule(data=st.data())
    def poison(self, data):
        if len(self.server.poison) < 2:
            self.server.poison.add(data.draw(st.sampled_from(self.put_ids)))

    @rule(answer=st.sampled_from(["takes", "takes and says nothing", "is away"]))
    def attempt(self, answer):
        self.server.answer = answer
        self.spool.refresh(everything=True)
        if not self.sender.busy and (
            events := self.spool.take(max_events=5, max_bytes=1_000_000)
        ):
            self.sender.load(events)
        if self.sender.busy:
            self.sender.attempt()

    @rule()
    def crash(self):
        """The sender is killed, and another one elected."""
        self.crashes += 1
        self.elect()

    @rule()
    def crash_between_the_answer_and_the_note(self):
        self.server.answer = "takes"
        self.spool.refresh(everything=True)
        if self.sender.busy:
            batch = self.sender._pending[0].batch
        elif not (batch := self.spool.take(max_events=5, max_bytes=1_000_000)):
            return
        if self.spool.in_flight_since(batch) is None:
            self.spool.record(batch, time.time())
        with contextlib.suppress(Rejected):
            self.server.ingest(batch)
        self.crash()

    @invariant()
    def nothing_is_foreign(self):
        assert set(self.server.taken) <= set(self.put_ids)

    @invariant()
    def the_order_within_a_process_is_kept(self):
        # A suspect steps aside, and one that is no longer poison comes late.
        first = dict.fromkeys(self.server.taken)
        for name in {id_.split("-")[0] for id_ in first}:
            own = [int(i.split("-")[1]) for i in first if i.split("-")[0] == name]
            assert own == sorted(own) or self.server.poison

    @rule()
    def deliver_all(self):
        self.server.answer = "takes"
        for _ in range(10_000):
            self.spool.refresh(everything=True)
            if not self.sender.busy:
                events = self.spool.take(max_events=5, max_bytes=1_000_000)
                if not events:
                    self.spool.refresh(everything=True)
                    break
                self.sender.load(events)
            self.sender.attempt()
        missing = set(self.put_ids) - set(self.server.taken)
        assert missing <= self.server.poison
        alive = {writer.journal.owner for writer in self.writers}
        alive |= {child.owner for child in self.children}
        if not self.server.poison:
            assert {p.name.split("-")[1] for p in segments(self.directory)} <= alive


ROOM = "/dev/shm" if os.path.isdir("/dev/shm") else None

TestSpoolMachine = pytest.mark.load(SpoolMachine.TestCase)
TestSpoolMachine.settings = settings(
    max_examples=50, stateful_step_count=40, deadline=None
)


@pytest.mark.load
def test_a_batch_is_taken_twice_at_most_once_per_crash_or_lost_answer(tmp_path):
    """A thousand crashes at the worst moment: each repeats its one batch."""
    machine = SpoolMachine()
    try:
        machine.begin(MAPPED)
        writer = machine.writers[0]
        for _ in range(200):
            machine.put_ids += [writer.put() for _ in range(3)]
            machine.crash_between_the_answer_and_the_note()
        machine.deliver_all()
        repeated = Counter(machine.server.taken)

        assert set(repeated) == set(machine.put_ids)
        assert sum(repeated.values()) - len(repeated) <= 5 * machine.crashes
    finally:
        machine.teardown()

"""Usage that is recorded and settled in any order, by processes that fork and die.

A longer form: ``pytest --hypothesis-profile long tests/test_usage_machine.py``.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing import environ, handled, serve
from openmeter_server import OpenMeterServer
from openmeter_wsgi import OpenMeterMiddleware, TicketError, Usage, defer
from servers import TIMEOUT
from spooling import spool_policy

if TYPE_CHECKING:
    from collections.abc import Iterator

SECRET = "a-secret-of-the-tests"
#: In memory, where there is one: to sync a file there takes no time.
ROOM = "/dev/shm" if os.path.isdir("/dev/shm") else None


def ticket(secret: str = SECRET, window: float = 86_400.0) -> str:
    """Return the ticket of a request."""
    tickets: list[str] = []
    app = OpenMeterMiddleware(
        handled(lambda request: tickets.append(defer(request))), dry_run=True,
        api_url="http://127.0.0.1:1", on_missing_subject="acme", ticket_secret=secret,
        resend_window=window,
    )  # fmt: skip
    serve(app, environ())
    return tickets[0]


GOOD = [ticket() for _ in range(3)]
BAD = [
    ticket("another-secret-of-tests"), ticket(window=0.001), GOOD[0][:-1],
    GOOD[1] + "A", "", GOOD[0].split(".")[0] + "." + GOOD[1].split(".")[1],
]  # fmt: skip


class Worker:
    """A process that bills on command, and acknowledges each command that returned."""

    def __init__(self, policy: Any) -> None:
        self._commands, theirs = socket.socketpair()
        self.pids = [os.fork()]
        if not self.pids[0]:
            try:
                work(Usage(policy), theirs)
            finally:
                os._exit(1)
        theirs.close()
        self._answers = self._commands.makefile("rb")

    def send(self, *command: Any) -> None:
        self._commands.sendall(json.dumps(command).encode() + b"\n")

    def answer(self) -> Any:
        return json.loads(self._answers.readline())

    def kill(self) -> None:
        """Kill all that were forked with -9; the last one is in the middle of work."""
        for pid in reversed(self.pids):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pids[0], 0)
        self._answers.close()
        self._commands.close()


def work(usage: Usage, commands: socket.socket) -> None:
    for line in commands.makefile("rb"):
        name, *arguments = json.loads(line)
        answer: Any = "done"
        if name == "fork":
            answer = os.fork()
            if answer:
                usage.record("acme", *arguments)
                commands.sendall(b"%d\n" % answer)
                signal.pause()  # its child goes on, and its threads
            continue
        try:
            getattr(usage, name)(
                *arguments[:2], **(arguments[2] if arguments[2:] else {})
            )
        except TicketError:
            answer = "refused"
        commands.sendall(json.dumps(answer).encode() + b"\n")


def one_of(kind: str, values: list[Any]) -> Any:
    return st.tuples(st.just(kind), st.sampled_from(values))


steps = st.lists(
    st.one_of(
        one_of("record", [None, None, "k1", "k2"]),
        one_of("settle", GOOD),
        one_of("settle", BAD),
        one_of("fork", [None]),
        one_of("flush", [None]),
        # Before the next command, or while it is at work.
        one_of("kill", ["before", "at work"]),
    ),
    max_size=15,
)


@pytest.fixture(scope="module")
def server() -> Iterator[OpenMeterServer]:
    with OpenMeterServer() as server:
        yield server


class Run:
    """Commands to one worker after another, and the events that they may bill."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy
        self._worker = Worker(policy)
        self._numbers = itertools.count()
        self._kills_next = False
        #: The numbers of commands that returned.
        self.returned: set[int] = set()
        #: The numbers that one key or ticket has billed, or may have.
        self.attempts: defaultdict[str, list[int]] = defaultdict(list)

    def step(self, name: str, argument: Any) -> None:
        if name == "kill" and argument == "at work":
            self._kills_next = True
        elif name == "kill":
            self.kill()
        elif name == "fork":
            self._fork()
        elif name == "flush":
            self._asked("flush", 0.05)
        elif name in {"record", "settle"}:
            self._bill(name, argument)

    def kill(self) -> None:
        self._worker.kill()
        self._worker, self._kills_next = Worker(self._policy), False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.kill()

    def _asked(self, *command: Any) -> Any:
        """Return the answer to a command, None if the worker was killed meanwhile."""
        self._worker.send(*command)
        if self._kills_next:
            return self.kill()
        return self._worker.answer()

    def _fork(self) -> None:
        """Have the worker go on in a child, after the parent has billed as well."""
        number = next(self._numbers)
        self.attempts[f"alone {number}"].append(number)
        meters = {"type": "calls", "data": {"number": number}}
        if pid := self._asked("fork", meters):
            self._worker.pids.append(pid)
            self.returned.add(number)

    def _bill(self, name: str, argument: Any) -> None:
        number = next(self._numbers)
        meters = {"type": "calls", "data": {"number": number}}
        key = {"key": argument} if name == "record" else {}
        if argument not in BAD:
            self.attempts[argument or f"alone {number}"].append(number)
        subject = "acme" if name == "record" else argument
        answer = self._asked(name, subject, meters, key)
        if answer is not None:
            assert answer == ("refused" if argument in BAD else "done")
            self.returned |= set() if argument in BAD else {number}


@settings(max_examples=settings.default.max_examples // 4)
@given(steps)
def test_what_was_recorded_arrives_and_nothing_else(
    server: OpenMeterServer, steps: list[tuple[str, Any]]
) -> None:
    directory = Path(tempfile.mkdtemp(dir=ROOM))
    policy = spool_policy(
        directory / "spool", server.url, ticket_secret=SECRET, flush_interval=0.02
    )
    Usage(policy)  # makes the directory
    before = len(server.taken)
    with Run(policy) as run:
        for step in steps:
            run.step(*step)
    usage = Usage(policy)
    assert usage.flush(TIMEOUT)
    usage.close()
    shutil.rmtree(directory)

    ids = defaultdict(set)
    for event in server.taken[before:]:
        ids[event["data"]["number"]].add(event["id"])
    known = {number for each in run.attempts.values() for number in each}
    assert run.returned <= set(ids) <= known
    # One key or ticket has one id, which nothing else has.
    of_each = [set().union(*(ids[n] for n in each)) for each in run.attempts.values()]
    assert all(len(each) <= 1 for each in of_each)
    assert sum(map(len, of_each)) == len(set().union(*of_each))

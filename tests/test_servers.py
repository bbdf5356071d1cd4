"""Real servers, from the first request to the end of the process."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import re
import socket
import threading
from collections import Counter
from signal import SIGINT, SIGTERM
from typing import TYPE_CHECKING

import pytest

from servers import (
    GTHREAD,
    SYNC,
    TIMEOUT,
    WAITRESS,
    WSGIREF,
    Server,
    Sink,
    connections,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

REQUESTS = 5_000
CLIENTS = 8


class Load:
    """Clients that send requests, each with its own name, until *requests* succeed.

    The name is the subject, so the events show for each answer
    whether it was billed, and how often. An attempt that breaks off is repeated
    with another name, as the server may or may not have settled it.
    """

    def __init__(self, address: tuple[str, int], requests: int = REQUESTS) -> None:
        self._address = address
        self._numbers = itertools.count()
        self._wanted = iter(range(requests))
        self._lock = threading.Lock()
        self.answered: list[str] = []
        self.broken: list[str] = []
        threads = [threading.Thread(target=self._client) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _client(self) -> None:
        with connections(self._address) as connection:
            while self._another():
                while not self._ask(connection):
                    connection.close()

    def _another(self) -> bool:
        with self._lock:
            return next(self._wanted, None) is not None

    def _ask(self, connection: http.client.HTTPConnection) -> bool:
        name = f"client-{next(self._numbers)}"
        try:
            connection.request("GET", "/", headers={"X-Subject": name})
            # Or a server that sends head and body apart waits 40 ms in between.
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            response = connection.getresponse()
            body = response.read()
        except (ConnectionError, http.client.HTTPException):
            self.broken.append(name)
            return False
        assert (response.status, body) == (200, b"all at once")
        self.answered.append(name)
        return True


@contextlib.contextmanager
def serving(command: list[str], app: str, log: Path) -> Iterator[tuple[Server, Sink]]:
    with (
        Sink() as sink,
        Server(command, app, log, OPENMETER_API_URL=sink.url) as server,
    ):
        yield server, sink


def assert_each_answer_is_billed_once(load: Load, sink: Sink) -> None:
    subjects = sink.subjects()
    answered = Counter(load.answered)
    assert len(answered) == len(load.answered)
    billed = Counter({name: subjects[name] for name in answered})
    assert billed == answered
    # An attempt that broke off may have been settled, but not twice.
    assert subjects - answered <= Counter(set(load.broken))
    assert sink.repeated() == []


@pytest.mark.load
# 5,000 requests take a busy machine its time.
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "command",
    [
        SYNC,
        [*SYNC, "--preload"],
        [*SYNC, "--preload", "--max-requests", "50"],
        [*SYNC, "--max-requests", "500"],
        GTHREAD,
        [*GTHREAD, "--preload", "--max-requests", "250"],
        WAITRESS,
    ],
    ids=[
        "sync",
        "sync-preload",
        "sync-preload-recycled",
        "sync-recycled",
        "gthread",
        "gthread-preload-recycled",
        "waitress",
    ],
)
def test_5000_of_5000_answers_are_billed_once_across_a_deploy(
    command: list[str], tmp_path: Path
) -> None:
    """SIGTERM comes right after the last answer."""
    log = tmp_path / "log"
    with serving(command, "apps:billed", log) as (server, sink):
        load = Load(server.address)
        exit_code = server.stop()

    assert len(load.answered) == REQUESTS
    assert_each_answer_is_billed_once(load, sink)
    assert (exit_code, b"could not be delivered" in log.read_bytes()) == (0, False)


@pytest.mark.parametrize("command", [SYNC, GTHREAD, WAITRESS, WSGIREF])
def test_what_waits_for_its_batch_is_sent_at_exit(
    command: list[str], tmp_path: Path
) -> None:
    with serving(command, "apps:billed_at_exit", tmp_path / "log") as (server, sink):
        load = Load(server.address, requests=30)
        assert sink.events == []

        server.stop()

    assert_each_answer_is_billed_once(load, sink)


def test_a_worker_that_is_aborted_still_sends_what_it_had_settled(
    tmp_path: Path,
) -> None:
    """Gunicorn's timeout raises SystemExit into the application."""
    log = tmp_path / "log"
    command = [*SYNC, "--workers", "1", "--timeout", "2"]
    with serving(command, "apps:billed_at_exit", log) as (server, sink):
        load = Load(server.address, requests=30)
        with connections(server.address) as connection:
            connection.request("GET", "/stuck", headers={"X-Subject": "stuck"})
            # Gunicorn waits for its client, and kills a worker that waits too long.
            assert connection.getresponse().status == 500
        assert sink.received.wait(TIMEOUT)

        server.stop()

    assert re.search(rb"WORKER TIMEOUT", log.read_bytes())
    assert_each_answer_is_billed_once(load, sink)
    assert "stuck" not in sink.subjects()


@pytest.mark.parametrize("command", [SYNC, WAITRESS, WSGIREF])
def test_a_subject_that_arrives_twice_is_none(
    command: list[str], tmp_path: Path
) -> None:
    with serving(command, "apps:billed", tmp_path / "log") as (server, sink):
        with connections(server.address) as connection:
            for names in (["real"], ["real", "victim"], ["real, victim"]):
                connection.putrequest("GET", "/")
                for name in names:
                    connection.putheader("X-Subject", name)
                connection.endheaders()
                connection.getresponse().read()
                connection.close()
        server.stop(SIGINT if command is WAITRESS else SIGTERM)

    assert sink.subjects() == {"real": 1, "anonymous": 2}


@pytest.mark.parametrize(
    ("command", "lets_through"), [(SYNC, False), (WAITRESS, False), (WSGIREF, True)]
)
def test_which_servers_let_underscores_through(
    command: list[str], lets_through: bool, tmp_path: Path
) -> None:
    with serving(command, "apps:billed", tmp_path / "log") as (server, sink):
        with connections(server.address) as connection:
            connection.request("GET", "/", headers={"X_Subject": "victim"})
            connection.getresponse().read()
        server.stop(SIGINT if command is WAITRESS else SIGTERM)

    # docs/deploying.md lists the servers: WSGI cannot tell the two forms apart.
    assert sink.subjects() == {("victim" if lets_through else "anonymous"): 1}

"""A repetition that the application recognises is billed once."""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import TYPE_CHECKING, Any

import pytest

from billing import bill, environ, usage
from openmeter_wsgi import OpenMeterMiddleware, set_idempotency_key, set_meters
from openmeter_wsgi.sandbox import Sandbox
from servers import SYNC, TIMEOUT, Consumer, Server, make_environ
from test_sandbox_support import Api

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from openmeter_server import OpenMeterServer

WHOLE = 4_000_000


# -- Through the workers of a server, into the sandbox


@contextlib.contextmanager
def attempt(
    server: Server, key: str, subject: str = "acme", path: str = "/", gate: int = 0
) -> Iterator[tuple[int, Any, socket.socket]]:
    """Begin a request; yield the server's process id, the rest, and the connection."""
    at_gate = f"&gate={gate}" if gate else ""
    with (
        socket.create_connection(server.address, timeout=TIMEOUT) as connection,
        connection.makefile("rb") as received,
    ):
        head = f"GET {path}?key={key}{at_gate} HTTP/1.0\r\nX-Subject: {subject}\r\n\r\n"
        connection.sendall(head.encode())
        while received.readline().strip():
            pass  # the headers
        yield int(received.readline()), received, connection


def complete(server: Server, key: str, subject: str = "acme", path: str = "/") -> int:
    with attempt(server, key, subject, path) as (pid, body, _):
        assert len(body.read()) == WHOLE
    return pid


def reset(connection: socket.socket) -> None:
    """Hang up so that the server cannot miss it."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as sandbox, Api(sandbox.url) as api:
        api.meter("bytes", "SUM", "$.total", eventType="bytes")
        yield sandbox


@pytest.fixture
def server(sandbox: Sandbox, tmp_path: Path) -> Iterator[Server]:
    options = {"OPENMETER_API_URL": sandbox.url, "OPENMETER_FLUSH_INTERVAL": "0.05"}
    with Server(SYNC, "apps:billed_once", tmp_path / "log", **options) as server:
        yield server


def billed_events(sandbox: Sandbox) -> list[tuple[str, str, int]]:
    with Api(sandbox.url) as api:
        events = [listed["event"] for listed in api.events()]
    return sorted(
        (event["subject"], event["id"], event["data"]["total"]) for event in events
    )


def test_two_attempts_through_two_workers_are_billed_once(
    sandbox: Sandbox, server: Server
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gate:
        gate.settimeout(TIMEOUT)
        port = gate.getsockname()[1]
        with attempt(server, "k1", gate=port) as (first, body, _):
            opened, _ = gate.accept()
            # While that worker is busy, it is the other one that serves.
            second = complete(server, "k1")
            opened.close()
            assert len(body.read()) == WHOLE
    server.stop()

    assert first != second
    ((subject, event_id, total),) = billed_events(sandbox)
    assert (subject, total) == ("acme", WHOLE + len(f"{first}\n"))
    assert event_id.startswith("once-")
    with Api(sandbox.url) as api:
        assert api.value("bytes") == total


def test_another_subject_route_or_key_is_billed_for_itself(
    sandbox: Sandbox, server: Server
) -> None:
    for given in [("k1",), ("k2",), ("k1", "globex"), ("k1", "acme", "/v1/other")]:
        for _ in "ab":
            complete(server, *given)
    server.stop()

    events = billed_events(sandbox)
    assert [subject for subject, _, _ in events] == ["acme"] * 3 + ["globex"]
    assert len({event_id for _, event_id, _ in events}) == 4


@pytest.mark.parametrize("aborted_first", [True, False])
def test_an_aborted_attempt_never_takes_the_place_of_the_completed_one(
    sandbox: Sandbox, server: Server, aborted_first: bool
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gate:
        gate.settimeout(TIMEOUT)
        port = gate.getsockname()[1]
        if not aborted_first:
            complete(server, "k1")
        with attempt(server, "k1", gate=port) as (_, body, connection):
            opened, _ = gate.accept()
            body.close()  # it holds the socket open
            reset(connection)
            opened.close()
        complete(server, "k1")
        complete(server, "k1")
    server.stop()

    events = billed_events(sandbox)
    once = [total for _, event_id, total in events if event_id.startswith("once-")]
    own = [total for _, event_id, total in events if not event_id.startswith("once-")]
    assert len(once) == len(own) == 1
    assert once[0] > WHOLE > own[0]


# -- The ids


def ids(openmeter: OpenMeterServer, key: str, **changes: Any) -> list[str]:
    """Return the ids of two meters of a request under *key*."""

    def handler(request: Any) -> None:
        set_idempotency_key(request, key)
        set_meters(request, [{"type": "a"}, {"type": "a"}, {"b": 1}])

    before = len(openmeter.taken)
    bill(openmeter, handler, request=environ(**changes))
    return [event["id"] for event in openmeter.taken[before:]]


def test_each_event_has_an_id_of_its_own_and_the_same_again(
    openmeter: OpenMeterServer,
) -> None:
    first, again = ids(openmeter, "k"), ids(openmeter, "k")

    assert first == again
    assert [each.partition(":")[2] for each in first] == ["b", "a", "a:2"]


def test_parts_of_an_id_cannot_be_shifted_into_each_other(
    openmeter: OpenMeterServer,
) -> None:
    cases: list[tuple[str, dict[str, str]]] = [
        ("k", {}),
        ("k2", {}),
        ("k", {"REQUEST_METHOD": "POST"}),
        ("k", {"PATH_INFO": "/k"}),
        ("/k", {"PATH_INFO": ""}),
        ("k", {"SCRIPT_NAME": "/a", "PATH_INFO": "/b"}),
        ("k", {"PATH_INFO": "/a/b/"}),
        ("\xe9", {}),
    ]
    found = [ids(openmeter, key, **changes)[0] for key, changes in cases]

    assert len(set(found)) == len(cases)


@pytest.mark.parametrize("outcome", ["failed", "aborted"])
def test_an_attempt_that_does_not_complete_has_an_id_of_its_own(
    openmeter: OpenMeterServer, outcome: str
) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        set_idempotency_key(environ, "k")
        start_response("200 OK", [])
        yield b"one"
        if outcome == "failed":
            raise ValueError("the database went away")
        yield b"two"

    middleware = OpenMeterMiddleware(
        app, api_url=openmeter.url, meters={"a": 1}, on_failure="all"
    )
    stop_after = 1 if outcome == "aborted" else None
    for _ in "ab":
        Consumer(stop_after=stop_after).serve(middleware, make_environ())
    middleware.close(40)

    assert len(openmeter.ids) == 2
    assert not [each for each in openmeter.ids if each.startswith("once-")]


def test_without_a_key_each_request_is_billed(openmeter: OpenMeterServer) -> None:
    for _ in "ab":
        bill(openmeter, meters={"a": 1}, request=environ(HTTP_IDEMPOTENCY_KEY="k"))

    assert len(openmeter.ids) == 2
    assert usage(openmeter.taken) == [("a", {"total": 1})] * 2


@pytest.mark.parametrize("key", ["", None, 5, "\ud800"])
def test_what_is_no_key_is_refused(openmeter: OpenMeterServer, key: Any) -> None:
    def handler(request: Any) -> None:
        with pytest.raises(ValueError, match="idempotency key: expected text that"):
            set_idempotency_key(request, key)

    assert bill(openmeter, handler) == []

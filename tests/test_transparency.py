"""The application and its clients see no difference with the middleware."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import socket
import threading
import tracemalloc
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.validate import validator

import pytest

from apps import (
    APPS,
    BLOCK,
    BLOCKS,
    FAILING,
    MEASURED,
    SERVED,
    large,
    large_digest,
    metered,
)
from servers import (
    SERVERS,
    TIMEOUT,
    Consumer,
    Server,
    connections,
    exchange,
    make_environ,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

METHODS = ["GET", "HEAD", "POST"]


# -- Inside the validator, which checks the application and the server alike


def validated(app: Any, **options: Any) -> Any:
    """Let the middleware stand between two checks of PEP 3333."""
    return validator(metered(validator(app), dry_run=True, **options))


def outcome(app: Any, method: str, stop_after: int | None) -> list[object]:
    """Return all that a server and its client see of one request."""
    consumer = Consumer(stop_after=stop_after).serve(app, make_environ(method))
    errors = [consumer.raised, consumer.raised_by_close]
    return [
        consumer.status,
        # Of when, by the second: two requests may be on either side of one.
        [header for header in consumer.headers if header[0] not in {"Date", "Expires"}],
        consumer.start_calls,
        consumer.body,
        [(type(error), str(error)) for error in errors],
    ]


@pytest.mark.parametrize("options", [{}, {"meter": MEASURED}], ids=["flat", "measured"])
@pytest.mark.parametrize("stop_after", [None, 1])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SERVED)
def test_both_sides_keep_to_the_protocol(
    name: str, method: str, stop_after: int | None, options: dict[str, Any]
) -> None:
    app = SERVED[name]

    assert outcome(validated(app, **options), method, stop_after) == outcome(
        validator(app), method, stop_after
    )


@pytest.mark.parametrize("name", [*APPS, *FAILING])
def test_a_response_is_the_same_without_a_validator_too(name: str) -> None:
    app = SERVED[name]
    expected = outcome(app, "GET", None)

    assert outcome(metered(app, dry_run=True), "GET", None) == expected
    assert outcome(metered(app, dry_run=True, meter=MEASURED), "GET", None) == expected


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def get_stderr(self) -> Any:
        return io.StringIO()


@contextlib.contextmanager
def wsgiref_serving(app: Any) -> Iterator[tuple[str, int]]:
    """Serve *app* from a thread, where its memory can be watched."""
    with make_server("127.0.0.1", 0, app, WSGIServer, _QuietHandler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server.server_address  # type: ignore[misc]
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("name", APPS)
def test_wsgiref_serves_the_validated_application(name: str) -> None:
    request = "GET / HTTP/1.1\r\nHost: a\r\n\r\n"

    with wsgiref_serving(validator(APPS[name])) as address:
        expected = without_date(exchange(address, request))
    with wsgiref_serving(validated(APPS[name])) as address:
        assert without_date(exchange(address, request)) == expected


def test_100_megabytes_pass_without_being_held() -> None:
    digest = hashlib.sha256()
    size = 0
    with wsgiref_serving(validated(large)) as address, connections(address) as client:
        tracemalloc.start()
        try:
            client.request("GET", "/")
            response = client.getresponse()
            while chunk := response.read(65_536):
                digest.update(chunk)
                size += len(chunk)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert size == BLOCKS * len(BLOCK) > 100_000_000
    assert digest.hexdigest() == large_digest()
    assert peak < 8 * len(BLOCK)


# -- On the wire


@pytest.fixture(scope="module", params=SERVERS)
def address(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, int]]:
    """The address of a real server with every application bare and metered."""
    log: Path = tmp_path_factory.mktemp("server") / "log"
    with Server(SERVERS[request.param], "apps:bare_or_metered", log) as server:
        yield server.address


def without_date(received: bytes) -> bytes:
    return re.sub(rb"(?im)^(Date|Expires|Server): [^\r]*", rb"\1", received)


def wire(address: tuple[str, int], kind: str, name: str, *request: str) -> bytes:
    """Send a request twice on one connection, if possible; return the bytes."""
    method, version, *headers = request
    body = "name=value" if method == "POST" else ""
    length = [f"Content-Length: {len(body)}"] if body else []
    lines = [f"{method} /{kind}/{name} {version}", "Host: a", *headers, *length]
    text = "\r\n".join(lines) + "\r\n\r\n" + body
    return without_date(exchange(address, text, text))


@pytest.mark.parametrize("name", SERVED)
def test_a_client_receives_the_same_bytes(address: tuple[str, int], name: str) -> None:
    requests = [
        ("GET", "HTTP/1.1"),
        ("HEAD", "HTTP/1.1", "Connection: close"),
        ("GET", "HTTP/1.1", "Connection: close"),
        ("GET", "HTTP/1.0"),
        ("GET", "HTTP/1.0", "Connection: keep-alive"),
        ("GET", "HTTP/1.1", "Range: bytes=10-19"),
    ]
    if name == "echoed":
        # Others leave a body unread, over which servers may reset the connection.
        requests.append(("POST", "HTTP/1.1"))
    for request in requests:
        expected = wire(address, "bare", name, *request)

        assert expected.startswith(b"HTTP/1.")
        assert wire(address, "metered", name, *request) == expected
        assert wire(address, "measured", name, *request) == expected


@pytest.mark.parametrize("kind", ["metered", "measured"])
def test_a_chunk_is_sent_before_the_next_one_is_made(
    address: tuple[str, int], kind: str
) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as gate,
        connections(address) as client,
    ):
        gate.settimeout(TIMEOUT)
        client.request("GET", f"/{kind}/gated?gate={gate.getsockname()[1]}")
        response = client.getresponse()
        first = response.readline()

        opened, _ = gate.accept()
        with opened:
            opened.sendall(b"second")
        assert (first, response.read()) == (b"first\n", b"second")


@pytest.mark.parametrize("kind", ["metered", "measured"])
def test_a_large_stream_arrives_whole(address: tuple[str, int], kind: str) -> None:
    digest = hashlib.sha256()
    with connections(address) as client:
        client.request("GET", f"/{kind}/large")
        response = client.getresponse()
        while chunk := response.read(1 << 20):
            digest.update(chunk)

    assert digest.hexdigest() == large_digest()

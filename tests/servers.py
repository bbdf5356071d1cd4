"""Servers for tests: a WSGI server in this process, real ones in others, a sink."""

from __future__ import annotations

import contextlib
import http.client
import importlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.util import setup_testing_defaults

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from wsgiref.types import WSGIApplication

TESTS = Path(__file__).parent
#: Maximum number of seconds: below the timeout of pytest, so that it shows the stack.
TIMEOUT = 40

GUNICORN = [sys.executable, "-m", "gunicorn", "--no-control-socket"]
SYNC = [*GUNICORN, "--workers", "2"]
GTHREAD = [*GUNICORN, "--worker-class", "gthread", "--threads", "4", "--workers", "2"]
WAITRESS = [sys.executable, "-X", "dev", __file__, "waitress"]
WSGIREF = [sys.executable, "-X", "dev", __file__, "wsgiref"]
SERVERS = {"wsgiref": WSGIREF, "waitress": WAITRESS, "sync": SYNC, "gthread": GTHREAD}


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of a process that can import the modules of tests/."""
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, **variables}


def make_environ(method: str = "GET", **entries: Any) -> dict[str, Any]:
    """Return the environ of a request of 'acme'."""
    environ: dict[str, Any] = {
        "REQUEST_METHOD": method,
        "QUERY_STRING": "",
        "REMOTE_USER": "acme",
        **entries,
    }
    setup_testing_defaults(environ)
    return environ


class Consumer:
    """A minimal WSGI server (PEP 3333) that records everything it gets.

    A repeated `start_response` with exc_info raises the exception if a part of the
    body was sent. With *stop_after* it stops after that number of chunks, as a server
    does when the client disconnects.
    """

    def __init__(self, *, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.status: str | None = None
        self.headers: list[tuple[str, str]] = []
        self.start_calls: list[tuple[Any, ...]] = []
        self.body: list[bytes] = []
        self.sent = False
        self.length: int | None = None
        self.exhausted = False
        self.raised: BaseException | None = None
        #: True if this server raised, at a chunk of the application.
        self.by_server = False
        self.raised_by_close: BaseException | None = None

    def start_response(self, *arguments: Any) -> Any:
        status, headers, exc_info = (*arguments, None)[:3]
        self.start_calls.append((status, len(arguments)))
        if exc_info is not None and self.sent:
            raise exc_info[1]
        if exc_info is None and self.status is not None:
            raise AssertionError("start_response called twice without exc_info")
        self.status, self.headers = status, headers
        return self.write

    def write(self, data: bytes) -> None:
        if data and self.status is None:
            raise AssertionError("body before start_response")
        self.sent = self.sent or bool(data)
        self.body.append(data)

    def serve(self, app: WSGIApplication, environ: dict[str, Any]) -> Self:
        """Serve one request and keep the application's exception in `raised`."""
        try:
            response = app(environ, self.start_response)
        except BaseException as error:  # noqa: BLE001 - a server catches them all
            self.raised = error
            return self
        try:
            if hasattr(response, "__len__"):
                self.length = len(response)
            self._iterate(response)
        except BaseException as error:  # noqa: BLE001
            self.raised = error
        finally:
            self._close(response)
        return self

    def _iterate(self, response: Iterable[bytes]) -> None:
        if self.stop_after == 0:
            return
        for n, chunk in enumerate(response, 1):
            self.by_server = True
            self.write(chunk)
            self.by_server = False
            if n == self.stop_after:
                return
        self.exhausted = True

    def _close(self, response: Any) -> None:
        if hasattr(response, "close"):
            try:
                response.close()
            except BaseException as error:  # noqa: BLE001
                self.raised_by_close = error


class Sink:
    """A fake OpenMeter that accepts everything and counts the ids of events."""

    def __init__(self) -> None:
        self.ids: Counter[str] = Counter()
        self.events: list[dict[str, Any]] = []
        #: Set by every batch.
        self.received = threading.Event()
        #: While it is clear, batches are received but not answered.
        self.answering = threading.Event()
        self.answering.set()
        sink = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                batch = json.loads(body)
                sink.take(batch if isinstance(batch, list) else [batch])
                sink.answering.wait(TIMEOUT)
                sink.answer(self)

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = _SinkServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def take(self, events: list[dict[str, Any]]) -> None:
        self.events += events
        self.ids.update(event["id"] for event in events)
        self.received.set()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(204)
        handler.end_headers()

    def subjects(self) -> Counter[str]:
        return Counter(event["subject"] for event in self.events)

    def repeated(self) -> list[str]:
        return [event_id for event_id, times in self.ids.items() if times > 1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _SinkServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: Any) -> None:
        """Log nothing: killed processes break their connections."""


class Server:
    """A server in another process, on a listening socket that it inherits.

    The socket listens before the server starts, so clients can connect at once.
    """

    def __init__(self, command: list[str], app: str, log: Path, **env: str) -> None:
        self.log = log
        with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
            self.address: tuple[str, int] = listener.getsockname()
            fd = str(listener.fileno())
            bind = ["--bind", f"fd://{fd}"] if "gunicorn" in command else [fd]
            with log.open("wb") as output:
                self.process = subprocess.Popen(
                    [*command, *bind, app],
                    pass_fds=[listener.fileno()],
                    env=environment(**env),
                    stdout=output,
                    stderr=output,
                )

    def stop(self, signum: int = signal.SIGTERM) -> int:
        """Stop the server as a deployment does, and return its exit code."""
        self.process.send_signal(signum)
        try:
            return self.process.wait(TIMEOUT)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop()


class _Recorder(io.RawIOBase):
    """A reader of a socket that records all bytes."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.recorded = bytearray()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = self._connection.recv_into(buffer)
        self.recorded += buffer[:size]
        return size

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)


def exchange(address: tuple[str, int], *requests: str) -> bytes:
    """Send *requests* on one connection until it ends, and return all bytes received.

    The bytes end with ``<end>`` if the server closed the connection.
    """
    received = b""
    with socket.create_connection(address, timeout=TIMEOUT) as connection:
        for request in requests:
            recorder = _Recorder(connection)
            connection.sendall(request.encode())
            response = http.client.HTTPResponse(
                recorder,  # type: ignore[arg-type]
                method=request.split(" ", 1)[0],
            )
            ended = False
            try:
                with response:
                    response.begin()
                    response.read()
            except (http.client.IncompleteRead, http.client.RemoteDisconnected):
                ended = True
            received += bytes(recorder.recorded)
            if ended or response.will_close:
                rest = iter(lambda: connection.recv(65_536), b"")
                return received + b"".join(rest) + b"<end>"
    return received


@contextlib.contextmanager
def connections(address: tuple[str, int]) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection(*address, timeout=TIMEOUT)
    try:
        yield connection
    finally:
        connection.close()


def _wsgiref(listener: socket.socket, app: WSGIApplication) -> None:
    address = listener.getsockname()
    server = WSGIServer(address, WSGIRequestHandler, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    server.server_name, server.server_port = address
    server.setup_environ()
    server.set_app(app)
    # No SystemExit as in main(): in the middle of a response wsgiref treats it as an
    # error of the application, and continues.
    stop = threading.Thread(target=server.shutdown)
    signal.signal(signal.SIGTERM, lambda *_: stop.start())
    server.serve_forever()


def _waitress(listener: socket.socket, app: WSGIApplication) -> None:
    waitress = importlib.import_module("waitress")
    waitress.serve(app, sockets=[listener], threads=4)


def main(kind: str, fd: str, app: str) -> None:
    """Serve until SIGTERM, at which the process exits and runs its exit hooks."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    module, _, name = app.partition(":")
    serve = {"wsgiref": _wsgiref, "waitress": _waitress}[kind]
    serve(socket.socket(fileno=int(fd)), getattr(importlib.import_module(module), name))


if __name__ == "__main__":
    main(*sys.argv[1:])

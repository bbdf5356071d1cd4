"""Fake OpenMeter server for tests: real HTTP, on a thread, with scripted answers.

By default it accepts everything. Tests can change that::

    with OpenMeterServer() as server:
        server.script += [Answer(503), RESET]  # for the next two requests
        server.rule = lambda request: Answer(401)  # for all later requests
        server.poison = {"carol"}  # 400 to every batch with an event of this subject
        server.down()  # refuse connections until up()
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import struct
import threading
import time
from collections import Counter, deque
from email.utils import formatdate
from http import HTTPStatus
from http.client import HTTPMessage, parse_headers
from typing import TYPE_CHECKING, Any, Literal, Self

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

#: Maximum number of seconds to wait; a test that waits longer has failed.
PATIENCE = 40.0
ACCEPTED = {200, 202, 204}
_PATHS = {
    "/api/v1/events": 204,
    "/api/v3/openmeter/events": 202,
    "/v3/openmeter/events": 202,
}


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer to a request."""

    status: int = 204
    body: bytes = b""
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    #: True if the events are accepted; None: depends on the status.
    takes: bool | None = None
    #: If set, the connection is closed or reset, and no answer is sent.
    instead: Literal["close", "reset"] | None = None
    #: True if the answer is sent only after :meth:`OpenMeterServer.release`.
    hangs: bool = False


CLOSE = Answer(takes=False, instead="close")
RESET = Answer(takes=False, instead="reset")
#: The events are accepted, but the answer is not sent.
TAKEN_BUT_RESET = Answer(takes=True, instead="reset")
HANG = Answer(takes=False, instead="close", hangs=True)
#: An HTML page, as a proxy, a captive portal or a login sends it.
PAGE = Answer(
    200,
    b"<!DOCTYPE html><html><body>Please sign in</body></html>",
    {"Content-Type": "text/html; charset=utf-8"},
    takes=False,
)


def problem(status: int, detail: str | None = None) -> Answer:
    """Return an error document of OpenMeter's v1 API."""
    document = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "instance": "urn:request:example/0jkZ1mGyd4-000001",
    }
    if detail is not None:
        document["detail"] = detail
    return Answer(
        status,
        json.dumps(document).encode(),
        {"Content-Type": "application/problem+json"},
    )


def redirect(status: int, location: str) -> Answer:
    return Answer(status, b"", {"Location": location})


@dataclasses.dataclass(frozen=True)
class Request:
    """A request as received."""

    method: str
    target: str
    headers: HTTPMessage
    body: bytes
    #: The monotonic time at which it was read.
    at: float
    #: The client's port, which tells connections apart.
    connection: int

    @property
    def payload(self) -> Any:
        return json.loads(self.body)

    @property
    def is_array(self) -> bool:
        return self.body.lstrip().startswith(b"[")

    @property
    def events(self) -> list[dict[str, Any]]:
        if not self.body:
            return []
        payload = self.payload
        return payload if isinstance(payload, list) else [payload]

    @property
    def ids(self) -> list[str]:
        return [event["id"] for event in self.events]

    @property
    def subjects(self) -> list[str]:
        return [event["subject"] for event in self.events]


class OpenMeterServer:
    """A server on 127.0.0.1 that records requests and accepted events."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        #: Answers to the next requests. After them `rule`, `poison`, 204 or 202 apply.
        self.script: deque[Answer] = deque()
        self.rule: Callable[[Request], Answer | None] | None = None
        #: Subjects whose events make a batch invalid against the schema.
        self.poison: set[str] = set()
        #: Clock of the Date header, in seconds since 1970. None: no header.
        self.clock: Callable[[], float] | None = None
        self.requests: list[Request] = []
        #: All accepted events in order, with repetitions.
        self.taken: list[dict[str, Any]] = []
        self._counts: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._released = threading.Event()
        self._connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = _bound(0)
        self.port: int = self._listener.getsockname()[1]
        self._listening = False
        self.up()

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    # -- Received events

    @property
    def ids(self) -> list[str]:
        """The ids of the accepted events in order, each once."""
        with self._changed:
            return list(self._counts)

    @property
    def subjects(self) -> list[str]:
        """The subjects of the accepted events in order, with repetitions."""
        with self._changed:
            return [event["subject"] for event in self.taken]

    @property
    def duplicates(self) -> dict[str, int]:
        """The ids accepted more than once, each with its number."""
        with self._changed:
            return {id_: n for id_, n in self._counts.items() if n > 1}

    def wait_for(self, events: int, timeout: float = PATIENCE) -> None:
        """Wait until *events* distinct events are accepted."""
        self.wait_until(lambda: len(self._counts) >= events, timeout)

    def wait_for_requests(self, requests: int, timeout: float = PATIENCE) -> None:
        self.wait_until(lambda: len(self.requests) >= requests, timeout)

    def wait_until(
        self, condition: Callable[[], bool], timeout: float = PATIENCE
    ) -> None:
        """Wait until *condition* is true; it is checked after each request."""
        with self._changed:
            came = self._changed.wait_for(condition, timeout)
            assert came, (
                f"{len(self.requests)} requests and {len(self._counts)} events "
                f"within {timeout} s"
            )

    # -- Behaviour

    def heal(self) -> None:
        """Accept everything from now on."""
        self.script.clear()
        self.rule = None
        self.poison = set()
        self.release()
        self.up()

    def release(self) -> None:
        """Send the answers that hang, now and from now on."""
        self._released.set()

    def down(self) -> None:
        """Refuse new connections and break the open ones."""
        if not self._listening:
            return
        self._listening = False
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._listener.close()
        self._accepting.join(PATIENCE)
        self._break_connections()
        self._join()
        self._listener = _bound(self.port)  # keeps the port for up()

    def up(self) -> None:
        if self._listening:
            return
        self._listening = True
        self._listener.listen(128)
        self._accepting = self._started(self._accept, self._listener)

    def close(self) -> None:
        self.release()
        self.down()
        self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- Threads

    def _started(
        self, target: Callable[[socket.socket], None], on: socket.socket
    ) -> threading.Thread:
        thread = threading.Thread(
            target=target, args=(on,), name="openmeter_server", daemon=True
        )
        self._threads.append(thread)
        thread.start()
        return thread

    def _join(self) -> None:
        released = self._released.is_set()
        self._released.set()
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        self._threads.clear()
        if not released:
            self._released.clear()

    def _break_connections(self) -> None:
        with self._changed:
            connections = list(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):  # the client was faster
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with self._changed:
                self._connections.add(connection)
            self._started(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        # The client may disconnect, or a test call down(), at any moment.
        with contextlib.suppress(OSError, ValueError):
            if self._tls is not None:
                connection = self._secured(connection, self._tls)
            with connection, connection.makefile("rwb") as stream:
                while request := self._read(stream, connection):
                    if not self._answer(request, stream, connection):
                        break
        with self._changed:
            self._connections.discard(connection)
        connection.close()

    def _secured(self, connection: socket.socket, tls: ssl.SSLContext) -> socket.socket:
        secured = tls.wrap_socket(
            connection, server_side=True, do_handshake_on_connect=False
        )
        with self._changed:
            self._connections.discard(connection)
            self._connections.add(secured)
        try:
            secured.do_handshake()
        except OSError:
            secured.close()
            raise
        return secured

    def _read(self, stream: Any, connection: socket.socket) -> Request | None:
        line = stream.readline().decode("latin-1").split()
        if len(line) != 3:
            return None
        headers = parse_headers(stream)
        body = stream.read(int(headers.get("Content-Length", "0")))
        port = connection.getpeername()[1]
        return Request(line[0], line[1], headers, body, time.monotonic(), port)

    def _answer(self, request: Request, stream: Any, connection: socket.socket) -> bool:
        """Send the answer and return True if the connection can be used again."""
        with self._changed:
            answer = self.script.popleft() if self.script else self._usual(request)
            self.requests.append(request)
            self._changed.notify_all()
        if answer.hangs:
            self._released.wait(PATIENCE)
        takes = answer.status in ACCEPTED if answer.takes is None else answer.takes
        if takes:
            self._take(request)
        if answer.instead == "reset":
            # Makes close() send RST instead of FIN.
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        if answer.instead:
            return False
        stream.write(_encoded(self._dated(answer)))
        stream.flush()
        return True

    def _dated(self, answer: Answer) -> Answer:
        if self.clock is None:
            return answer
        headers = {"Date": formatdate(self.clock(), usegmt=True), **answer.headers}
        return dataclasses.replace(answer, headers=headers)

    def _usual(self, request: Request) -> Answer:
        if self.rule is not None and (answer := self.rule(request)):
            return answer
        for n, subject in enumerate(request.subjects):
            if subject in self.poison:
                where = f"/{n}/data" if request.is_array else "/data"
                return problem(
                    400,
                    "request body has an error: doesn't match schema #/components/"
                    f'schemas/IngestEventsBody: Error at "{where}": '
                    f"value must be an object ({subject})",
                )
        status = _PATHS.get(request.target.removeprefix(self.url))
        return Answer(status) if status else problem(404)

    def _take(self, request: Request) -> None:
        with self._changed:
            for event in request.events:
                self.taken.append(event)
                self._counts[event["id"]] += 1
            self._changed.notify_all()


def _bound(port: int) -> socket.socket:
    """Return a socket that is bound to the port but does not listen yet."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(("127.0.0.1", port))
    return made


def _encoded(answer: Answer) -> bytes:
    lines = [f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in answer.headers.items()]
    if answer.status != 204:
        lines.append(f"Content-Length: {len(answer.body)}")
    head = "\r\n".join([*lines, "", ""]).encode("latin-1")
    return head + answer.body

"""Plans the requests of the demo and sends them."""

from __future__ import annotations

import enum
import http.client
import json
import random
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: The API key of each subject, and the price of each model in credits. The application
#: has its own copies, because this module checks it.
KEYS = {
    "acme": "acme-key",
    "globex": "globex-key",
    "initech": "initech-key",
    "Zoë's Café": "cafe-key",
}
CREDITS = {"small": 1, "large": 5}
CLIENTS = 8
#: Seconds to wait for an answer.
TIMEOUT = 30.0
KIB = 4
#: More than the socket buffers of both sides hold: the server is still writing such a
#: page when a client that does not read it hangs up.
HUGE_KIB = 16 * 1024
#: Makes close() send a reset, as the kernel does for a killed client.
_RESET = struct.pack("ii", 1, 0)


class Kind(enum.Enum):
    """A kind of request: its name, share in percent, status and billed usage."""

    READ = "read", 38, 200, "request"
    CREATE = "create", 15, 201, "request"
    CHAT = "language model", 17, 200, "request, tokens, credits"
    STREAM = "stream to its end", 10, 200, "request, credits by page"
    BROKEN = "stream, app fails", 4, 200, "credits by sent page"
    HANG_UP = "stream, client leaves", 3, 200, "request, credits by page"
    MISSING = "not found", 5, 404, "nothing: status 404"
    FAILING = "server error", 4, 500, "nothing: status 500"
    STRANGER = "without a key", 4, 401, "nothing: status 401"

    def __init__(self, label: str, share: int, status: int, billed: str) -> None:
        self.label = label
        self.share = share
        self.status = status
        self.billed = billed


@dataclass(frozen=True)
class Request:
    """One request, and the number of pages that its client reads."""

    kind: Kind
    subject: str | None
    path: str
    body: dict[str, Any] | None = None
    #: The size of a page of a stream.
    page_bytes: int = KIB * 1024
    #: Number of complete pages of a stream. A client that hangs up does so in the next.
    pages: int = 0

    @property
    def headers(self) -> dict[str, str]:
        """The headers to send."""
        headers = {"Content-Type": "application/json"} if self.body else {}
        return headers | ({"X-API-Key": KEYS[self.subject]} if self.subject else {})


@dataclass(frozen=True)
class Answer:
    """The answer that a client received."""

    status: int
    body: bytes = field(repr=False)
    #: True if it was received to its end.
    whole: bool = True


def plan(requests: int, seed: int) -> list[Request]:
    """Return *requests* random requests; the same seed gives the same requests."""
    chance = random.Random(seed)
    kinds = list(Kind)
    # One of each kind, so that a small plan has all kinds.
    shares = [kind.share for kind in kinds]
    chosen = [*kinds, *chance.choices(kinds, shares, k=max(0, requests - len(kinds)))]
    chance.shuffle(chosen)
    return [_request(kind, chance) for kind in chosen[:requests]]


def _request(kind: Kind, chance: random.Random) -> Request:
    subject = chance.choice(list(KEYS))
    match kind:
        case Kind.STREAM | Kind.BROKEN | Kind.HANG_UP:
            return _stream(kind, subject, chance)
        case Kind.CREATE:
            return Request(kind, subject, "/orders", {"product": "anvil"})
        case Kind.CHAT:
            return Request(kind, subject, "/chat", _question(chance))
        case Kind.MISSING:
            return Request(kind, subject, "/products/moon")
        case Kind.FAILING:
            return Request(kind, subject, "/report")
        case Kind.READ | Kind.STRANGER:
            return Request(kind, subject if kind is Kind.READ else None, "/products")


def _stream(kind: Kind, subject: str, chance: random.Random) -> Request:
    if kind is Kind.HANG_UP:
        pages = chance.choice([0, 0, 0, 1])
        path = f"/export?kib={HUGE_KIB}&pages=3"
        return Request(kind, subject, path, page_bytes=HUGE_KIB * 1024, pages=pages)
    pages = chance.randint(1, 5)
    path = f"/export?kib={KIB}&pages={pages}"
    if kind is Kind.BROKEN:
        path = f"/export?kib={KIB}&pages=6&break_after={pages}"
    return Request(kind, subject, path, pages=pages)


def _question(chance: random.Random) -> dict[str, Any]:
    return {
        "model": chance.choice(list(CREDITS)),
        "prompt": "why " * chance.randint(1, 400),
        "max_tokens": chance.randint(1, 800),
    }


def send_all(
    address: tuple[str, int], requests: Sequence[Request], sent: Callable[[], None]
) -> list[tuple[Request, Answer]]:
    """Send *requests* from several clients at once; call *sent* after each.

    :raises OSError: if a client could not connect, or had no answer in time. All
        clients stop then, and also when this thread is interrupted.
    """
    stopped = threading.Event()

    def work(share: Sequence[Request]) -> list[tuple[Request, Answer]]:
        try:
            return _send_share(address, share, sent, stopped)
        except BaseException:
            stopped.set()
            raise

    shares = [requests[number::CLIENTS] for number in range(CLIENTS)]
    with ThreadPoolExecutor(CLIENTS, "client") as clients:
        try:
            return [pair for pairs in clients.map(work, shares) for pair in pairs]
        finally:
            stopped.set()


def _send_share(
    address: tuple[str, int],
    requests: Sequence[Request],
    sent: Callable[[], None],
    stopped: threading.Event,
) -> list[tuple[Request, Answer]]:
    """Send *requests* one after the other over a connection that stays open."""
    connection = http.client.HTTPConnection(*address, timeout=TIMEOUT)
    answers = []
    try:
        for request in requests:
            if stopped.is_set():
                break
            if request.kind is Kind.HANG_UP:
                answers.append((request, _read_and_leave(address, request)))
            else:
                answers.append((request, _exchange(connection, request)))
            sent()
    finally:
        connection.close()
    return answers


def _exchange(connection: http.client.HTTPConnection, request: Request) -> Answer:
    response = _ask(connection, request)
    try:
        return Answer(response.status, response.read())
    except http.client.IncompleteRead as broken:
        connection.close()
        return Answer(response.status, broken.partial, whole=False)


def _ask(
    connection: http.client.HTTPConnection, request: Request
) -> http.client.HTTPResponse:
    body = None if request.body is None else json.dumps(request.body).encode()
    method = "GET" if body is None else "POST"
    connection.request(method, request.path, body, request.headers)
    return connection.getresponse()


def _read_and_leave(address: tuple[str, int], request: Request) -> Answer:
    """Read some pages and one byte of the next, then reset the connection."""
    connection = http.client.HTTPConnection(*address, timeout=TIMEOUT)
    with socket.socket() as connection.sock:
        # Before connecting: it limits the bytes that the kernel takes for the client.
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        connection.sock.settimeout(TIMEOUT)
        connection.sock.connect(address)
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        with _ask(connection, request) as response:
            body = response.read(request.pages * request.page_bytes + 1)
    connection.close()
    return Answer(response.status, body, whole=False)

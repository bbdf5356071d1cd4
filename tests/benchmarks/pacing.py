"""HTTP client that sends requests at fixed times over a few connections."""

from __future__ import annotations

import selectors
import socket
import time

CONNECTIONS = 8
#: The body of every response.
BODY = b"ok"
_REQUEST = b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n"


def ask(port: int, pace: int, seconds: float) -> list[float]:
    """Send *pace* requests a second and return the seconds of each.

    A request is timed from its planned start. So the time in which it waits for a free
    connection counts, too.
    """
    with selectors.DefaultSelector() as selector:
        free = [_connected(port, selector) for _ in range(CONNECTIONS)]
        taken = _asked(selector, free, pace, int(pace * seconds))
        for key in list(selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
    return taken


def _connected(port: int, selector: selectors.BaseSelector) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    selector.register(connection, selectors.EVENT_READ)
    return connection


def _asked(
    selector: selectors.BaseSelector, free: list[socket.socket], pace: int, count: int
) -> list[float]:
    due: dict[socket.socket, float] = {}
    taken: list[float] = []
    began = time.perf_counter()
    sent = 0
    while len(taken) < count:
        now = time.perf_counter()
        while sent < count and free and began + sent / pace <= now:
            connection = free.pop()
            due[connection] = began + sent / pace
            connection.sendall(_REQUEST)
            sent += 1
        next_due = began + sent / pace if sent < count and free else now + 1
        for key, _ in selector.select(max(next_due - time.perf_counter(), 0)):
            answered: socket.socket = key.fileobj  # type: ignore[assignment]
            received = answered.recv(65_536)
            if not received:
                raise ConnectionError("expected an answer, got the end")
            if not received.endswith(BODY):
                continue  # the head alone
            taken.append(time.perf_counter() - due.pop(answered))
            free.insert(0, answered)
    return taken

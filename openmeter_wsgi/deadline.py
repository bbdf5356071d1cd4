"""One deadline for all of an attempt: name resolution, connection, request and answer.

The timeout of a socket bounds each wait for a byte, so a server that answers byte by
byte could hold its client for ever. Here a timer shuts the socket down. To resolve a
name cannot be stopped: it runs in a thread of its own, and whoever waits is released.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import weakref
from typing import Any

from openmeter_wsgi.threads import Wakeup

#: So many threads of a process may hang in a name resolution; no other is started.
MAX_STUCK = 2
#: The threads that resolve a name, of each process, by its id.
_resolving: dict[int, list[threading.Thread]] = {}


class Deadline:
    """The time that an attempt has, over and over again. Belongs to one connection.

    The first attempt starts its thread, and `close` ends it. Between attempts it sleeps
    without a timeout.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._wakeup = Wakeup()
        self._thread: threading.Thread | None = None
        self._is_idle = False
        #: When the attempt ends, None if there is none.
        self._ends_at: float | None = None
        self._socket: weakref.ref[socket.socket] | None = None
        #: Of a socket whose TLS handshake takes it from hand to hand: its own copy.
        self._copy: socket.socket | None = None
        #: Whether the time of the last attempt was over before it ended.
        self.is_over: bool = False

    def begin(self, seconds: float) -> None:
        """Begin an attempt that ends in so many *seconds*."""
        with self._guard:
            self.is_over = False
            self._ends_at = time.monotonic() + seconds
            idle, self._is_idle = self._is_idle, False
        if self._thread is None:
            self._start()
        elif idle:
            self._wakeup.set()

    def shorten(self, seconds: float) -> None:
        """Let the attempt end in so many *seconds*, if that is earlier."""
        with self._guard:
            if self._ends_at is not None:
                earlier = time.monotonic() + seconds
                self._ends_at = min(self._ends_at, earlier)
        self._wakeup.set()

    def end(self) -> None:
        """End the attempt: its socket is left alone from now on."""
        with self._guard:
            self._ends_at = None

    @property
    def left(self) -> float:
        """The seconds that are left of the attempt."""
        ends_at = self._ends_at
        return 0.0 if ends_at is None else max(ends_at - time.monotonic(), 0.0)

    def watch(self, connected: socket.socket, *, copy: bool = False) -> None:
        """Let *connected* be what is shut down; a *copy* until the next call."""
        duplicate = connected.dup() if copy else None
        with self._guard:
            before, self._copy = self._copy, duplicate
            self._socket = None if copy else weakref.ref(connected)
        if before is not None:
            before.close()

    def close(self) -> None:
        """End the thread."""
        with self._guard:
            self._ends_at, self._thread = None, None
            before, self._copy = self._copy, None
        if before is not None:
            before.close()
        self._wakeup.set()

    def _start(self) -> None:
        # One for each thread: an earlier one may not have ended yet.
        self._wakeup = Wakeup()
        self._thread = threading.Thread(
            target=self._run,
            args=(self._wakeup,),
            name="openmeter_wsgi.deadline",
            daemon=True,
        )
        try:
            self._thread.start()
        except RuntimeError:
            self._thread = None  # no more threads: the socket's own timeout has to do

    def _run(self, wakeup: Wakeup) -> None:
        while True:
            with self._guard:
                if self._thread is not threading.current_thread():
                    return
                left = None if self._ends_at is None else self.left
                self._is_idle = left is None
                if left == 0:
                    self.is_over, self._ends_at = True, None
                    self._shut_down()
                    continue
            wakeup.wait(left)

    def _shut_down(self) -> None:
        connected = self._copy or (self._socket and self._socket())
        if connected:
            with contextlib.suppress(OSError):  # closed at this moment
                connected.shutdown(socket.SHUT_RDWR)

    # -- Names

    def addresses(self, host: str, port: int) -> list[str]:
        """Return the addresses of *host*.

        :raises TimeoutError: if they are not known in time.
        :raises socket.gaierror: if there are none.
        """
        found: list[Any] = []
        done = Wakeup()

        def resolve() -> None:
            try:
                found.append(_resolved(host, port))
            except OSError as error:
                found.append(error)
            done.set()

        with contextlib.suppress(OSError):
            return _resolved(host, port, socket.AI_NUMERICHOST)
        if not _in_thread(resolve):
            resolve()
        done.wait(self.left)
        if not found:
            raise TimeoutError(f"the name {host} is not resolved in time")
        if isinstance(found[0], OSError):
            raise found[0]
        addresses: list[str] = found[0]
        return addresses


def _resolved(host: str, port: int, flags: int = 0) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _in_thread(resolve: Any) -> bool:
    """Run *resolve* in a thread; False if there can be none.

    :raises OSError: if others are stuck already.
    """
    here = _resolving.setdefault(os.getpid(), [])
    here[:] = [thread for thread in here if thread.is_alive()]
    if len(here) >= MAX_STUCK:
        raise TimeoutError(f"{len(here)} name resolutions hang already")
    thread = threading.Thread(
        target=resolve, name="openmeter_wsgi.resolve", daemon=True
    )
    try:
        thread.start()
    except RuntimeError:
        return False
    here.append(thread)
    return True

"""One deadline for a whole attempt: name resolution, connection, request and answer.

The timeout of a socket bounds each single wait for a byte: a server that answers byte
by byte could block its client for ever. So a timer thread shuts the socket down at the
deadline. A name resolution cannot be interrupted. It runs in another thread, and the
caller stops waiting for it at the deadline.
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

#: Maximum number of threads of a process that hang in a name resolution.
MAX_STUCK = 2
#: The threads that resolve a name, by the id of their process.
_resolving: dict[int, list[threading.Thread]] = {}


class Deadline:
    """A timer for the attempts of one connection, one after the other.

    The first attempt starts the timer's thread and `close` ends it. Between attempts
    the thread sleeps without a timeout.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._wakeup = Wakeup()
        self._thread: threading.Thread | None = None
        self._is_idle = False
        #: The end of the attempt (monotonic clock), None between attempts.
        self._ends_at: float | None = None
        self._socket: weakref.ref[socket.socket] | None = None
        #: A duplicate of the socket during a TLS handshake, which replaces the object.
        self._copy: socket.socket | None = None
        #: True if the deadline has ended the last attempt.
        self.is_over: bool = False

    def begin(self, seconds: float) -> None:
        """Begin an attempt that may last a number of *seconds*."""
        with self._guard:
            self.is_over = False
            self._ends_at = time.monotonic() + seconds
            idle, self._is_idle = self._is_idle, False
        if self._thread is None:
            self._start()
        elif idle:
            self._wakeup.set()

    def shorten(self, seconds: float) -> None:
        """Limit the rest of the attempt to a number of *seconds*."""
        with self._guard:
            if self._ends_at is not None:
                self._ends_at = min(self._ends_at, time.monotonic() + seconds)
        self._wakeup.set()

    def end(self) -> None:
        """End the attempt, and keep its socket open."""
        with self._guard:
            self._ends_at = None

    @property
    def left(self) -> float:
        """The seconds until the deadline, 0 between attempts."""
        ends_at = self._ends_at
        return 0.0 if ends_at is None else max(ends_at - time.monotonic(), 0.0)

    def watch(self, connected: socket.socket, *, copy: bool = False) -> None:
        """Shut the socket *connected* down at the deadline.

        With *copy* a duplicate of it is shut down, until the next call.
        """
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
        # A new one for each thread: an earlier thread may not have ended yet.
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
            self._thread = None  # no more threads: only the socket's own timeout works

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

        :raises TimeoutError: if the name is not resolved in time.
        :raises socket.gaierror: if the name has no address.
        """
        results: list[Any] = []
        done = Wakeup()

        def resolve() -> None:
            try:
                results.append(_resolve(host, port))
            except OSError as error:
                results.append(error)
            done.set()

        with contextlib.suppress(OSError):
            return _resolve(host, port, socket.AI_NUMERICHOST)
        if not _run_in_thread(resolve):
            resolve()
        done.wait(self.left)
        if not results:
            raise TimeoutError(f"the name {host} is not resolved in time")
        if isinstance(results[0], OSError):
            raise results[0]
        addresses: list[str] = results[0]
        return addresses


def _resolve(host: str, port: int, flags: int = 0) -> list[str]:
    entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    return list(dict.fromkeys(str(address[0]) for *_, address in entries))


def _run_in_thread(resolve: Any) -> bool:
    """Run *resolve* in a thread; return False if no thread can be started.

    :raises TimeoutError: if the maximum number of threads hangs already.
    """
    threads = _resolving.setdefault(os.getpid(), [])
    threads[:] = [thread for thread in threads if thread.is_alive()]
    if len(threads) >= MAX_STUCK:
        raise TimeoutError(f"{len(threads)} name resolutions hang already")
    thread = threading.Thread(
        target=resolve, name="openmeter_wsgi.resolve", daemon=True
    )
    try:
        thread.start()
    except RuntimeError:
        return False
    threads.append(thread)
    return True

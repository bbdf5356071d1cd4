"""The thread that brings batches to a sender: how it starts, and how it ends."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from typing import TYPE_CHECKING

from openmeter_wsgi import log
from openmeter_wsgi.delivery.beginning import Beginning
from openmeter_wsgi.delivery.gathering import CLOSING_DELAY, Gathering
from openmeter_wsgi.delivery.pace import Pace
from openmeter_wsgi.delivery.watching import Backlog

if TYPE_CHECKING:
    from collections.abc import Callable

    from openmeter_wsgi.client import OpenMeterClient
    from openmeter_wsgi.policy import Policy

logger = log.get_logger(__name__)


class BackgroundDelivery(Gathering):
    """Delivers what waits in a source, from a thread of its own.

    Belongs to one process. Nothing runs before `_start`. A subclass says how much is
    left (`waiting`).
    """

    #: Whether all was done that the first settled request brings about.
    started = True

    def __init__(self, policy: Policy, client: OpenMeterClient) -> None:
        super().__init__(policy)
        self.pid = os.getpid()
        self._client = client
        self._shutdown_timeout = policy.shutdown_timeout
        self._at_exit = False
        self._exiting = False
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._beginning = Beginning()
        self._sending = threading.Lock()
        self._pace = Pace()

    def announce(self, begin: Callable[[], None]) -> None:
        """Have *begin* called once, when the first request is settled."""
        self._beginning.add(begin)
        self.started = False

    @property
    def waiting(self) -> int:
        """How many events are not delivered yet."""
        return self.in_spool.events + self.in_memory.events

    @property
    def in_spool(self) -> Backlog:
        """What of them any process that shares the spool can deliver."""
        return Backlog()

    @property
    def in_memory(self) -> Backlog:
        """What of them is lost if this process dies."""
        return Backlog()

    @property
    def _is_pressed(self) -> bool:
        """Whether so much waits that soon there might be no room for more."""
        return False

    def close(self, timeout: float | None = None) -> None:
        """Send what waits until *timeout*, then stop and say what is left.

        May be called twice, and after a fork in the child, where it does nothing.
        """
        if os.getpid() != self.pid:
            return
        limit = self._shutdown_timeout if timeout is None else timeout
        thread = self._thread
        self._closing = True
        self._hurry()
        if thread is None or not thread.is_alive():
            self._deliver_here(limit)
        else:
            thread.join(limit)
        # Past the deadline the thread goes on at its usual pace, if the process does.
        self._closing = False
        self._say_left(limit)

    def _say_left(self, limit: float) -> None:
        if left := self.waiting:
            logger.error(
                "%s: %d events could not be delivered within %.1f s and are lost if "
                "this process ends now",
                "shutdown", left, limit,
            )  # fmt: skip

    def _rouse(self) -> None:
        if self._thread is None:
            self._start()
        self._wake.set()

    def close_at_exit(self) -> None:
        """Close, and deliver nothing any more: the exit hook of the process."""
        self.close()
        self._exiting = True

    def _start(self) -> None:
        if self._exiting or sys.is_finalizing():
            # A thread started now would not run, and its start() wait for it.
            logger.error(
                "%s: the process is ending and delivers nothing that comes now",
                "shutdown",
            )
            return
        # Not waited for: whoever holds it is starting the thread, perhaps this
        # very one, interrupted by a finaliser.
        if not self._starting.acquire(blocking=False):
            return
        try:
            if self._thread is None:
                self._closing = False
                self._thread = threading.Thread(
                    target=self._run, name="openmeter_wsgi.delivery", daemon=True
                )
                if not self._at_exit:
                    # Before the start, which may fail: then all waits for the exit.
                    self._at_exit = True
                    atexit.register(self.close_at_exit)
                self._thread.start()
        except RuntimeError as error:
            # No more threads here, or the interpreter is shutting down.
            self._thread = None
            logger.error(
                "%s: the delivery thread could not be started; events wait for "
                "flush() or close()",
                error,
            )
        finally:
            self._starting.release()

    def _run(self) -> None:
        """Deliver until closed. The thread's body."""
        try:
            with self._sending:
                self._pace = Pace()
                while not self._finished():
                    self._step()
                self._client.close()
        finally:
            self._wake_from(1)
            self._at_exit = False
            atexit.unregister(self.close_at_exit)
            self._thread = None  # from here on a put starts another, at exit as well
        if len(self._events):
            # Put after the last look, by one who still found this thread.
            self._rouse()

    def _finished(self) -> bool:
        # Hurried by close() itself, so that suspects are tried once more.
        waits = len(self._events) or self._sender.busy or self._hurried
        return self._closing and not waits

    def _step(self) -> None:
        if not self._sender.busy:
            self._gather()
        if self._sender.busy:
            delay = self._attempt()
            self._pause(max(delay, self._rest()))

    def _rest(self) -> float:
        """Return the seconds to wait for the application's sake."""
        rest = self._pace.rest()
        spared = not (self._hurried or self._closing or self._is_pressed)
        return rest if spared else 0.0

    def _attempt(self) -> float:
        try:
            return self._sender.attempt()
        except Exception:
            # Of all that can happen here nothing may end the thread.
            logger.exception(
                "%s: an attempt broke off; its events are kept", "delivery"
            )
            return self._sender.give_up_attempt()

    def _deliver_here(self, timeout: float | None) -> None:
        """Deliver in the calling thread, where no other can be had."""
        limit = self._shutdown_timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        if not self._sending.acquire(timeout=limit):
            return
        try:
            self._sender.retry_suspects()
            while len(self._events) or self._sender.busy:
                if not self._sender.busy:
                    self._hurried = True
                    self._gather()
                delay = min(self._attempt(), CLOSING_DELAY)
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._wake.clear()
                self._wake.wait(min(delay, left))
        finally:
            self._wake_from(1)  # the next put tries to start the thread
            self._sending.release()

"""What keeps a sender from delivering: since when, and when it is over."""

from __future__ import annotations

import time
from http.client import responses
from typing import TYPE_CHECKING, NamedTuple

from openmeter_wsgi import log
from openmeter_wsgi.errors import Held
from openmeter_wsgi.health import Problem

if TYPE_CHECKING:
    from collections.abc import Callable

    from openmeter_wsgi.errors import DeliveryError

logger = log.get_logger(__name__)

#: The end of what lasted as many seconds is told; a single attempt in vain was told
#: to be repeated at once.
WORTH_TELLING = 5.0


class _Now(NamedTuple):
    since: float
    code: str
    answer: str


class Trouble:
    """What keeps one sender from delivering. Its thread notes it, any thread asks."""

    def __init__(
        self,
        waiting: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._waiting = waiting
        self._clock = clock
        self._now: _Now | None = None

    def note(self, error: DeliveryError, *, refused: bool = False) -> None:
        """Note an attempt that failed, or that all events are *refused*."""
        code = "held" if isinstance(error, Held) else "unavailable"
        since = self._now.since if self._now else self._clock()
        self._now = _Now(since, "refused" if refused else code, answer_of(error))

    def is_over(self, delivered: int) -> None:
        """Note that so many events were taken, of those that still count as waiting."""
        now, self._now = self._now, None
        if now is None:
            return
        lasted = self._clock() - now.since
        if lasted >= WORTH_TELLING:
            logger.warning(
                "OpenMeter takes events again after %.0f s; delivered: %d, waiting and "
                "following now: %d",
                lasted, delivered, max(self._waiting() - delivered, 0), extra=log.OVER,
            )  # fmt: skip

    @property
    def problem(self) -> Problem | None:
        """What is wrong now, None if nothing is known to be."""
        now = self._now
        if now is None:
            return None
        lasted = self._clock() - now.since
        return Problem(
            now.code,
            f"OpenMeter {now.answer} for {lasted:.0f} s now; {_NEXT[now.code]}",
        )


_NEXT = {
    "held": "all events are kept until the key or the address is mended",
    "unavailable": "all events are kept and tried again",
    "refused": "that is every event tried, so it may be a proxy; all are kept",
}


def answer_of(error: DeliveryError) -> str:
    """Return what OpenMeter did."""
    answer = f"answered {error.status}" if error.status else "did not answer"
    return f"{answer} ({reason_of(error)})"


def reason_of(error: DeliveryError) -> str:
    """Return what it said, or else what its status says."""
    return error.reason or responses.get(error.status or 0, "no reason")

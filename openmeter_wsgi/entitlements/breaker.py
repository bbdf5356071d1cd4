"""A breaker: an outage costs one question, not one a request."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

#: Seconds between two questions that try whether OpenMeter is back; each that fails
#: doubles the wait.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 5.0


class Breaker:
    """Knows whether OpenMeter answers.

    Any thread: two that come at once may both try, which does no harm.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pause = 0.0
        self._try_at = 0.0

    @property
    def is_open(self) -> bool:
        """Whether the last question found nobody."""
        return self._pause > 0

    @property
    def is_due(self) -> bool:
        """Whether `may_try` may say yes."""
        return self._clock() >= self._try_at

    def may_try(self) -> bool:
        """Say whether it is time for a question; one caller a pause gets a yes."""
        now = self._clock()
        if now < self._try_at:
            return False
        if self._pause:
            self._try_at = now + self._pause
        return True

    def succeeded(self) -> None:
        """Note an answer."""
        self._pause = self._try_at = 0.0

    def failed(self) -> None:
        """Note that none came."""
        self._pause = min(max(self._pause * 2, _FIRST_PAUSE), _LONGEST_PAUSE)
        self._try_at = self._clock() + self._pause

    def slow_down(self, seconds: float) -> None:
        """Ask nothing for so long: OpenMeter answers, but was asked too much."""
        self._try_at = max(self._try_at, self._clock() + seconds)

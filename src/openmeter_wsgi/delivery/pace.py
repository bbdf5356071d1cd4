"""How fast a backlog is delivered beside an application that computes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

#: So much processor time is left to all other threads for each second of the sender's:
#: it takes a twentieth of a process that could use a whole core.
_SHARE = 20


class Pace:
    """Says how long the sender rests after a batch. Belongs to its thread.

    It measures how much processor time the process has used besides. Where that is
    next to nothing nobody is to be spared, and there is no rest; nor where the others
    had their share while the sender waited for the network or the disk.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.perf_counter,
        own: Callable[[], float] = time.thread_time,
        process: Callable[[], float] = time.process_time,
    ) -> None:
        self._clock = clock
        self._own = own
        self._process = process
        self._last: tuple[float, float, float] | None = None

    def rest(self) -> float:
        """Return the seconds to rest now, after what was done since the last call."""
        now = (self._clock(), self._own(), self._process())
        last, self._last = self._last, now
        if last is None:
            return 0.0
        passed, own, process = (b - a for a, b in zip(last, now, strict=True))
        others = max(process - own, 0.0)
        owed = max(_SHARE * own - others, 0.0)
        return owed * min(others / passed, 1.0) if passed > 0 else 0.0

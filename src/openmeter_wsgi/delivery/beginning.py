"""What is done once in a process that serves, when its first request is settled."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from openmeter_wsgi import log

if TYPE_CHECKING:
    from collections.abc import Callable

logger = log.get_logger(__name__)


class Beginning:
    """Calls that are made once. Any thread."""

    def __init__(self) -> None:
        self._calls: deque[Callable[[], None]] = deque()

    def add(self, call: Callable[[], None]) -> None:
        """Have *call* made, too."""
        self._calls.append(call)

    def make(self) -> None:
        """Make the calls that were not made yet. Never raises an Exception."""
        while True:
            try:
                call = self._calls.popleft()
            except IndexError:
                return
            try:
                call()
            except Exception:
                logger.exception(
                    "%s: broke off; the request goes on without it", "beginning"
                )

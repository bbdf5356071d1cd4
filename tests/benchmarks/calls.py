"""Durations of the C calls of a thread that hold the GIL.

A C call keeps all other threads waiting, while a Python function can be interrupted.
Calls that release the GIL, and those that call Python again, are left out. Durations
are processor time, so that other processes do not count.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

#: Modules and types whose calls release the GIL while they wait for the kernel.
_RELEASING = (
    "posix.", "socket.", "_socket.", "poll.", "select.", "lock.", "time.",
    "BufferedReader.", "_io.",
)  # fmt: skip


class Calls:
    """Profiler of threads with a given name that start inside its ``with`` block."""

    def __init__(self, thread: str) -> None:
        self._thread = thread
        self._taken: defaultdict[str, list[float]] = defaultdict(list)

    def __enter__(self) -> Self:
        threading.setprofile(self._begin)
        return self

    def __exit__(self, *_: object) -> None:
        threading.setprofile(None)

    @property
    def longest(self) -> tuple[str, float]:
        """The name of the slowest call, and the 99th percentile of its seconds.

        The slowest percent is left out, as the machine may have interrupted it. Fewer
        than 100 calls count with their median.
        """
        usual = {name: _usual(of) for name, of in self._taken.items()}
        return max(usual.items(), key=lambda found: found[1])

    def _begin(self, *_: object) -> None:
        ours = threading.current_thread().name == self._thread
        sys.setprofile(self._profiler() if ours else None)

    def _profiler(self) -> Callable[[FrameType, str, Any], object]:
        began: list[float | None] = []

        def note(_: FrameType, event: str, called: Any) -> None:
            if event == "c_call":
                began.append(time.thread_time())
            elif event == "call":
                began[:] = [None] * len(began)  # the C calls around it run Python code
            elif event in {"c_return", "c_exception"} and began:
                start = began.pop()
                name = _name(called)
                if start is not None and not name.startswith(_RELEASING):
                    self._taken[name].append(time.thread_time() - start)

        return note


def _name(called: Any) -> str:
    owner = getattr(called, "__self__", None)
    where = getattr(called, "__module__", None) or type(owner).__name__
    return f"{where}.{called.__name__}"


def _usual(taken: list[float]) -> float:
    at = len(taken) * 99 // 100 if len(taken) >= 100 else len(taken) // 2
    return sorted(taken)[at]

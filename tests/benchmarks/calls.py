"""The C calls of a thread that keep the GIL, and how long each of them takes.

While one runs no other thread does: a Python function can be interrupted, a C call
cannot. Calls that let others run meanwhile, and those that call Python again, are left
out. It is the processor time that counts, as the machine does other work, too.
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

#: Modules and types whose calls wait for the kernel without the GIL.
_RELEASING = (
    "posix.", "socket.", "_socket.", "poll.", "select.", "lock.", "time.",
    "BufferedReader.", "_io.",
)  # fmt: skip


class Calls:
    """Measures the threads of a name that are started while it is entered."""

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
        """The call that takes longest, and its seconds: but for one in a hundred.

        That one was interrupted by the machine. Of few calls it is the median.
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
                began[:] = [None] * len(began)  # whatever called this is no C alone
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

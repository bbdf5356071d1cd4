"""Questions about entitlements: who asked what how often, and the faults they meet."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple, ParamSpec, TypeVar

from openmeter_wsgi.sandbox.parts import parts
from openmeter_wsgi.sandbox.problems import Problem

if TYPE_CHECKING:
    from collections.abc import Callable

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Question(NamedTuple):
    """One question, as it was asked."""

    #: ``subject_value`` and ``value`` of the v1 API, ``value_v2``, ``access``, and
    #: ``entitlement`` and ``entitlements`` for the objects themselves.
    kind: str
    #: The customer, or the subject, as the path names it.
    customer: str
    #: The feature, or the id of the entitlement; None where all are asked for.
    feature: str | None


class Questions:
    """How often each question was asked, counted as it arrives. Any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._counts: Counter[Question] = Counter()

    def add(self, question: Question) -> None:
        """Count *question*."""
        with self._changed:
            self._counts[question] += 1
            self._changed.notify_all()

    def counts(self) -> Counter[Question]:
        """Return a copy of the counts."""
        with self._changed:
            return self._counts.copy()

    def count(self, **which: str | None) -> int:
        """Return how many questions there were of the kind, customer and feature."""
        with self._changed:
            return self._count(which)

    def wait(self, count: int, timeout: float, **which: str | None) -> bool:
        """Return whether *count* of them came within *timeout* seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._count(which) >= count, timeout)

    def _count(self, which: dict[str, str | None]) -> int:
        wanted = {name: text for name, text in which.items() if text is not None}
        return sum(
            count
            for question, count in self._counts.items()
            if wanted.items() <= question._asdict().items()
        )

    def clear(self) -> None:
        """Start counting anew."""
        with self._changed:
            self._counts.clear()


def question(kind: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Make a route one that is counted, and that meets the faults of questions."""

    def decorate(view: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(view)
        def answer(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            here = parts()
            who = kwargs.get("customer", kwargs.get("subject"))
            feature = kwargs.get("feature")
            here.questions.add(
                Question(kind, str(who), None if feature is None else str(feature))
            )
            try:
                here.faults.entitlements.check()
                if here.faults.entitlements.draw() is not None:
                    raise Problem(500)
                return view(*args, **kwargs)
            finally:
                here.faults.entitlements.delay()

        return answer

    return decorate

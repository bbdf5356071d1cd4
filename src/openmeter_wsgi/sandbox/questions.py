"""Questions about entitlements: who asked what how often."""

from __future__ import annotations

import threading
from collections import Counter
from typing import NamedTuple


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

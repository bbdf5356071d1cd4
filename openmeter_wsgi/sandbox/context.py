"""The context that the routes of one sandbox share, and its counts."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from flask import current_app, request

from openmeter_wsgi.sandbox.validation import Problem

if TYPE_CHECKING:
    from collections.abc import Callable

    from openmeter_wsgi.sandbox.entitlements import Access, Entitlements, Granting
    from openmeter_wsgi.sandbox.faults import Faults, GroupFaults
    from openmeter_wsgi.sandbox.store import Customers, Resources, Store

#: Reasons may quote the client; they must not fill the memory.
MAX_REASONS = 50
MAX_REASON = 300


class Tally:
    """Counts of requests and events, by outcome. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._refusals: Counter[str] = Counter()

    def add(self, **counts: int) -> None:
        """Add *counts* by name."""
        with self._lock:
            self._counts.update(counts)

    def refuse(self, reason: str) -> None:
        """Count a refused request, with all its events."""
        reason = reason[:MAX_REASON]
        with self._lock:
            self._counts["refused"] += 1
            if reason not in self._refusals and len(self._refusals) >= MAX_REASONS:
                reason = "other reasons"
            self._refusals[reason] += 1

    def counts(self) -> dict[str, int]:
        """Return the counts; see the keys."""
        names = ("requests", "received", "stored", "duplicates", "dropped", "refused",
                 "failed")  # fmt: skip
        with self._lock:
            return {name: self._counts[name] for name in names}

    def refusals(self) -> list[dict[str, Any]]:
        """Return the reasons of refusals, the most frequent first."""
        with self._lock:
            return [
                {"reason": reason, "count": count}
                for reason, count in self._refusals.most_common()
            ]


class Question(NamedTuple):
    """One request for an entitlement, as it was made."""

    #: ``subject_value`` and ``value`` of the v1 API, ``value_v2``, ``access``, and
    #: ``entitlement`` and ``entitlements`` for the objects themselves.
    kind: str
    #: The customer or subject in the path.
    customer: str
    #: The feature, or the id of the entitlement; None if all are requested.
    feature: str | None


class Questions:
    """Counts of requests for entitlements, by arrival. Any thread."""

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
        """Return the number of questions of the kind, customer and feature."""
        with self._changed:
            return self._count(which)

    def wait(self, count: int, timeout: float, **which: str | None) -> bool:
        """Return True once *count* of them came, False after *timeout* seconds."""
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
        """Set all counts to zero."""
        with self._changed:
            self._counts.clear()


#: The name of the context among the extensions of an application.
KEY = "openmeter_wsgi.sandbox"


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """The objects that all requests to one sandbox share. Any thread."""

    store: Store
    tally: Tally
    faults: Faults
    meters: Resources
    customers: Customers
    entitlements: Entitlements
    access: Access
    questions: Questions
    features: Resources
    subjects: Resources
    granting: Granting


def context() -> Context:
    """Return the context of the sandbox that serves the current request."""
    return cast("Context", current_app.extensions[KEY])


#: A list in the environ for the callable that waits between two bytes of the answer.
PAUSES = "openmeter_wsgi.sandbox.pauses"


def delay(faults: GroupFaults) -> None:
    """Delay the answer of the current request, or send it byte by byte, if set."""
    faults.delay()
    if faults.settings.byte_delay:
        request.environ[PAUSES].append(faults.pause)


def question(kind: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a route: count its requests, apply the faults of entitlements."""

    def decorate(view: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(view)
        def answer(**kwargs: str) -> Any:
            here = context()
            who = kwargs.get("customer") or kwargs["subject"]
            here.questions.add(Question(kind, who, kwargs.get("feature")))
            try:
                here.faults.entitlements.check()
                if here.faults.entitlements.draw() is not None:
                    raise Problem(500)
                return view(**kwargs)
            finally:
                delay(here.faults.entitlements)

        return answer

    return decorate

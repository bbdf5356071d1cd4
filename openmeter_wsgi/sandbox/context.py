"""The objects that all routes of one sandbox share: `Context`, and its counters."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from flask import current_app, request

from openmeter_wsgi.sandbox.request_validation import Problem

if TYPE_CHECKING:
    from collections.abc import Callable

    from openmeter_wsgi.sandbox.entitlements import Access, Entitlements, Granting
    from openmeter_wsgi.sandbox.faults import Faults, GroupFaults
    from openmeter_wsgi.sandbox.store import Customers, Resources, Store

# Reasons may quote the client, so their number and length must be limited.
#: Maximum number of different reasons that are counted.
MAX_REASONS = 50
#: Maximum number of characters of a reason.
MAX_REASON = 300


class Tally:
    """Counters of requests and events, by outcome. Thread-safe."""

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
        """Return all counts by name."""
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
    """A request for an entitlement or its value."""

    #: For values ``subject_value`` and ``value`` (v1 API), ``value_v2``, ``access`` and
    #: ``access_v3``; for entitlements ``entitlement`` and ``entitlements``.
    kind: str
    #: The customer or subject in the path.
    customer: str
    #: The feature, or the id of the entitlement; None if all are requested.
    feature: str | None


class Questions:
    """Counters of requests for entitlements. Thread-safe.

    A request is counted when it arrives, before it is answered.
    """

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
        """Return the number of questions with the given kind, customer and feature."""
        with self._changed:
            return self._count(which)

    def wait(self, count: int, timeout: float, **which: str | None) -> bool:
        """Wait for *count* such questions; return False after *timeout* seconds."""
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


#: The key of the context in the extensions of a Flask application.
KEY = "openmeter_wsgi.sandbox"


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """The objects that all requests to one sandbox share. Thread-safe."""

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


def current_context() -> Context:
    """Return the context of the sandbox that serves the current request."""
    return cast("Context", current_app.extensions[KEY])


#: The environ key of a list of callables; the server calls them after each byte that
#: it sends.
PAUSES = "openmeter_wsgi.sandbox.pauses"


def delay(faults: GroupFaults) -> None:
    """Delay the response of the current request as *faults* demand.

    If a delay of each byte is set, the server applies it when it sends the response.
    """
    faults.delay()
    if faults.settings.byte_delay:
        request.environ[PAUSES].append(faults.pause)


def question(kind: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a route: count its requests and apply the faults of entitlements."""

    def decorate(view: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(view)
        def answer(**kwargs: str) -> Any:
            context = current_context()
            customer = kwargs.get("customer") or kwargs["subject"]
            context.questions.add(Question(kind, customer, kwargs.get("feature")))
            try:
                context.faults.entitlements.check()
                if context.faults.entitlements.draw() is not None:
                    raise Problem(500)
                return view(**kwargs)
            finally:
                delay(context.faults.entitlements)

        return answer

    return decorate

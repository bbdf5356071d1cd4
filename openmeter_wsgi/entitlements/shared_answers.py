"""Entitlement answers that processes share through the store of the local quotas.

A new process reads the answers that others have received, instead of asking OpenMeter.
`EntitlementService` reads and writes them, in threads of requests and of the lookup.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from openmeter_wsgi.entitlements.client import Answer, Terms  # noqa: TC001 - decoded

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from openmeter_wsgi.entitlements.cache import CachedAnswer
    from openmeter_wsgi.entitlements.customers import CustomerLookup
    from openmeter_wsgi.quota.store import Store


class _Document(msgspec.Struct, omit_defaults=True):
    """The JSON document of an answer in the store."""

    answer: Answer
    terms: Terms | None = None
    #: Seconds by which the terms are older than the answer, None without terms.
    terms_age: float | None = None
    #: The customer that a lookup returned for the subject, and its key and id.
    customer: str | None = None
    names: tuple[str, ...] = ()


class SharedAnswer(NamedTuple):
    """An answer of this or another process. Times are by this host's clocks."""

    answer: Answer
    terms: Terms | None
    #: The monotonic times of the questions for answer and terms.
    asked_at: float
    terms_at: float
    #: The wall-clock time of the question for the answer.
    asked_wall: float
    #: The customer that a lookup returned for the subject, and its key and id.
    customer: str | None
    names: tuple[str, ...]


class SharedAnswers:
    """The shared answers by customer and feature. Any thread; calls use the store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def put(
        self,
        customer: str,
        feature: str,
        cached: CachedAnswer,
        lookup: CustomerLookup | None,
    ) -> None:
        """Share the answer *cached*, with the *lookup* of its customer, if any.

        Answers about unknown customers are not shared: made-up names would fill the
        store.
        """
        if not cached.answer.known_customer:
            return
        document = _Document(cached.answer)
        if cached.terms is not None:
            document.terms = cached.terms
            document.terms_age = cached.asked_at - cached.terms_at
        if lookup is not None and lookup.customer is not None:
            document.customer, document.names = lookup.customer, lookup.names
        asked_wall = time.time() - (time.monotonic() - cached.asked_at)
        self._store.share(
            _key(customer, feature), msgspec.json.encode(document), asked_wall
        )

    def get(self, customer: str, features: Sequence[str]) -> list[SharedAnswer | None]:
        """Return the shared answer of any age, or None, about each of *features*."""
        pairs = self._store.shared([_key(customer, feature) for feature in features])
        now, wall = time.monotonic(), time.time()
        return [pair and _read(*pair, now=now, wall=wall) for pair in pairs]

    def forget(self, customer: str, features: Iterable[str]) -> None:
        """Remove the shared answers about *features*."""
        self._store.unshare([_key(customer, feature) for feature in features])


def _key(customer: str, feature: str) -> str:
    # A subject may contain lone surrogates, which no database accepts as text.
    return f"{customer}\0{feature}".encode(errors="backslashreplace").decode()


def _read(
    text: bytes, asked_wall: float, *, now: float, wall: float
) -> SharedAnswer | None:
    try:
        document = msgspec.json.decode(text, type=_Document)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None  # written by another version of this package
    asked_at = now - max(wall - asked_wall, 0.0)
    age = document.terms_age
    terms_at = float("-inf") if age is None else asked_at - age
    return SharedAnswer(
        document.answer,
        document.terms,
        asked_at,
        terms_at,
        min(asked_wall, wall),
        document.customer,
        document.names,
    )

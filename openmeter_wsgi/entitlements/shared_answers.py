"""Answers that processes share through the store of the ledger.

A new process finds there what others have asked, and asks nothing.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from openmeter_wsgi.entitlements.client import Answer, Terms  # noqa: TC001 - decoded

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from openmeter_wsgi.entitlements.cache import CachedAnswer
    from openmeter_wsgi.entitlements.customers import FoundCustomer
    from openmeter_wsgi.quota.store import Store


class _Document(msgspec.Struct, omit_defaults=True):
    """An answer as it lies in the store."""

    answer: Answer
    terms: Terms | None = None
    #: Seconds by which the terms are older than the answer, None without any.
    terms_age: float | None = None
    #: The customer of a subject that is not the key of a customer, and its names.
    customer: str | None = None
    names: tuple[str, ...] = ()


class SharedAnswer(NamedTuple):
    """An answer of this or another process. Times are this host's."""

    answer: Answer
    terms: Terms | None
    #: Monotonic …
    asked_at: float
    terms_at: float
    #: … and by the wall clock.
    asked_wall: float
    #: The customer of a subject that is not the key of a customer, and its names.
    customer: str | None
    names: tuple[str, ...]


class SharedAnswers:
    """The shared answers by customer and feature. Any thread; a call asks the store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def put(
        self,
        customer: str,
        feature: str,
        known: CachedAnswer,
        found: FoundCustomer | None,
    ) -> None:
        """Share what is *known*, and the lookup that *found* the customer, if any.

        That somebody is no customer is not shared: anybody could fill the store.
        """
        if not known.answer.known_customer:
            return
        document = _Document(known.answer)
        if known.terms is not None:
            document.terms = known.terms
            document.terms_age = known.asked_at - known.terms_at
        if found is not None and found.customer is not None:
            document.customer, document.names = found.customer, found.names
        asked_wall = time.time() - (time.monotonic() - known.asked_at)
        self._store.share(
            _key(customer, feature), msgspec.json.encode(document), asked_wall
        )

    def get(self, customer: str, features: Sequence[str]) -> list[SharedAnswer | None]:
        """Return what is shared of each of *features*, however old it is."""
        found = self._store.shared([_key(customer, feature) for feature in features])
        now, wall = time.monotonic(), time.time()
        return [one and _read(*one, now=now, wall=wall) for one in found]

    def forget(self, customer: str, features: Iterable[str]) -> None:
        """Remove what is shared of *features*."""
        self._store.unshare([_key(customer, feature) for feature in features])


def _key(customer: str, feature: str) -> str:
    # A subject may hold what no database takes as text.
    return f"{customer}\0{feature}".encode(errors="backslashreplace").decode()


def _read(
    text: bytes, asked_wall: float, *, now: float, wall: float
) -> SharedAnswer | None:
    try:
        document = msgspec.json.decode(text, type=_Document)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None  # of another version of this package
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

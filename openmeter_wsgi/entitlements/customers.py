"""The customers of subjects that are not the key of a customer themselves."""

from __future__ import annotations

import math
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from openmeter_wsgi.entitlements.cache import CACHE_SIZE
from openmeter_wsgi.entitlements.client import UNKNOWN_CUSTOMER
from openmeter_wsgi.errors import DeliveryError, Misconfigured

if TYPE_CHECKING:
    from collections.abc import Callable

    from openmeter_wsgi.entitlements.cache import Lifetimes
    from openmeter_wsgi.entitlements.client import Answers, EntitlementClient
    from openmeter_wsgi.entitlements.lookup import HasToken, Question

#: A page has a hundred customers, and is a question.
_MAX_PAGES = 10


class FoundCustomer(NamedTuple):
    """The result of one lookup."""

    #: The key or id of the customer, None if no customer has the subject.
    customer: str | None
    #: Monotonic, in seconds.
    fresh_until: float
    #: All that the customer is called.
    names: tuple[str, ...] = ()


class FoundCustomers:
    """Cache of lookups by subject. Belongs to one process; any thread."""

    def __init__(
        self,
        lifetimes: Lifetimes,
        *,
        size: int = CACHE_SIZE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._size = size
        self._lifetimes = lifetimes
        self._clock = clock
        self._found: dict[str, FoundCustomer] = {}
        self._forgotten_at = -math.inf
        self._changing = threading.Lock()

    def fresh(self, subject: str) -> FoundCustomer | None:
        """Return the last lookup of *subject*, None if there has to be another."""
        found = self._found.get(subject)
        return found if found and self._clock() < found.fresh_until else None

    def account(self, subject: str) -> str:
        """Return the name under which the quota of *subject* is counted down.

        All subjects of a customer share it. It outlives the lookup, because requests
        that are under way are settled later.
        """
        found = self._found.get(subject)
        return (found and found.customer) or subject

    def put(
        self,
        subject: str,
        customer: str | None,
        asked_at: float,
        names: tuple[str, ...] = (),
    ) -> None:
        """Remember the result of a lookup that began at *asked_at*."""
        lifetimes = self._lifetimes
        lifetime = lifetimes.deny if customer is None else lifetimes.allow
        found = FoundCustomer(customer, asked_at + lifetime, names)
        with self._changing:
            if asked_at <= self._forgotten_at:
                return  # perhaps it was this subject that was forgotten meanwhile
            self._found.pop(subject, None)
            self._found[subject] = found
            if len(self._found) > self._size:
                del self._found[next(iter(self._found))]

    def drop(self, subject: str) -> None:
        """Remove the lookup of *subject*: it is no longer right."""
        with self._changing:
            self._found.pop(subject, None)

    def forget(self, name: str) -> list[str]:
        """Forget the subject or customer *name*; return the subjects that it has."""
        with self._changing:
            self._forgotten_at = self._clock()
            subjects = [
                subject
                for subject, found in self._found.items()
                if name in (subject, found.customer, *found.names)
            ]
            for subject in subjects:
                del self._found[subject]
        return subjects


class _Leave:
    """Leave to send one request more; the question itself has that for the first."""

    def __init__(self, has_token: HasToken) -> None:
        self._has_token = has_token
        self._is_first = True

    def __call__(self) -> bool:
        if self._is_first:
            self._is_first = False
            return True
        return self._has_token()


def answers_about(
    client: EntitlementClient,
    question: Question,
    found: FoundCustomers,
    has_token: HasToken,
) -> Answers:
    """Ask for a customer by its key, or by one of its subjects.

    A feature is missing from the result where there was no leave to ask on.

    :raises DeliveryError: if there is no answer.
    """
    subject, features = question
    may_ask = _Leave(has_token)
    known = found.fresh(subject)
    if known is not None and known.customer is not None:
        answers = _answers(client, known.customer, features, may_ask)
        if not _is_unknown(answers):
            return answers
        found.drop(subject)  # the customer was deleted
        known = None
    if client.addresses(subject):
        answers = _answers(client, subject, features, may_ask)
        if not _is_unknown(answers):
            if answers:
                found.drop(subject)
            return answers
    if known is not None or not client.can_look_up(subject):
        return dict.fromkeys(features, UNKNOWN_CUSTOMER)
    return _by_lookup(client, question, found, may_ask)


def _by_lookup(
    client: EntitlementClient,
    question: Question,
    found: FoundCustomers,
    may_ask: HasToken,
) -> Answers:
    """Look for the customer that has the subject, and ask for that one."""
    subject, features = question
    asked_at = time.monotonic()
    for step in range(1, _MAX_PAGES + 1):
        if not may_ask():
            return {}
        listed = client.lookup(subject, step)
        if not listed.is_last:
            continue
        found.put(subject, listed.customer, asked_at, listed.names)
        if listed.customer is None:
            return dict.fromkeys(features, UNKNOWN_CUSTOMER)
        return _answers(client, listed.customer, features, may_ask)
    raise Misconfigured(
        f"more than {_MAX_PAGES} pages of customers have subjects that contain "
        f"{subject!r}; the option customer= can name the right one"
    )


def _answers(
    client: EntitlementClient,
    customer: str,
    features: tuple[str, ...],
    may_ask: HasToken,
) -> Answers:
    """Ask for *customer*; return nothing where there is no leave to."""
    if not may_ask():
        return {}
    try:
        return client.answers(customer, features)
    except DeliveryError as error:
        if len(features) == 1 or error.status != 500 or not client.asks_singly:
            raise
        if not may_ask():
            raise
    # A single entitlement can make all of /access a 500: ask for each by itself.
    answers: Answers = {}
    for number, feature in enumerate(features):
        if number and not may_ask():
            break
        try:
            answers.update(client.answers(customer, (feature,)))
        except DeliveryError as error:
            answers[feature] = error
    return answers


def _is_unknown(answers: Answers) -> bool:
    """Return True if OpenMeter was asked and has no such customer."""
    return bool(answers) and all(
        not isinstance(answer, DeliveryError) and not answer.known_customer
        for answer in answers.values()
    )

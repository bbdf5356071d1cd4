"""The customers of subjects: a cache of lookups, and the questions that need one.

A subject may be the key of a customer, or one of the subject keys of a customer with
another key. In the second case a *lookup* in OpenMeter's list finds the customer first.
All subjects of one customer share an *account*: the name under which its quotas are
counted down.
"""

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
    from openmeter_wsgi.entitlements.lookup import WaitForToken
    from openmeter_wsgi.entitlements.questions import Question

#: Maximum number of pages per lookup; each has 100 customers and costs one token.
_MAX_PAGES = 10


class CustomerLookup(NamedTuple):
    """The result of one lookup."""

    #: The key or id of the customer, None if no customer has the subject.
    customer: str | None
    #: Monotonic, in seconds.
    fresh_until: float
    #: The customer's key and id, as far as they are known.
    names: tuple[str, ...] = ()


class CustomerCache:
    """A cache of lookups by subject. Belongs to one process; any thread."""

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
        self._lookups: dict[str, CustomerLookup] = {}
        self._forgotten_at = -math.inf
        self._lock = threading.Lock()

    def fresh(self, subject: str) -> CustomerLookup | None:
        """Return the unexpired lookup of *subject*, or None."""
        lookup = self._lookups.get(subject)
        return lookup if lookup and self._clock() < lookup.fresh_until else None

    def account(self, subject: str) -> str:
        """Return the name under which the quotas of *subject* are counted down.

        An expired lookup counts, too: requests that began before are settled later.
        """
        lookup = self._lookups.get(subject)
        return (lookup and lookup.customer) or subject

    def put(
        self,
        subject: str,
        customer: str | None,
        asked_at: float,
        names: tuple[str, ...] = (),
    ) -> None:
        """Cache the result of a lookup that began at *asked_at*."""
        lifetimes = self._lifetimes
        lifetime = lifetimes.deny if customer is None else lifetimes.allow
        lookup = CustomerLookup(customer, asked_at + lifetime, names)
        with self._lock:
            if asked_at <= self._forgotten_at:
                return  # `forget` may have been called for this subject meanwhile
            self._lookups.pop(subject, None)
            self._lookups[subject] = lookup
            if len(self._lookups) > self._size:
                del self._lookups[next(iter(self._lookups))]

    def drop(self, subject: str) -> None:
        """Remove the lookup of *subject*, which is no longer right."""
        with self._lock:
            self._lookups.pop(subject, None)

    def forget(self, name: str) -> list[str]:
        """Remove the lookups of the subject or customer *name*; return the subjects.

        Results of lookups that are under way will not be cached.
        """
        with self._lock:
            self._forgotten_at = self._clock()
            subjects = [
                subject
                for subject, lookup in self._lookups.items()
                if name in (subject, lookup.customer, *lookup.names)
            ]
            for subject in subjects:
                del self._lookups[subject]
        return subjects


class _Tokens:
    """The tokens of one question, whose first HTTP request has a token already."""

    def __init__(self, wait_for_token: WaitForToken) -> None:
        self._wait_for_token = wait_for_token
        self._is_first = True

    def __call__(self) -> bool:
        if self._is_first:
            self._is_first = False
            return True
        return self._wait_for_token()


def answers_about(
    client: EntitlementClient,
    question: Question,
    cache: CustomerCache,
    wait_for_token: WaitForToken,
) -> Answers:
    """Return the answers to *question*, whose customer is a key or a subject.

    A feature is missing from the result if no token came in time.

    :raises DeliveryError: if OpenMeter gives no answer.
    """
    subject, features = question
    take_token = _Tokens(wait_for_token)
    lookup = cache.fresh(subject)
    if lookup is not None and lookup.customer is not None:
        answers = _answers(client, lookup.customer, features, take_token)
        if not _is_unknown(answers):
            return answers
        cache.drop(subject)  # the customer was deleted
        lookup = None
    if client.is_addressable(subject):
        answers = _answers(client, subject, features, take_token)
        if not _is_unknown(answers):
            if answers:
                cache.drop(subject)
            return answers
    if lookup is not None or not client.can_look_up(subject):
        return dict.fromkeys(features, UNKNOWN_CUSTOMER)
    return _answers_by_lookup(client, question, cache, take_token)


def _answers_by_lookup(
    client: EntitlementClient,
    question: Question,
    cache: CustomerCache,
    take_token: WaitForToken,
) -> Answers:
    """Look the customer of the subject up, and return the answers about it."""
    subject, features = question
    asked_at = time.monotonic()
    for step in range(1, _MAX_PAGES + 1):
        if not take_token():
            return {}
        page = client.lookup(subject, step)
        if not page.is_last:
            continue
        cache.put(subject, page.customer, asked_at, page.names)
        if page.customer is None:
            return dict.fromkeys(features, UNKNOWN_CUSTOMER)
        return _answers(client, page.customer, features, take_token)
    raise Misconfigured(
        f"more than {_MAX_PAGES} pages of customers have subjects that contain "
        f"{subject!r}; set the option customer= to map the subject to its customer",
        status=200,  # OpenMeter has answered: other customers are not concerned
    )


def _answers(
    client: EntitlementClient,
    customer: str,
    features: tuple[str, ...],
    take_token: WaitForToken,
) -> Answers:
    """Return the answers about *customer*, without those for which no token came."""
    if not take_token():
        return {}
    try:
        return client.answers(customer, features)
    except DeliveryError as error:
        if len(features) == 1 or error.status != 500 or not client.asks_single_features:
            raise
        if not take_token():
            raise
    # One broken entitlement makes /access fail with 500: ask about each feature alone.
    answers: Answers = {}
    for number, feature in enumerate(features):
        if number and not take_token():
            break
        try:
            answers.update(client.answers(customer, (feature,)))
        except DeliveryError as error:
            answers[feature] = error
    return answers


def _is_unknown(answers: Answers) -> bool:
    """Return True if OpenMeter answered that it has no such customer."""
    return bool(answers) and all(
        not isinstance(answer, DeliveryError) and not answer.known_customer
        for answer in answers.values()
    )

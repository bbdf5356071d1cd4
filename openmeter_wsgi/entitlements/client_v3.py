"""The client for version 3 of OpenMeter's API, which identifies customers by ids."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

import msgspec

from openmeter_wsgi.entitlements.client import (
    NO_ACCESS,
    PROBE_CUSTOMER,
    UNKNOWN_CUSTOMER,
    Answer,
    CustomerPage,
    EntitlementClient,
    Terms,
    decoded,
    detail_of,
    is_key,
    parsed,
)
from openmeter_wsgi.errors import DeliveryError, Misconfigured
from openmeter_wsgi.options import is_ulid, v3_url

if TYPE_CHECKING:
    from collections.abc import Sequence

    from openmeter_wsgi.entitlements.client import Answers
    from openmeter_wsgi.options import ApiKey

#: The filters of a lookup, in order: as in version 1, a customer's key has priority
#: over the subject keys of others.
_FILTERS = ("key", "usage_attribution_subject_key")
_CUSTOMERS = "/customers?filter[{}]={}"
_ACCESS = "/customers/{}/entitlement-access"
#: A customer id that does not exist, for probes.
_PROBE_ID = "0" * 26
#: Statuses for an unknown customer; 412: the customer was deleted.
_NOT_FOUND = {404, 412}
#: The detail of a 404 for a wrong path.
_NO_ROUTE = "The requested route was not found"


class _Attribution(msgspec.Struct):
    subject_keys: list[str] = []


class _Customer(msgspec.Struct):
    id: str
    key: str | None = None
    usage_attribution: _Attribution | None = None

    def matches(self, subject: str, by: str) -> bool:
        """Return True if *subject* is the key, or a subject key, as *by* demands."""
        if by == "key":
            return self.key == subject
        attribution = self.usage_attribution
        return attribution is not None and subject in attribution.subject_keys


class _Customers(msgspec.Struct):
    data: list[_Customer]


class _AccessList(msgspec.Struct):
    #: Decoded one by one, so that an invalid entry affects only its own feature.
    data: list[msgspec.Raw]


class _FeatureKey(msgspec.Struct):
    feature_key: str


class _Access(msgspec.Struct):
    has_access: bool = False
    type: str = ""
    #: The value of a static entitlement, as JSON text.
    config: str | None = None


class ClientV3(EntitlementClient):
    """A client of version 3: it looks up a customer's id, then asks for all access.

    Version 3 returns no balances and no periods.
    """

    asks_single_features = False

    def __init__(self, *, url: str, key: ApiKey, timeout: float) -> None:
        super().__init__(url=v3_url(url), key=key, timeout=timeout)

    def is_addressable(self, customer: str) -> bool:
        """Return True if *customer* has the form of an id."""
        return is_ulid(customer)

    def can_look_up(self, subject: str) -> bool:
        """Return True if *subject* is a valid key or subject key."""
        return is_key(subject)

    def lookup(self, subject: str, step: int) -> CustomerPage:
        """Look for a customer with the key *subject*, then with this subject key."""
        by = _FILTERS[step - 1]
        reply = self._get(_CUSTOMERS.format(by, quote(subject, safe="")))
        for customer in decoded(reply, _Customers).data:
            # Checked again: a server that ignores the filter lists all customers.
            if customer.matches(subject, by):
                names = (customer.id, customer.key) if customer.key else (customer.id,)
                return CustomerPage(customer.id, True, names)
        return CustomerPage(None, step == len(_FILTERS))

    def answers(self, customer: str, features: Sequence[str]) -> Answers:
        """Return the answers about *features* of the customer with this id."""
        reply = self._get(_ACCESS.format(quote(customer, safe="")))
        if reply.status in _NOT_FOUND and detail_of(reply) not in {"", _NO_ROUTE}:
            return dict.fromkeys(features, UNKNOWN_CUSTOMER)
        entries = {
            parsed(entry, _FeatureKey).feature_key: entry
            for entry in decoded(reply, _AccessList).data
        }
        return {feature: _answer(entries.get(feature)) for feature in features}

    def terms(self, customer: str, feature: str) -> Terms:  # noqa: ARG002
        """Return empty terms: version 3 has none."""
        return Terms()

    def probe(self, features: Sequence[str]) -> None:
        """Look a customer up, and ask about a customer, that do not exist."""
        self.lookup(PROBE_CUSTOMER, 1)
        self.answers(_PROBE_ID, features)


def _answer(entry: msgspec.Raw | None) -> Answer | DeliveryError:
    if entry is None:
        return NO_ACCESS
    try:
        access = parsed(entry, _Access)
    except Misconfigured as error:
        return error
    return Answer(
        access.has_access, config=access.config, is_metered=access.type == "metered"
    )

"""Questions by version 3 of OpenMeter's API, which knows customers by their ids."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

import msgspec

from openmeter_wsgi.entitlements.client import (
    NO_ACCESS,
    NOBODY,
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

#: The filters that find a customer, in this order: its key goes before the subject
#: keys of others, as it does in version 1.
_FILTERS = ("key", "usage_attribution_subject_key")
_CUSTOMERS = "/customers?filter[{}]={}"
_ACCESS = "/customers/{}/entitlement-access"
#: An id that no customer has.
_NO_ID = "0" * 26
#: 412: the customer was deleted.
_UNKNOWN = {404, 412}
#: What the server says where the path is wrong, and not the customer.
_NO_ROUTE = "The requested route was not found"


class _Attribution(msgspec.Struct):
    subject_keys: list[str] = []


class _Customer(msgspec.Struct):
    id: str
    key: str | None = None
    usage_attribution: _Attribution | None = None

    def is_called(self, subject: str, by: str) -> bool:
        """Return True if *subject* is its key, or one of its subject keys."""
        if by == "key":
            return self.key == subject
        attribution = self.usage_attribution
        return attribution is not None and subject in attribution.subject_keys


class _Customers(msgspec.Struct):
    data: list[_Customer]


class _AccessList(msgspec.Struct):
    #: Each is decoded by itself, and only if it was asked for.
    data: list[msgspec.Raw]


class _Named(msgspec.Struct):
    feature_key: str


class _Access(msgspec.Struct):
    has_access: bool = False
    type: str = ""
    #: Where it is static: JSON, as text.
    config: str | None = None


class ClientV3(EntitlementClient):
    """Asks by version 3: a customer's id is looked up, then all its access at once.

    It says nothing of balances and periods.
    """

    asks_singly = False

    def __init__(self, *, url: str, key: ApiKey, timeout: float) -> None:
        super().__init__(url=v3_url(url), key=key, timeout=timeout)

    def addresses(self, customer: str) -> bool:
        """Return True if *customer* has the form of an id."""
        return is_ulid(customer)

    def can_look_up(self, subject: str) -> bool:
        """Return True if *subject* can be the key, or a subject key, of a customer."""
        return is_key(subject)

    def lookup(self, subject: str, step: int) -> CustomerPage:
        """Look for the customer with this key, then for that with this subject key."""
        by = _FILTERS[step - 1]
        reply = self._get(_CUSTOMERS.format(by, quote(subject, safe="")))
        for customer in decoded(reply, _Customers).data:
            # Checked here, too: a filter that is not heeded would list everybody.
            if customer.is_called(subject, by):
                names = (customer.id, customer.key) if customer.key else (customer.id,)
                return CustomerPage(customer.id, True, names)
        return CustomerPage(None, step == len(_FILTERS))

    def answers(self, customer: str, features: Sequence[str]) -> Answers:
        """Ask for all access of the customer with this id."""
        reply = self._get(_ACCESS.format(quote(customer, safe="")))
        if reply.status in _UNKNOWN and detail_of(reply) not in {"", _NO_ROUTE}:
            return dict.fromkeys(features, UNKNOWN_CUSTOMER)
        found = {
            parsed(entry, _Named).feature_key: entry
            for entry in decoded(reply, _AccessList).data
        }
        return {feature: _answer(found.get(feature)) for feature in features}

    def terms(self, customer: str, feature: str) -> Terms:  # noqa: ARG002
        """Return that nothing is known of the period."""
        return Terms()

    def probe(self, features: Sequence[str]) -> None:
        """Look for a customer that does not exist, and ask for one."""
        self.lookup(NOBODY, 1)
        self.answers(_NO_ID, features)


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

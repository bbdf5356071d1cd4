"""The HTTP client for questions about entitlements: base class, and versions 1 and 2.

An *answer* (`Answer`) states the access of one customer to one feature, with its
balance. The *terms* (`Terms`) state the rest: soft limit and usage period. OpenMeter
returns them from another endpoint, so they are asked for less often.
"""

from __future__ import annotations

import datetime  # noqa: TC003 - decoded into
import re
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias
from urllib.parse import quote

import msgspec

from openmeter_wsgi.connection import Connection, Reply, delivery_error
from openmeter_wsgi.errors import DeliveryError, Misconfigured
from openmeter_wsgi.values import text_problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from openmeter_wsgi.options import ApiKey

_VALUE = "/api/v2/customers/{}/entitlements/{}/value"
_ACCESS = "/api/v1/customers/{}/access"
_TERMS = "/api/v2/customers/{}/entitlements/{}"
_CUSTOMERS = "/api/v1/customers?subject={}&page={}&pageSize={}"
#: A customer key that does not exist, for probes.
PROBE_CUSTOMER = "openmeter_wsgi.nobody"
#: Number of customers per page: OpenMeter's default.
_PAGE_SIZE = 100
#: Maximum size of an answer: enough for a customer with hundreds of features.
_MAX_ANSWER_BYTES = 1_048_576
#: Maximum number of characters in a key: OpenMeter's limit.
_MAX_KEY = 256
#: Keys that a server or a proxy may resolve to another path, and keys with NUL, which
#: OpenMeter's database rejects.
_INVALID_KEY = re.compile(r"(?:^|[/\\])\.{1,2}(?:[/\\]|$)|^/|//|/$|\0")
#: Statuses for an unknown customer; 412: the customer was deleted.
_NOT_FOUND = {404, 412}
#: Seconds before the end of a period in which OpenMeter answers for the next period,
#: because OpenMeter rounds the time of a question up to the minute.
_LAST_MINUTE = 60.0


class Answer(msgspec.Struct, frozen=True, rename="camel"):
    """OpenMeter's answer about one customer and feature (``EntitlementValue``)."""

    #: OpenMeter omits this if it is false.
    has_access: bool = False
    #: Balance, usage and overage of a metered entitlement.
    balance: float | None = None
    usage: float | None = None
    overage: float | None = None
    #: The sum of all grants in this period.
    total_available_grant_amount: float | None = None
    #: The value of a static entitlement, as JSON text.
    config: str | None = None
    #: False if OpenMeter has no such customer.
    known_customer: bool = True
    #: True if the entitlement is metered, but the answer contains no balance.
    is_metered: bool = False


class Terms(msgspec.Struct, frozen=True):
    """The properties of an entitlement that an answer does not contain."""

    #: True if access continues after the balance is used up.
    soft_limit: bool = False
    #: The end of the usage period in seconds since 1970, None without a period.
    period_end: float | None = None
    #: The start of the usage period, likewise.
    period_start: float | None = None

    def is_over(self, now: float) -> bool:
        """Return True if the usage period has ended."""
        return self.period_end is not None and self.period_end <= now

    def is_ending(self, now: float) -> bool:
        """Return True in the last minute, when OpenMeter answers for the next period.

        One second is added at both ends, because the server's time is in seconds.
        """
        end = self.period_end
        return end is not None and end - _LAST_MINUTE - 1 <= now < end + 1


class _Period(msgspec.Struct):
    to: datetime.datetime
    start: datetime.datetime | None = msgspec.field(name="from", default=None)


class _Entitlement(msgspec.Struct, rename="camel"):
    is_soft_limit: bool = False
    current_usage_period: _Period | None = None


class _Access(msgspec.Struct):
    #: Decoded one by one, so that an invalid entry affects only its own feature.
    entitlements: dict[str, msgspec.Raw]


class _Attribution(msgspec.Struct, rename="camel"):
    subject_keys: list[str] = []


class _Customer(msgspec.Struct, rename="camel"):
    id: str
    key: str | None = None
    usage_attribution: _Attribution | None = None

    def has_subject(self, subject: str) -> bool:
        attribution = self.usage_attribution
        return attribution is not None and subject in attribution.subject_keys


class _CustomerPage(msgspec.Struct, rename="camel"):
    items: list[_Customer]
    total_count: int
    page_size: int


class CustomerPage(NamedTuple):
    """The result of one HTTP request of a lookup of a subject's customer."""

    #: The customer's key or id for questions, None if this page does not contain it.
    customer: str | None
    is_last: bool
    #: The customer's key and id, as far as they are known.
    names: tuple[str, ...] = ()


NO_ACCESS = Answer()
UNKNOWN_CUSTOMER = Answer(known_customer=False)
#: The answer or the error, by feature.
Answers: TypeAlias = "dict[str, Answer | DeliveryError]"


class EntitlementClient(ABC):
    """A client of one OpenMeter server. Belongs to one thread at a time.

    All methods that send a request raise the same errors.

    :raises Unavailable: if no answer comes now.
    :raises Misconfigured: if the configuration must be mended to get an answer.
    """

    #: True if the API can answer about one feature alone.
    asks_single_features: ClassVar[bool]

    def __init__(self, *, url: str, key: ApiKey, timeout: float) -> None:
        self._url = url
        self._connection = Connection(
            key=key, timeout=timeout, max_answer_bytes=_MAX_ANSWER_BYTES
        )
        #: Seconds by which this host's clock is ahead of the server's.
        self.clock_ahead: float = 0.0

    @abstractmethod
    def is_addressable(self, customer: str) -> bool:
        """Return True if the API accepts *customer* without a lookup."""

    @abstractmethod
    def answers(self, customer: str, features: Sequence[str]) -> Answers:
        """Return the answers about *features* of *customer*."""

    @abstractmethod
    def can_look_up(self, subject: str) -> bool:
        """Return True if *subject* may belong to a customer with another key."""

    @abstractmethod
    def lookup(self, subject: str, step: int) -> CustomerPage:
        """Look for the customer of *subject*: send request number *step*, from 1."""

    @abstractmethod
    def terms(self, customer: str, feature: str) -> Terms:
        """Return the terms of the entitlement."""

    @abstractmethod
    def probe(self, features: Sequence[str]) -> None:
        """Ask about a customer that does not exist, to test if OpenMeter answers."""

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _get(self, path: str) -> Reply:
        reply = self._connection.request("GET", self._url + path)
        if (date := reply.date) is not None:
            self.clock_ahead = time.time() - date
        return reply


class ClientV1(EntitlementClient):
    """A client of versions 1 and 2 of the API, which accept the key of a customer."""

    asks_single_features = True

    def is_addressable(self, customer: str) -> bool:
        """Return True if *customer* is a valid key."""
        return is_key(customer)

    def answers(self, customer: str, features: Sequence[str]) -> Answers:
        """Return the answers about *features*; several features cost one request."""
        if not is_key(customer):
            return dict.fromkeys(features, UNKNOWN_CUSTOMER)
        if len(features) > 1:
            return self._access(customer, features)
        return {feature: self._answer(customer, feature) for feature in features}

    def can_look_up(self, subject: str) -> bool:
        """Return True if *subject* is a valid key."""
        return is_key(subject)

    def lookup(self, subject: str, step: int) -> CustomerPage:
        """Look for the customer of *subject* on one page of the list.

        OpenMeter lists all customers with a subject that contains this one, ignoring
        case; so each listed customer is checked.
        """
        url = _CUSTOMERS.format(quote(subject, safe=""), step, _PAGE_SIZE)
        page = decoded(self._get(url), _CustomerPage)
        is_last = not page.items or step * page.page_size >= page.total_count
        for customer in page.items:
            if customer.has_subject(subject):
                key = customer.key
                name = key if key and is_key(key) else customer.id
                return CustomerPage(name, True, (name,))
        return CustomerPage(None, is_last)

    def terms(self, customer: str, feature: str) -> Terms:
        """Return the terms of the entitlement."""
        reply = self._get(_path(_TERMS, customer, feature))
        if reply.status == 404:
            return Terms()
        entitlement = decoded(reply, _Entitlement)
        period = entitlement.current_usage_period
        if period is None:
            return Terms(entitlement.is_soft_limit)
        start = period.start and period.start.timestamp()
        return Terms(entitlement.is_soft_limit, period.to.timestamp(), start)

    def probe(self, features: Sequence[str]) -> None:
        """Ask about *features* of a customer that does not exist."""
        self.answers(PROBE_CUSTOMER, features)

    def _answer(self, customer: str, feature: str) -> Answer:
        reply = self._get(_path(_VALUE, customer, feature))
        if reply.status in _NOT_FOUND and detail_of(reply):
            return UNKNOWN_CUSTOMER
        return decoded(reply, Answer)  # type: ignore[no-any-return]

    def _access(self, customer: str, features: Sequence[str]) -> Answers:
        reply = self._get(_path(_ACCESS, customer))
        if reply.status in _NOT_FOUND and detail_of(reply):
            return dict.fromkeys(features, UNKNOWN_CUSTOMER)
        entries = decoded(reply, _Access).entitlements
        return {feature: _entry(entries.get(feature)) for feature in features}


def is_key(customer: str) -> bool:
    """Return True if *customer* is a valid customer key for OpenMeter.

    Without this check, a caller who chooses the key could cause errors that look like
    a wrong configuration, or get the answer about another customer.
    """
    if not customer or len(customer) > _MAX_KEY or _INVALID_KEY.search(customer):
        return False
    return text_problem(customer) is None


def _path(template: str, *keys: str) -> str:
    # Slashes are encoded, too, so that a key remains one segment of the path.
    return template.format(*(quote(key, safe="") for key in keys))


def _entry(value: msgspec.Raw | None) -> Answer | DeliveryError:
    if value is None:
        return NO_ACCESS
    try:
        return parsed(value, Answer)  # type: ignore[no-any-return]
    except Misconfigured as error:
        return error


def decoded(reply: Reply, kind: type[Any]) -> Any:
    """Return the answer in *reply* as *kind*.

    :raises DeliveryError: if *reply* is an error, or not an answer of OpenMeter.
    """
    if reply.status != 200 or reply.is_page:
        raise delivery_error(reply)
    return parsed(reply.body, kind)


def parsed(body: bytes | msgspec.Raw, kind: type[Any]) -> Any:
    """Return the JSON in *body* as *kind*.

    :raises Misconfigured: if *body* is not a *kind*.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Misconfigured(
            f"the answer cannot be decoded: {error}", status=200
        ) from None


def detail_of(reply: Reply) -> str:
    """Return the ``detail`` of a problem document, or an empty string.

    OpenMeter's 404 for a wrong path has no detail; its 404 for a customer has one.
    """
    try:
        problem = msgspec.json.decode(reply.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    detail = problem.get("detail") if isinstance(problem, dict) else None
    return detail if isinstance(detail, str) else ""

"""Questions about entitlements by version 1 and 2 of OpenMeter's API, over HTTP."""

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
#: A key that no customer has.
NOBODY = "openmeter_wsgi.nobody"
#: OpenMeter's own default.
_PAGE_SIZE = 100
#: A customer with hundreds of features still fits.
_MAX_ANSWER_BYTES = 1_048_576
#: OpenMeter's own bound, in characters.
_MAX_KEY = 256
#: What a server or a proxy could resolve to the path of another customer, and NUL,
#: for which OpenMeter's database has an error only.
_NO_KEY = re.compile(r"(?:^|[/\\])\.{1,2}(?:[/\\]|$)|^/|//|/$|\0")
#: 412: the customer was deleted.
_UNKNOWN = {404, 412}
#: OpenMeter rounds the time of a question up to the minute.
_LAST_MINUTE = 60.0


class Answer(msgspec.Struct, frozen=True, rename="camel"):
    """OpenMeter's answer about one customer and feature (``EntitlementValue``)."""

    #: OpenMeter leaves this out where it is false.
    has_access: bool = False
    #: These three where the entitlement is metered.
    balance: float | None = None
    usage: float | None = None
    overage: float | None = None
    #: All that was granted in this period.
    total_available_grant_amount: float | None = None
    #: The value of a static entitlement: JSON, as text.
    config: str | None = None
    #: True if OpenMeter knows the customer at all.
    known_customer: bool = True
    #: True if it is known to be metered, although nothing is said of a balance.
    is_metered: bool = False


class Terms(msgspec.Struct, frozen=True):
    """The properties of an entitlement that its value does not tell."""

    #: True if access goes on when the balance is used up.
    soft_limit: bool = False
    #: When the usage period ends, in seconds since 1970; None where it has none …
    period_end: float | None = None
    #: … and when it began.
    period_start: float | None = None

    def is_over(self, now: float) -> bool:
        """Return True if that period has ended."""
        return self.period_end is not None and self.period_end <= now

    def is_ending(self, now: float) -> bool:
        """Return True in the last minute, when values already are the next period's.

        With a second more at both ends, as the server tells its time in seconds.
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
    #: Each is decoded by itself, and only if it was asked for.
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
    """The result of one request of a lookup: the customer of a subject, or none."""

    #: The key or id by which that customer is asked for.
    customer: str | None
    is_last: bool
    #: The key and the id of that customer, as far as they are known.
    names: tuple[str, ...] = ()


NO_ACCESS = Answer()
UNKNOWN_CUSTOMER = Answer(known_customer=False)
#: By feature: the answer, or the error in its place.
Answers: TypeAlias = "dict[str, Answer | DeliveryError]"


class EntitlementClient(ABC):
    """Asks one OpenMeter server. Belongs to one thread at a time.

    Each method but `lookup` and `probe` sends one request per question.

    :raises Unavailable: from each question, if there is no answer now.
    :raises Misconfigured: if this configuration cannot get an answer.
    """

    #: True if a feature can be asked for without all others of the customer.
    asks_singly: ClassVar[bool]

    def __init__(self, *, url: str, key: ApiKey, timeout: float) -> None:
        self._url = url
        self._connection = Connection(
            key=key, timeout=timeout, max_answer_bytes=_MAX_ANSWER_BYTES
        )
        #: By how many seconds our clock is ahead of the server's.
        self.clock_ahead: float = 0.0

    @abstractmethod
    def addresses(self, customer: str) -> bool:
        """Return True if OpenMeter takes *customer* as it is, without a lookup."""

    @abstractmethod
    def answers(self, customer: str, features: Sequence[str]) -> Answers:
        """Ask for *features* of *customer*."""

    @abstractmethod
    def can_look_up(self, subject: str) -> bool:
        """Return True if *subject* may belong to a customer of another name."""

    @abstractmethod
    def lookup(self, subject: str, step: int) -> CustomerPage:
        """Send the request number *step*, from 1, for the customer of *subject*."""

    @abstractmethod
    def terms(self, customer: str, feature: str) -> Terms:
        """Ask for the entitlement itself."""

    @abstractmethod
    def probe(self, features: Sequence[str]) -> None:
        """Ask for a customer that does not exist, to see whether OpenMeter answers."""

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _get(self, path: str) -> Reply:
        reply = self._connection.request("GET", self._url + path)
        if (date := reply.date) is not None:
            self.clock_ahead = time.time() - date
        return reply


class ClientV1(EntitlementClient):
    """Asks by version 1 and 2 of the API, which take the key of a customer."""

    asks_singly = True

    def addresses(self, customer: str) -> bool:
        """Return True if *customer* can be a key."""
        return is_key(customer)

    def answers(self, customer: str, features: Sequence[str]) -> Answers:
        """Ask for *features* of *customer*; several of them cost one request."""
        if not is_key(customer):
            return dict.fromkeys(features, UNKNOWN_CUSTOMER)
        if len(features) > 1:
            return self._access(customer, features)
        return {feature: self._answer(customer, feature) for feature in features}

    def can_look_up(self, subject: str) -> bool:
        """Return True if *subject* may belong to a customer of another key."""
        return is_key(subject)

    def lookup(self, subject: str, step: int) -> CustomerPage:
        """Look for the customer that has *subject* on one page of the list.

        OpenMeter lists all customers with a subject that contains this one, in
        capitals or not.
        """
        url = _CUSTOMERS.format(quote(subject, safe=""), step, _PAGE_SIZE)
        listed = decoded(self._get(url), _CustomerPage)
        is_last = not listed.items or step * listed.page_size >= listed.total_count
        for customer in listed.items:
            if customer.has_subject(subject):
                key = customer.key
                name = key if key and is_key(key) else customer.id
                return CustomerPage(name, True, (name,))
        return CustomerPage(None, is_last)

    def terms(self, customer: str, feature: str) -> Terms:
        """Ask for the entitlement itself."""
        reply = self._get(_path(_TERMS, customer, feature))
        if reply.status == 404:
            return Terms()
        said = decoded(reply, _Entitlement)
        period = said.current_usage_period
        if period is None:
            return Terms(said.is_soft_limit)
        start = period.start and period.start.timestamp()
        return Terms(said.is_soft_limit, period.to.timestamp(), start)

    def probe(self, features: Sequence[str]) -> None:
        """Ask for *features* of a customer that does not exist."""
        self.answers(NOBODY, features)

    def _answer(self, customer: str, feature: str) -> Answer:
        reply = self._get(_path(_VALUE, customer, feature))
        if reply.status in _UNKNOWN and detail_of(reply):
            return UNKNOWN_CUSTOMER
        return decoded(reply, Answer)  # type: ignore[no-any-return]

    def _access(self, customer: str, features: Sequence[str]) -> Answers:
        reply = self._get(_path(_ACCESS, customer))
        if reply.status in _UNKNOWN and detail_of(reply):
            return dict.fromkeys(features, UNKNOWN_CUSTOMER)
        found = decoded(reply, _Access).entitlements
        return {feature: _entry(found.get(feature)) for feature in features}


def is_key(customer: str) -> bool:
    """Return True if OpenMeter can have a customer of this key.

    A caller that names itself could otherwise bring about an error, which speaks of
    the configuration, or get the answer about another customer.
    """
    if not customer or len(customer) > _MAX_KEY or _NO_KEY.search(customer):
        return False
    return text_problem(customer) is None


def _path(template: str, *keys: str) -> str:
    # Encoded whole, so that none of them can leave its place in the path.
    return template.format(*(quote(key, safe="") for key in keys))


def _entry(value: msgspec.Raw | None) -> Answer | DeliveryError:
    if value is None:
        return NO_ACCESS
    try:
        return parsed(value, Answer)  # type: ignore[no-any-return]
    except Misconfigured as error:
        return error


def decoded(reply: Reply, kind: type[Any]) -> Any:
    """Return the answer in *reply* as *kind*, or raise what it means."""
    if reply.status != 200 or reply.is_page:
        raise delivery_error(reply)
    return parsed(reply.body, kind)


def parsed(body: bytes | msgspec.Raw, kind: type[Any]) -> Any:
    """Return the JSON in *body* as *kind*.

    :raises Misconfigured: if it is something else.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Misconfigured(
            f"an answer that cannot be read: {error}", status=200
        ) from None


def detail_of(reply: Reply) -> str:
    """Return the detail of a problem, empty where the path itself is wrong.

    Of a route that it does not have OpenMeter says no more than "Not Found".
    """
    try:
        problem = msgspec.json.decode(reply.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    detail = problem.get("detail") if isinstance(problem, dict) else None
    return detail if isinstance(detail, str) else ""

"""Questions to OpenMeter: may this customer use this feature, and how much of it?"""

from __future__ import annotations

import datetime  # noqa: TC003 - decoded into
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import msgspec

from openmeter_wsgi.connection import Connection
from openmeter_wsgi.errors import Held
from openmeter_wsgi.reply import Reply, failure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from openmeter_wsgi.api_key import ApiKey
    from openmeter_wsgi.options.entitlements import EntitlementsPath

_VALUE = {
    "v2": "/api/v2/customers/{}/entitlements/{}/value",
    "v1": "/api/v1/customers/{}/entitlements/{}/value",
    "subjects": "/api/v1/subjects/{}/entitlements/{}/value",
}
_ACCESS = "/api/v1/customers/{}/access"
_TERMS = "/api/v2/customers/{}/entitlements/{}"
#: A customer with hundreds of features still fits.
_MAX_ANSWER_BYTES = 1_048_576
#: OpenMeter's own bound, in characters.
_MAX_KEY = 256
#: What proxies, servers and databases on the way refuse in a path, encoded or not.
_REFUSED_ON_THE_WAY = re.compile(r"[\x00-\x1f\x7f/\\%;]")
#: 412: the customer was deleted.
_UNKNOWN = {404, 412}


class Answer(msgspec.Struct, frozen=True, rename="camel"):
    """What OpenMeter says of one customer and one feature (``EntitlementValue``)."""

    has_access: bool
    #: These three where the entitlement is metered.
    balance: float | None = None
    usage: float | None = None
    overage: float | None = None
    #: All that was granted in this period.
    total_available_grant_amount: float | None = None
    #: Where it is static: JSON, as text.
    config: str | None = None
    #: Whether OpenMeter knows the customer at all.
    known_customer: bool = True


class Terms(msgspec.Struct, frozen=True):
    """What only the entitlement itself says, and not its value."""

    #: Whether access goes on when the balance is used up.
    soft_limit: bool = False
    #: When the usage period ends, in seconds since 1970; None where it has none.
    period_end: float | None = None

    def is_over(self, now: float) -> bool:
        """Say whether that period has ended."""
        return self.period_end is not None and self.period_end <= now


class _Period(msgspec.Struct):
    to: datetime.datetime


class _Entitlement(msgspec.Struct, rename="camel"):
    is_soft_limit: bool = False
    current_usage_period: _Period | None = None


class _Access(msgspec.Struct):
    entitlements: dict[str, Answer]


NO_ACCESS = Answer(has_access=False)
UNKNOWN_CUSTOMER = Answer(has_access=False, known_customer=False)


class QuestionClient:
    """Asks one OpenMeter server. Belongs to one thread at a time.

    :raises Unavailable: from each question, if there is no answer now.
    :raises Held: if the question cannot be answered as it is configured.
    """

    def __init__(
        self, *, url: str, path: EntitlementsPath, key: ApiKey, timeout: float
    ) -> None:
        self._url = url
        self._value = _VALUE[path]
        self._knows_access = path != "subjects"
        self._connection = Connection(
            key=key, timeout=timeout, max_answer_bytes=_MAX_ANSWER_BYTES
        )

    def answers(self, customer: str, features: Sequence[str]) -> dict[str, Answer]:
        """Ask for *features* of *customer*; several of them cost one request."""
        if not _is_key(customer):
            return dict.fromkeys(features, UNKNOWN_CUSTOMER)
        if len(features) > 1 and self._knows_access:
            return self._access(customer, features)
        return {feature: self._answer(customer, feature) for feature in features}

    def terms(self, customer: str, feature: str) -> Terms:
        """Ask for the entitlement itself."""
        reply = self._get(_TERMS, customer, feature)
        if reply.status == 404:
            return Terms()
        said = _decoded(reply, _Entitlement)
        period = said.current_usage_period
        return Terms(said.is_soft_limit, period and period.to.timestamp())

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _answer(self, customer: str, feature: str) -> Answer:
        reply = self._get(self._value, customer, feature)
        if reply.status in _UNKNOWN and (said := _detail(reply)):
            # Of a feature that is not there only the deprecated path says 404.
            speaks_of = said.split(maxsplit=1)[0]
            if self._knows_access or speaks_of in {"customer", "subject"}:
                return UNKNOWN_CUSTOMER
            return NO_ACCESS
        return _decoded(reply, Answer)  # type: ignore[no-any-return]

    def _access(self, customer: str, features: Sequence[str]) -> dict[str, Answer]:
        reply = self._get(_ACCESS, customer)
        if reply.status in _UNKNOWN and _detail(reply):
            return dict.fromkeys(features, UNKNOWN_CUSTOMER)
        found = _decoded(reply, _Access).entitlements
        return {feature: found.get(feature, NO_ACCESS) for feature in features}

    def _get(self, path: str, *keys: str) -> Reply:
        # Encoded whole, so that none of them can leave its place in the path.
        quoted = (quote(key, safe="") for key in keys)
        return self._connection.request("GET", self._url + path.format(*quoted))


def _is_key(customer: str) -> bool:
    """Say whether OpenMeter can have a customer of this key at all.

    Dots alone would be resolved away by whoever normalises the URL, encoded or not.
    What is too long would be a 400, which speaks of the configuration; a client that
    names itself must not be able to bring that about.
    """
    return customer.strip(".") != "" and len(customer) <= _MAX_KEY


def may_be_refused(customer: str) -> bool:
    """Say whether an error may be the doing of this key alone.

    Whoever chooses such a name for himself must not stop the questions for others.
    """
    return _REFUSED_ON_THE_WAY.search(customer) is not None


def _decoded(reply: Reply, kind: type[Any]) -> Any:
    if reply.status != 200 or reply.is_page:
        raise failure(reply)
    try:
        return msgspec.json.decode(reply.body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Held(f"an answer that is no entitlement: {error}", status=200) from None


def _detail(reply: Reply) -> str:
    """Return the detail of a problem, empty where the path itself is wrong.

    Of a route that it does not have OpenMeter says no more than "Not Found".
    """
    try:
        problem = msgspec.json.decode(reply.body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""
    detail = problem.get("detail") if isinstance(problem, dict) else None
    return detail if isinstance(detail, str) else ""

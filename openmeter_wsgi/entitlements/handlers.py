"""Denied requests: checks inside a handler, and the response to the caller."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

import msgspec
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response

from openmeter_wsgi import log
from openmeter_wsgi.entitlements.decision import undecided
from openmeter_wsgi.request import billing_of, environ_of, mark_denied, method_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from wsgiref.types import StartResponse

    from openmeter_wsgi.entitlements.decision import Decision, Denial, Quota, Reason
    from openmeter_wsgi.entitlements.gate import Gate
    from openmeter_wsgi.policy import Policy

logger: Final = log.get_logger(__name__)


#: Of several reasons the response tells the first in this order: it stays longest.
_FIRST: tuple[Reason, ...] = (
    "no_subject", "no_access", "unknown_customer", "limit_reached", "unavailable",
    "busy",
)  # fmt: skip
_STATUS = {
    "no_subject": HTTPStatus.UNAUTHORIZED,
    "no_access": HTTPStatus.FORBIDDEN,
    "unknown_customer": HTTPStatus.FORBIDDEN,
    "unavailable": HTTPStatus.SERVICE_UNAVAILABLE,
    "busy": HTTPStatus.SERVICE_UNAVAILABLE,
}
_DETAIL = {
    "no_subject": "The request does not say on whose behalf it comes.",
    "no_access": "There is no access to the feature {!r}.",
    "unknown_customer": "There is no access to the feature {!r}.",
    "limit_reached": "The quota of the feature {!r} is used up.",
    "unavailable": "Whether there is access to the feature {!r} cannot be said now.",
    "busy": "Whether there is access to the feature {!r} will be known soon.",
}
#: The reasons for which the caller shall come back.
_COME_BACK = {"limit_reached", "unavailable", "busy"}
#: Seconds after which to come back where nothing better is known.
_LATER = 5


class DeniedResponse:
    """A WSGI application that refuses one request. It never costs the caller."""

    def __init__(self, decision: Decision, policy: Policy) -> None:
        self.decision: Decision = decision
        self.denial: Denial = min(decision.denied, key=_rank)
        self.status: HTTPStatus = _status(self.denial, policy)
        self.body: bytes = _problem(self.denial, self.status)
        self._policy = policy

    @property
    def headers(self) -> list[tuple[str, str]]:
        """The headers of the response."""
        headers = [
            ("Content-Type", "application/problem+json"),
            ("Content-Length", str(len(self.body))),
            ("Cache-Control", "no-store"),
        ]
        if self.denial.reason in _COME_BACK:
            headers.append(("Retry-After", str(self.denial.retry_after or _LATER)))
        if self.status == HTTPStatus.UNAUTHORIZED:
            headers.append(("WWW-Authenticate", "Bearer"))  # RFC 9110, 11.6.1
        if self._policy.usage_headers:
            headers += quota_headers(self.decision.quota)
        return headers

    def __call__(
        self, environ: dict[str, Any], start_response: StartResponse
    ) -> Iterable[bytes]:
        """Answer the request (PEP 3333)."""
        if (own := self._policy.denied_response) is not None:
            try:
                answer: Iterable[bytes] = own(environ, self.decision)(
                    environ, start_response
                )
            except Exception:
                logger.exception("denied_response: %s raised; the usual response "
                                 "is sent", own)  # fmt: skip
            else:
                return answer
        status = f"{self.status.value} {self.status.phrase}"
        start_response(status, self.headers)
        return [] if method_of(environ) == "HEAD" else [self.body]


def quota_headers(quota: Quota | None) -> list[tuple[str, str]]:
    """Return what is known of the quota as headers, none where nothing is.

    Named as in the drafts of RateLimit header fields for HTTP that are in use.
    """
    if quota is None:
        return []
    headers = [("RateLimit-Remaining", _whole(quota.remaining))]
    if quota.limit is not None:
        headers.insert(0, ("RateLimit-Limit", _whole(quota.limit)))
    if (reset := quota.reset) is not None:
        headers.append(("RateLimit-Reset", str(reset)))
    return headers


def telling_quota(
    decision: Decision | None, start_response: StartResponse
) -> StartResponse:
    """Return a start_response that tells of the quota, if there is one."""
    headers = quota_headers(decision.quota) if decision else []
    if not headers:
        return start_response

    def start(
        status: str, given: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], object]:
        told = [*given, *headers]
        if exc_info is None:
            return start_response(status, told)
        return start_response(status, told, exc_info)

    return start


def _rank(denial: Denial) -> tuple[int, float]:
    """Return what sorts that denial first which stays longest."""
    return _FIRST.index(denial.reason), -(denial.retry_at or 0.0)


def _whole(number: float) -> str:
    return str(max(int(number), 0))


def _status(denial: Denial, policy: Policy) -> HTTPStatus:
    if denial.reason == "limit_reached":
        return HTTPStatus(policy.limit_status)
    return _STATUS[denial.reason]


def _problem(denial: Denial, status: HTTPStatus) -> bytes:
    problem = {
        "type": "about:blank",
        "title": status.phrase,
        "status": status.value,
        "detail": _DETAIL[denial.reason].format(denial.feature),
        "reason": denial.reason,
    }
    if denial.feature:
        problem["feature"] = denial.feature
    return msgspec.json.encode(problem)


class EntitlementDenied(HTTPException):
    """A denial, on its way to the framework that turns it into a response.

    werkzeug and Flask do so by themselves. Whatever is answered in its stead, a
    request that ends in it is not billed.
    """

    def __init__(self, decision: Decision, refusal: DeniedResponse) -> None:
        #: Why.
        self.decision: Decision = decision
        self.code: int | None = refusal.status.value
        response = Response(
            refusal.body, status=refusal.status.value, headers=refusal.headers
        )
        super().__init__(refusal.denial.reason, response=response)
        self._refusal = refusal

    def __call__(self, environ: Any, start_response: Any) -> Any:
        """Answer the request (PEP 3333)."""
        return self._refusal(environ, start_response)

    def get_response(self, environ: Any = None, scope: Any = None) -> Any:
        """Return the answer as a response of werkzeug's, for other frameworks.

        With the request's *environ* it is what ``denied_response`` makes of it.
        """
        if environ is None:
            return super().get_response(environ, scope)
        return Response.from_app(self._refusal, environ)

    def answer(self, environ: Any, start_response: Any, *, is_started: bool) -> Any:
        """Answer the request in place of an application that has raised this.

        *is_started*: it had called *start_response* before.
        """
        if not is_started:
            return self._refusal(environ, start_response)
        raised = type(self), self, self.__traceback__

        def start(status: str, headers: list[tuple[str, str]], *_: Any) -> Any:
            return start_response(status, headers, raised)

        return self._refusal(environ, start)


def check_entitlements(
    request: object, *features: str, reserve: Mapping[str, float] | None = None
) -> Decision:
    """Decide whether the subject of this request may use *features*, all of them.

    Without features: those that the policy requires. *reserve* says how much is set
    apart of features whose quota is counted down (see ``entitlement_meters``).

    :raises ValueError: if an amount in *reserve* is none.
    """
    environ, gate = _gate(request)
    if environ is None or gate is None:
        logger.error(
            "%s: called outside a metered request; it counts as no answer",
            "check_entitlements",
        )
        return undecided(features, "open")
    return gate.check(environ, features or gate.required, reserve)


def require_entitlements(
    request: object, *features: str, reserve: Mapping[str, float] | None = None
) -> Decision:
    """Do as :func:`check_entitlements`, and end the request where it is denied.

    :raises EntitlementDenied: unless the decision allows or is not enforced.
    """
    decision = check_entitlements(request, *features, reserve=reserve)
    _, gate = _gate(request)
    if decision.allowed or gate is None or not gate.policy.enforce:
        return decision
    mark_denied(request)
    raise EntitlementDenied(decision, DeniedResponse(decision, gate.policy))


def _gate(request: object) -> tuple[dict[str, Any] | None, Gate | None]:
    environ = environ_of(request)
    billing = billing_of(environ)
    return environ, None if billing is None else billing.gate

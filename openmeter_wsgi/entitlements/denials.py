"""Denied requests: checks inside a handler, and the response to the client.

A request is denied before the application (`DeniedResponse` answers in its place), or
inside a handler that calls `require_entitlements`: that raises `EntitlementDenied`,
which the framework or the middleware turns into the same response.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

import msgspec
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response

from openmeter_wsgi import log
from openmeter_wsgi.entitlements.decision import no_answer_decision
from openmeter_wsgi.request import billing_of, environ_of, mark_denied, method_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from wsgiref.types import StartResponse

    from openmeter_wsgi.entitlements.decision import Decision, Denial, Quota, Reason
    from openmeter_wsgi.entitlements.gate import Gate
    from openmeter_wsgi.policy import Policy

logger: Final = log.get_logger(__name__)


#: The order in which the response prefers reasons: longest-lasting first.
_PREFERRED: tuple[Reason, ...] = (
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
    "no_subject": "The request does not identify its caller.",
    "no_access": "There is no access to the feature {!r}.",
    "unknown_customer": "There is no access to the feature {!r}.",
    "limit_reached": "The quota of the feature {!r} is used up.",
    "unavailable": "Access to the feature {!r} cannot be checked now.",
    "busy": "Access to the feature {!r} is being checked. Try again soon.",
}
#: The reasons for which the response has a Retry-After header.
_RETRY_REASONS = {"limit_reached", "unavailable", "busy"}
#: Default seconds in Retry-After.
_DEFAULT_RETRY_AFTER = 5


class DeniedResponse:
    """A WSGI application that denies one request. The request is not billed."""

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
        if self.denial.reason in _RETRY_REASONS:
            seconds = self.denial.retry_after or _DEFAULT_RETRY_AFTER
            headers.append(("Retry-After", str(seconds)))
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
                logger.exception("denied_response: %s raised; the default response "
                                 "is sent", own)  # fmt: skip
            else:
                return answer
        status = f"{self.status.value} {self.status.phrase}"
        start_response(status, self.headers)
        return [] if method_of(environ) == "HEAD" else [self.body]


def quota_headers(quota: Quota | None) -> list[tuple[str, str]]:
    """Return the RateLimit headers for *quota*; an empty list for None.

    The names are those of the IETF drafts on RateLimit headers that are in use.
    """
    if quota is None:
        return []
    headers = [("RateLimit-Remaining", _whole(quota.remaining))]
    if quota.limit is not None:
        headers.insert(0, ("RateLimit-Limit", _whole(quota.limit)))
    if (reset := quota.reset) is not None:
        headers.append(("RateLimit-Reset", str(reset)))
    return headers


def with_quota(
    decision: Decision | None, start_response: StartResponse
) -> StartResponse:
    """Return a start_response that adds the quota headers, if there is a quota."""
    headers = quota_headers(decision.quota) if decision else []
    if not headers:
        return start_response

    def start(
        status: str, given: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], object]:
        all_headers = [*given, *headers]
        if exc_info is None:
            return start_response(status, all_headers)
        return start_response(status, all_headers, exc_info)

    return start


def _rank(denial: Denial) -> tuple[int, float]:
    """Return a sort key: the longest-lasting denial comes first."""
    return _PREFERRED.index(denial.reason), -(denial.retry_at or 0.0)


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
    """The exception of a denied request; a framework turns it into a response.

    werkzeug and Flask do so by themselves. The request is not billed, even if an
    error handler sends another response.
    """

    def __init__(self, decision: Decision, denied: DeniedResponse) -> None:
        #: The decision that denies the request.
        self.decision: Decision = decision
        self.code: int | None = denied.status.value
        response = Response(
            denied.body, status=denied.status.value, headers=denied.headers
        )
        super().__init__(denied.denial.reason, response=response)
        self._denied = denied

    def __call__(self, environ: Any, start_response: Any) -> Any:
        """Answer the request (PEP 3333)."""
        return self._denied(environ, start_response)

    def get_response(self, environ: Any = None, scope: Any = None) -> Any:
        """Return a werkzeug response, for other frameworks.

        With the *environ* of the request, the option ``denied_response`` is applied.
        """
        if environ is None:
            return super().get_response(environ, scope)
        return Response.from_app(self._denied, environ)

    def answer(self, environ: Any, start_response: Any, *, is_started: bool) -> Any:
        """Answer the request after the application has raised this exception.

        *is_started*: the application called *start_response* before.
        """
        if not is_started:
            return self._denied(environ, start_response)
        raised = type(self), self, self.__traceback__

        def start(status: str, headers: list[tuple[str, str]], *_: Any) -> Any:
            return start_response(status, headers, raised)

        return self._denied(environ, start)


def check_entitlements(
    request: object, *features: str, reserve: Mapping[str, float] | None = None
) -> Decision:
    """Return the decision on the use of all *features* by the request's subject.

    Default: the features that the policy requires. *reserve* contains the amounts to
    reserve, by feature with a local quota (see ``entitlement_meters``).

    :raises ValueError: if a value in *reserve* is not a valid amount.
    """
    environ, gate = _gate(request)
    if environ is None or gate is None:
        logger.error(
            "%s: called outside a metered request; access is allowed without a check",
            "check_entitlements",
        )
        return no_answer_decision(features, "open")
    return gate.check(environ, features or gate.required, reserve)


def require_entitlements(
    request: object, *features: str, reserve: Mapping[str, float] | None = None
) -> Decision:
    """Return the decision of :func:`check_entitlements`, or end a denied request.

    :raises EntitlementDenied: if the decision denies and the policy enforces it.
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

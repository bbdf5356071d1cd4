"""What a denied caller gets: a problem document (RFC 9457) that says why."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import msgspec

from openmeter_wsgi import log
from openmeter_wsgi.request import method_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from wsgiref.types import StartResponse

    from openmeter_wsgi.entitlements.decision import Decision, Denial, Quota, Reason
    from openmeter_wsgi.policy import Policy

logger = log.get_logger(__name__)

#: Of several reasons the first in this order is told: the others would still be there.
_FIRST: tuple[Reason, ...] = (
    "no_subject", "no_access", "unknown_customer", "limit_reached", "unavailable",
)  # fmt: skip
_STATUS = {
    "no_subject": HTTPStatus.UNAUTHORIZED,
    "no_access": HTTPStatus.FORBIDDEN,
    "unknown_customer": HTTPStatus.FORBIDDEN,
    "unavailable": HTTPStatus.SERVICE_UNAVAILABLE,
}
_DETAIL = {
    "no_subject": "The request does not say on whose behalf it comes.",
    "no_access": "There is no access to the feature {!r}.",
    "unknown_customer": "There is no access to the feature {!r}.",
    "limit_reached": "The quota of the feature {!r} is used up.",
    "unavailable": "Whether there is access to the feature {!r} cannot be said now.",
}
#: Seconds after which to come back where nothing better is known.
_LATER = 5


class Refusal:
    """A WSGI application that refuses one request. It never costs the caller."""

    def __init__(self, decision: Decision, policy: Policy) -> None:
        self.decision = decision
        self.denial = min(decision.denied, key=_rank)
        self.status = _status(self.denial, policy)
        self.body = _problem(self.denial, self.status)
        self._policy = policy

    @property
    def headers(self) -> list[tuple[str, str]]:
        """The headers of the response."""
        headers = [
            ("Content-Type", "application/problem+json"),
            ("Content-Length", str(len(self.body))),
            ("Cache-Control", "no-store"),
        ]
        if self.denial.reason in {"limit_reached", "unavailable"}:
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

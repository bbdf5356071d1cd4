"""Entitlements in the handler, where the subject is known only after authentication."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response

from openmeter_wsgi import log
from openmeter_wsgi.entitlements.decision import unanswered
from openmeter_wsgi.entitlements.refusal import Refusal
from openmeter_wsgi.request import bill_nothing, billing_of, environ_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from openmeter_wsgi.entitlements.decision import Decision
    from openmeter_wsgi.entitlements.gate import Gate

logger = log.get_logger(__name__)


class EntitlementDenied(HTTPException):
    """A denial, on its way to the framework that turns it into a response.

    werkzeug and Flask do so by themselves. Whatever is answered in its stead, a
    request that ends in it is not billed.
    """

    def __init__(self, decision: Decision, refusal: Refusal) -> None:
        #: Why.
        self.decision = decision
        self.code = refusal.status.value
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
        return unanswered(features, "open")
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
    bill_nothing(request)
    raise EntitlementDenied(decision, Refusal(decision, gate.policy))


def _gate(request: object) -> tuple[dict[str, Any] | None, Gate | None]:
    environ = environ_of(request)
    billing = billing_of(environ)
    return environ, None if billing is None else billing.gate

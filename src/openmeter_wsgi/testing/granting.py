"""An OpenMeter that knows of entitlements what a test has said."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from openmeter_wsgi.entitlements.breaker import Breaker
from openmeter_wsgi.errors import Unavailable
from openmeter_wsgi.questions import NO_ACCESS, UNKNOWN_CUSTOMER, Answer, Terms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from openmeter_wsgi.entitlements.asking import Answering, Question
    from openmeter_wsgi.entitlements.decision import Reason

LIMIT_REACHED = Answer(
    has_access=False,
    balance=0.0,
    usage=0.0,
    overage=0.0,
    total_available_grant_amount=0,
)
_DENIALS: dict[Reason, Answer] = {
    "no_access": NO_ACCESS,
    "limit_reached": LIMIT_REACHED,
    "unknown_customer": UNKNOWN_CUSTOMER,
}


class Grants:
    """Who has access to what. Nobody has, unless it is said."""

    def __init__(self) -> None:
        self.is_away = False
        #: Features that were asked for and never spoken of, by customer.
        self.never_granted: dict[tuple[str, str], None] = {}
        self._said: dict[tuple[str, str | None], Answer] = {}

    def grant(
        self, feature: str, subject: str | None, balance: float | None, config: Any
    ) -> None:
        """Give access, to everybody where no subject is named."""
        if balance is not None and balance <= 0:
            self._said[feature, subject] = LIMIT_REACHED
        else:
            self._said[feature, subject] = Answer(
                has_access=True,
                balance=balance,
                usage=None if balance is None else 0.0,
                total_available_grant_amount=balance,
                config=None if config is None else msgspec.json.encode(config).decode(),
            )

    def deny(self, feature: str, subject: str | None, reason: Reason) -> None:
        """Take access away.

        :raises ValueError: if OpenMeter has no such reason.
        """
        if reason not in _DENIALS:
            raise ValueError(
                f"reason: expected one of {', '.join(_DENIALS)}, got {reason!r}"
            )
        self._said[feature, subject] = _DENIALS[reason]

    def answer(self, customer: str, feature: str) -> Answer:
        """Return what OpenMeter would say."""
        for key in ((feature, customer), (feature, None)):
            if (said := self._said.get(key)) is not None:
                return said
        self.never_granted[customer, feature] = None
        return NO_ACCESS


class GrantsClient:
    """Answers as a `QuestionClient` does, without a network."""

    def __init__(self, grants: Grants) -> None:
        self._grants = grants

    def answers(self, customer: str, features: Sequence[str]) -> dict[str, Answer]:
        """Return what was said of *features*.

        :raises Unavailable: in an outage.
        """
        self._check()
        return {feature: self._grants.answer(customer, feature) for feature in features}

    def addresses(self, customer: str) -> bool:  # noqa: ARG002
        """Return True: there are no others."""
        return True

    def can_look_up(self, subject: str) -> bool:  # noqa: ARG002
        """Return False: in a test each subject is a customer."""
        return False

    def terms(self, customer: str, feature: str) -> Terms:  # noqa: ARG002
        """Return the terms of an entitlement: a hard limit without a period."""
        self._check()
        return Terms()

    def close(self) -> None:
        """Do nothing: there is no connection."""

    def _check(self) -> None:
        if self._grants.is_away:
            raise Unavailable("an outage that the test has called for")


class DirectAsker:
    """Asks in the thread of the request, as often as it is told to."""

    def __init__(self, client: GrantsClient, answering: Answering) -> None:
        self.breaker = Breaker()
        self._client = client
        self._answering = answering

    def ask(self, question: Question) -> None:
        """Ask; without an answer what was known before goes on to hold."""
        try:
            self._answering(
                self._client,  # type: ignore[arg-type]
                question,
                _nobody_waits,
                self.has_token,
            )
        except Unavailable:
            return

    refresh = ask

    def has_token(self) -> bool:
        """Ask as much as you like: nobody is at the other end."""
        return True

    def close(self) -> None:
        """Do nothing: there is no connection."""


def _nobody_waits() -> None:
    pass

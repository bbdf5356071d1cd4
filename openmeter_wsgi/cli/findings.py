"""Findings of ``check``: their severity, and the situation that is checked."""

from __future__ import annotations

import dataclasses
import enum
import secrets
import time
from typing import TYPE_CHECKING, NamedTuple

from openmeter_wsgi.events import Meter, encode_events

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from openmeter_wsgi.cli.api_client import Listing, NoAnswer
    from openmeter_wsgi.delivery.client import OpenMeterClient
    from openmeter_wsgi.policy import Policy

#: The type and the subject of every event that a check sends. No meter counts the
#: one, nobody pays for the other.
MARK = "openmeter_wsgi.check"
#: The answers to a key that may not, of all those that a list may get.
_NOT_ALLOWED = (401, 403)


class Severity(enum.StrEnum):
    """How bad it is. UNKNOWN: it could not be found out, which is no failure."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"
    UNKNOWN = "unknown"


class Finding(NamedTuple):
    """One thing that was looked at."""

    name: str
    severity: Severity
    found: str
    #: What to do about it, None if that is nothing.
    remedy: str | None = None


def ok(name: str, found: str, remedy: str | None = None) -> Finding:
    """Say that a thing is as it should be, and what still has to be made sure."""
    return Finding(name, Severity.OK, found, remedy)


def warning(name: str, found: str, remedy: str) -> Finding:
    """Say that a thing costs usage, or bills twice, under circumstances."""
    return Finding(name, Severity.WARNING, found, remedy)


def failure(name: str, found: str, remedy: str) -> Finding:
    """Say that a thing bills wrongly, or not at all."""
    return Finding(name, Severity.FAILURE, found, remedy)


def unknown(name: str, found: str, remedy: str | None = None) -> Finding:
    """Say that a thing could not be found out, and why."""
    return Finding(name, Severity.UNKNOWN, found, remedy)


def unanswered(name: str, error: NoAnswer, may: str) -> Finding:
    """Say that OpenMeter did not tell; a key that *may* is no remedy for all of it."""
    remedy = f"use a key that may {may}" if error.status in _NOT_ALLOWED else None
    return unknown(name, str(error), remedy)


@dataclasses.dataclass(frozen=True)
class Sent:
    """A marked event that OpenMeter has taken."""

    id: str
    #: As it was sent, and is sent again.
    encoded: bytes
    #: The monotonic time at which it was taken.
    at: float


@dataclasses.dataclass
class Situation:
    """What the checks look at; each may use what those before it have found out."""

    policy: Policy
    client: OpenMeterClient
    listing: Listing
    #: Wait so many seconds, and say on a terminal what for.
    wait: Callable[[float, str], None]
    #: Whether the server has answered anything at all.
    answers: bool = False
    #: The marked event, once OpenMeter has taken it.
    sent: Sent | None = None
    #: The directory of the spool, if it can be one.
    spool: Path | None = None

    def policies(self) -> Iterator[tuple[str | None, Policy]]:
        """Yield every policy that governs requests, with the rule of its route."""
        if not any(rule.is_every_other for rule, _ in self.policy.of_routes):
            yield None, self.policy
        for rule, policy in self.policy.of_routes:
            if policy is not None:
                yield rule.text, policy

    def send(self) -> Sent:
        """Send a marked event.

        :raises DeliveryError: if OpenMeter does not take it.
        """
        meter = Meter(MARK, b'{"total":1}')
        request_id = f"check-{secrets.token_hex(12)}"
        (encoded,) = encode_events(
            [meter],
            request_id=request_id,
            subject=MARK,
            source=self.policy.event_source,
        )
        self.client.ingest([encoded])
        return Sent(f"{request_id}:{MARK}", encoded, time.monotonic())


class Check(NamedTuple):
    """A line of the table of checks."""

    look: Callable[[Situation], Iterable[Finding]]
    #: What its finding is called where it cannot look.
    name: str
    #: Whether it looks at what the server says, which must answer.
    needs_answer: bool = False
    #: Whether it looks at the marked event, which OpenMeter must have taken.
    needs_event: bool = False

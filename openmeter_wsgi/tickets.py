"""Tickets: a request hands its bill to the job that it starts.

A ticket is signed text that anybody can read. It is no permission: settle the tickets
that your own application made, and never one that a customer sent.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING

import msgspec

from openmeter_wsgi.errors import ConfigError, MeterValueError, TicketError, safe_repr
from openmeter_wsgi.request import (
    COMPLETED,
    RunTimeUsage,
    environ_of,
    unsettled_record,
)
from openmeter_wsgi.values import clock, text_problem

if TYPE_CHECKING:
    from collections.abc import Iterable

    from itsdangerous import Signer

    from openmeter_wsgi.policy import Policy

_SALT = "openmeter_wsgi.tickets"


class Ticket(msgspec.Struct, frozen=True):
    """The content of a ticket."""

    #: None if nobody was known to bill.
    subject: str | None
    #: The name of the policy: ``default``, or the rule of a route.
    policy: str
    #: The source of the events.
    source: str
    #: The first part of the events' ids; the meter's type is the second.
    id: str
    #: The types of the meters that may be settled, None for any.
    types: tuple[str, ...] | None
    #: In seconds since 1970.
    expires_at: int


def defer(request: object, meters: str | Iterable[str] | None = None) -> str:
    """Take *meters* out of the bill of this request; return a ticket to settle them.

    *meters* are types; None stands for all. Whatever becomes of the response, the
    request bills none of them. The job passes the ticket to :meth:`Usage.settle` when
    it has succeeded. A ticket that nobody settles bills nothing.

    A ticket expires after ``resend_window``. Call :func:`set_subject`,
    :func:`set_user` and :func:`set_idempotency_key` before this. Outside a metered
    request it returns an empty text, which no `settle` accepts.

    :raises ConfigError: if the policy has no ``ticket_secret``.
    :raises MeterValueError: if *meters* are no types.
    """
    from itsdangerous.encoding import base64_encode

    types = None if meters is None else _types(meters)
    environ, record = environ_of(request), unsettled_record(request, "defer")
    if environ is None or record is None or record.billing is None:
        return ""
    billing = record.billing
    signer = _signers(billing.policy)[0]
    if record.usage is None:
        record.usage = RunTimeUsage()
    stated = record.usage
    subject = billing.subjects.find(environ)
    request_id = billing.id_source.id_of(environ, stated, subject, COMPLETED)
    if stated.deferred:
        # Each job of a request bills for itself.
        request_id += f"/{len(stated.deferred) + 1}"
    stated.deferred += (types,)
    ticket = Ticket(
        subject=subject,
        policy=billing.name,
        source=billing.policy.event_source,
        id=request_id,
        types=types,
        expires_at=int(clock.now() + billing.policy.resend_window),
    )
    return signer.sign(base64_encode(msgspec.json.encode(ticket))).decode()


def read_ticket(text: str, policy: Policy) -> Ticket:
    """Return the content of a ticket that can be settled under *policy* now.

    :raises TicketError: with the reason for which it is refused.
    """
    from itsdangerous.encoding import base64_decode

    signers = _signers(policy)
    if text_problem(text):
        raise TicketError(
            f"ticket: expected what defer() returned, got {safe_repr(text)}"
        )
    signed, payload = text.encode(), text.rpartition(".")[0].encode()
    # Not `unsign`: of base64 it also accepts other spellings of a signature.
    if not any(hmac.compare_digest(each.sign(payload), signed) for each in signers):
        raise TicketError(
            "ticket: expected one that is signed with ticket_secret, got one that was "
            "altered, or signed with another secret"
        )
    ticket = msgspec.json.decode(base64_decode(payload), type=Ticket)
    late = clock.now() - ticket.expires_at
    if late >= 0:
        raise TicketError(
            f"ticket: it expired {late:.0f} s ago, resend_window seconds after defer()"
        )
    return ticket


def _types(meters: str | Iterable[str]) -> tuple[str, ...]:
    types = (meters,) if isinstance(meters, str) else meters
    found = tuple(types) if hasattr(types, "__iter__") else ()
    if not found or any(text_problem(each) for each in found):
        raise MeterValueError(
            "meters: expected types such as ['videos'], or None, got "
            f"{safe_repr(meters)}"
        )
    return found


def _signers(policy: Policy) -> list[Signer]:
    # The policy has imported it if it has a secret: no request does.
    from itsdangerous import Signer

    if policy.ticket_secret is None:
        raise ConfigError(
            ["ticket_secret: expected a secret to sign tickets, got none"]
        )
    return [
        Signer(secret, salt=_SALT, digest_method=hashlib.sha256)
        for secret in policy.ticket_secret
    ]

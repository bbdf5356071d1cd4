"""Tickets: a request leaves its usage to be billed by a job that it starts.

The request passes the ticket of :func:`defer` to the job, which calls
:meth:`Usage.settle`. A ticket is signed text that anybody can read. It does not
authorize its bearer: never settle a ticket that a customer sent.
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

    #: The subject to bill, None if the request had none.
    subject: str | None
    #: The name of the policy: ``default``, or the rule of a route.
    policy: str
    #: The ``source`` of the events.
    source: str
    #: The first part of the event ids. The second part is the meter type.
    id: str
    #: The meter types that the job may settle, None for any.
    types: tuple[str, ...] | None
    #: Unix time in seconds.
    expires_at: int


def defer(request: object, meters: str | Iterable[str] | None = None) -> str:
    """Leave *meters* of this request to a job; return the ticket to settle them with.

    The request itself bills none of these meters, however its response ends. The job
    passes the ticket to :meth:`Usage.settle` when it has succeeded. A ticket that is
    never settled bills nothing. It expires after ``resend_window`` seconds.

    Call :func:`set_subject`, :func:`set_user` and :func:`set_idempotency_key` before
    this function. Outside a metered request it returns an empty text, which
    :meth:`Usage.settle` refuses.

    :param meters: meter types; None means all types.
    :raises ConfigError: if the policy has no ``ticket_secret``.
    :raises MeterValueError: if *meters* are not meter types.
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
    run_time = record.usage
    subject = billing.subjects.find(environ)
    request_id = billing.id_source.id_of(environ, run_time, subject, COMPLETED)
    if run_time.deferred:
        # Each job of a request gets its own event ids.
        request_id += f"/{len(run_time.deferred) + 1}"
    run_time.deferred += (types,)
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
    """Return the content of a ticket, if it can be settled under *policy* now.

    :raises TicketError: with the reason if the ticket is refused.
    """
    from itsdangerous.encoding import base64_decode

    signers = _signers(policy)
    if text_problem(text):
        raise TicketError(
            f"ticket: expected a text from defer(), got {safe_repr(text)}"
        )
    signed, payload = text.encode(), text.rpartition(".")[0].encode()
    # Not `unsign`: it also accepts other base64 texts of the same signature.
    if not any(hmac.compare_digest(s.sign(payload), signed) for s in signers):
        raise TicketError(
            "ticket: expected a ticket that is signed with ticket_secret, got one that "
            "was altered or signed with another secret"
        )
    ticket = msgspec.json.decode(base64_decode(payload), type=Ticket)
    late = clock.now() - ticket.expires_at
    if late >= 0:
        raise TicketError(
            f"ticket: expired {late:.0f} s ago, resend_window seconds after defer()"
        )
    return ticket


def _types(meters: str | Iterable[str]) -> tuple[str, ...]:
    types = (meters,) if isinstance(meters, str) else meters
    checked = tuple(types) if hasattr(types, "__iter__") else ()
    if not checked or any(text_problem(name) for name in checked):
        raise MeterValueError(
            "meters: expected meter types such as ['videos'], or None, got "
            f"{safe_repr(meters)}"
        )
    return checked


def _signers(policy: Policy) -> list[Signer]:
    # A policy with a secret has imported the module already, so requests do not.
    from itsdangerous import Signer

    if policy.ticket_secret is None:
        raise ConfigError(
            ["ticket_secret: expected a secret to sign tickets, got none"]
        )
    return [
        Signer(secret, salt=_SALT, digest_method=hashlib.sha256)
        for secret in policy.ticket_secret
    ]

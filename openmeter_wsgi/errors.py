"""Errors for users to catch, and errors between client and sender.

::

    OpenMeterWSGIError
    ├─ ConfigError (ValueError)      a configuration, at construction, all at once
    ├─ MeterValueError (ValueError)  the caller's own value, raised where it is made
    ├─ TicketError (ValueError)      a ticket that cannot be settled
    ├─ SpoolError                    the spool's disk; never reaches a request
    │   └─ SpoolFull                 no room for another segment
    └─ DeliveryError                 one attempt to send; never leaves the sender
        ├─ Unavailable               no answer, 408, 429, 5xx: tried again later
        ├─ Misconfigured             wrong key or address: kept until it is corrected
        ├─ Expired                   unanswered for longer than the resend window
        ├─ Deposed                   another process has become the sender meanwhile
        └─ Rejected                  400, 413: something in this batch is refused
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from openmeter_wsgi.log import clean

if TYPE_CHECKING:
    from collections.abc import Sequence


NOT_ON_WINDOWS = (
    "openmeter_wsgi runs on Linux, macOS and other POSIX systems, not on Windows: use "
    "WSL or a container"
)
#: The most characters that are kept of a text from a server or operating system.
MAX_REASON = 500


def safe_repr(value: object) -> str:
    """Return the repr of *value* for the text of an error. Never raises."""
    try:
        return repr(value)
    except Exception:  # noqa: BLE001 - also an integer of more than 4,300 digits
        return f"a {type(value).__name__} that cannot be shown"


def missing_extra(missing: ModuleNotFoundError, extra: str) -> ModuleNotFoundError:
    """Return *missing* as an error that says how to install the *extra* with it."""
    return ModuleNotFoundError(
        f"openmeter_wsgi.{extra}: {missing.name} is not installed; run: "
        f"pip install 'openmeter_wsgi[{extra}]'",
        name=missing.name,
    )


class OpenMeterWSGIError(Exception):
    """Base of all errors of this package."""


class ConfigError(OpenMeterWSGIError, ValueError):
    """A configuration that cannot work, with all of its problems."""

    #: One sentence a problem: the option, what was expected, what was given.
    problems: tuple[str, ...]

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(map(clean, problems))
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)


class MeterValueError(OpenMeterWSGIError, ValueError):
    """A meter that OpenMeter would refuse, or would count wrong or not at all."""


class TicketError(OpenMeterWSGIError, ValueError):
    """A ticket that is refused: altered, signed with another secret, or expired."""


class SpoolError(OpenMeterWSGIError):
    """The spool cannot take an event: it waits in memory, or is counted as dropped."""


class SpoolFull(SpoolError):
    """The disk is full, or the spool has reached its bound."""


class DeliveryError(OpenMeterWSGIError):
    """One attempt to deliver a batch that did not succeed."""

    #: The HTTP status, or None where there was no answer.
    status: int | None
    #: The wait in seconds that the server asked for, at most an hour.
    retry_after: float | None
    #: Whether the server may have taken events of the batch all the same.
    ambiguous: bool

    def __init__(
        self,
        reason: str,
        *,
        status: int | None = None,
        retry_after: float | None = None,
        ambiguous: bool = False,
    ) -> None:
        self.reason: str = clean(reason, MAX_REASON)
        self.status = status
        self.retry_after = retry_after
        self.ambiguous = ambiguous
        super().__init__(self.reason)


class Unavailable(DeliveryError):
    """OpenMeter could not be reached or could not answer: try again later."""


class Misconfigured(DeliveryError):
    """The configuration is wrong, not the events: all of them are kept."""


class Deposed(DeliveryError):
    """This sender was stuck, and another process has taken its place."""


class Rejected(DeliveryError):
    """The batch was refused: OpenMeter never accepts at least one event in it."""


class Expired(DeliveryError):
    """An earlier attempt may have arrived, and is too old to be repeated."""

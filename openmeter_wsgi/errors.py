"""The exceptions of this package.

Applications may catch the first four. `SpoolError` and `DeliveryError` are internal:
queue and sender catch them, and no request sees them.

::

    OpenMeterWSGIError
    ├─ ConfigError (ValueError)      invalid configuration; raised by constructors
    ├─ MeterValueError (ValueError)  invalid meters; raised by the call that got them
    ├─ TicketError (ValueError)      invalid or expired ticket
    ├─ SpoolError                    the spool directory cannot be written
    │   └─ SpoolFull                 disk full, or max_spool_bytes reached
    └─ DeliveryError                 one attempt to send a batch failed
        ├─ Unavailable               no answer, 408, 429, 5xx: retried later
        ├─ Misconfigured             wrong key or address: events kept until corrected
        ├─ Expired                   no answer for longer than resend_window
        ├─ Deposed                   another process has become the sender
        └─ Rejected                  400, 413: at least one event is invalid
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
#: Maximum number of characters kept of a text from a server or the operating system.
MAX_REASON = 500


def safe_repr(value: object) -> str:
    """Return the repr of *value* for an error message. Never raises."""
    try:
        return repr(value)
    except Exception:  # noqa: BLE001 - also an integer of more than 4,300 digits
        return f"a {type(value).__name__} that cannot be shown"


def missing_extra(missing: ModuleNotFoundError, extra: str) -> ModuleNotFoundError:
    """Return an error like *missing* that tells how to install the *extra*."""
    return ModuleNotFoundError(
        f"openmeter_wsgi.{extra}: {missing.name} is not installed; run: "
        f"pip install 'openmeter_wsgi[{extra}]'",
        name=missing.name,
    )


class OpenMeterWSGIError(Exception):
    """Base class of all exceptions of this package."""


class ConfigError(OpenMeterWSGIError, ValueError):
    """An invalid configuration, with all of its problems at once."""

    #: One sentence per problem: the option, the expected value, the given value.
    problems: tuple[str, ...]

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(map(clean, problems))
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)


class MeterValueError(OpenMeterWSGIError, ValueError):
    """A meter value that OpenMeter would reject, ignore or count incorrectly."""


class TicketError(OpenMeterWSGIError, ValueError):
    """A ticket that was altered, was signed with another secret, or has expired."""


class SpoolError(OpenMeterWSGIError):
    """An event could not be written to the spool. It stays in memory or is dropped."""


class SpoolFull(SpoolError):
    """The disk is full, or the spool has reached ``max_spool_bytes``."""


class DeliveryError(OpenMeterWSGIError):
    """A failed attempt to deliver a batch."""

    #: The HTTP status, None without an answer.
    status: int | None
    #: Seconds to wait that the server asked for, at most an hour.
    retry_after: float | None
    #: True if the server may have accepted events of the batch nevertheless.
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
    """OpenMeter did not answer, or answered 408, 429 or 5xx. Retry later."""


class Misconfigured(DeliveryError):
    """The API key or the address is wrong. All events are kept."""


class Deposed(DeliveryError):
    """This sender made no progress, and another process has taken over."""


class Rejected(DeliveryError):
    """OpenMeter rejected the batch: at least one of its events is invalid."""


class Expired(DeliveryError):
    """An earlier attempt may have arrived, and is too old to be retried safely."""

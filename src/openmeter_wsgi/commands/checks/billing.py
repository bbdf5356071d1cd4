"""What the policy bills."""

from __future__ import annotations

from typing import TYPE_CHECKING

from openmeter_wsgi.commands.checks.findings import failure, ok, warning
from openmeter_wsgi.status_codes import StatusCodes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openmeter_wsgi.commands.checks.findings import Finding, Situation

_NAME = "billed status codes"


def look_at_status_codes(situation: Situation) -> Iterator[Finding]:
    """Say whether responses are billed that are errors."""
    codes = StatusCodes(situation.policy.meter_on_status_codes)
    errors = [code for code in codes.codes if code[0] in "45"]
    if not errors:
        yield ok(_NAME, codes.text)
    elif situation.policy.billing_errors == "intended":
        yield ok(_NAME, f"{codes.text}; that errors are billed is intended")
    else:
        yield failure(
            _NAME,
            f"{codes.text} bills errors too, {StatusCodes(errors).text}",
            "set meter_on_status_codes to what customers shall pay for, such as "
            "'200-299'; if errors are among it, say so with billing_errors='intended'",
        )


def look_at_dry_run(situation: Situation) -> Iterator[Finding]:
    """Say whether anything is sent at all."""
    if situation.policy.dry_run:
        yield warning(
            "dry run",
            "dry_run is set: usage is counted and logged, and none is sent",
            "leave dry_run out where customers shall be billed",
        )

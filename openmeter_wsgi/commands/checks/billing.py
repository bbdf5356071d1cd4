"""What the policies bill."""

from __future__ import annotations

from typing import TYPE_CHECKING

from openmeter_wsgi.commands.checks.findings import failure, ok, warning
from openmeter_wsgi.status_codes import StatusCodes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openmeter_wsgi.commands.checks.findings import Finding, Situation
    from openmeter_wsgi.policy import Policy

_NAME = "billed status codes"


def look_at_status_codes(situation: Situation) -> Iterator[Finding]:
    """Say whether responses are billed that are errors, under any policy."""
    told = set()
    for route, policy in situation.policies():
        finding = _look_at_one(_NAME, policy)
        if (finding.found, finding.severity) not in told:
            told.add((finding.found, finding.severity))
            named = _NAME if route is None else f"{_NAME} of {route!r}"
            yield finding._replace(name=named)


def _look_at_one(name: str, policy: Policy) -> Finding:
    codes = StatusCodes(policy.meter_on_status_codes)
    errors = [code for code in codes.codes if code[0] in "45"]
    if not errors:
        return ok(name, codes.text)
    if policy.billing_errors == "intended":
        return ok(name, f"{codes.text}; that errors are billed is intended")
    return failure(
        name,
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

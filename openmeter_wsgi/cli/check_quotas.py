"""Checks of quotas that are counted down: whether processes count together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from openmeter_wsgi.cli.findings import ok, warning

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openmeter_wsgi.cli.findings import Finding, Situation

_NAME = "quotas"


def look_at_quotas(situation: Situation) -> Iterator[Finding]:
    """Say whether the processes of the application count quotas down together."""
    policy = situation.policy
    if not policy.entitlement_meters:
        return
    counted = ", ".join(map(repr, policy.entitlement_meters))
    if policy.redis_url is not None:
        yield ok(_NAME, f"{counted}: counted down by all processes that use the Redis")
    elif policy.spool_dir is not None:
        yield ok(_NAME, f"{counted}: counted down by all processes that use the spool")
    else:
        yield warning(
            _NAME,
            f"{counted}: each process counts for itself, so two workers may serve a "
            "quota twice",
            "set spool_dir, or redis_url where the processes are on several hosts; "
            "leave it if there is one process",
        )

"""Grants: amounts of usage that an entitlement allows, for a time or for good."""

from __future__ import annotations

from typing import TYPE_CHECKING

from openmeter_wsgi.sandbox.burndown import current_period
from openmeter_wsgi.sandbox.cloudevent import parse_time
from openmeter_wsgi.sandbox.parameters import parse_moment
from openmeter_wsgi.sandbox.periods import (
    Interval,
    Recurrence,
    parse_interval,
    recurring,
    whole_minute,
)
from openmeter_wsgi.sandbox.problems import Problem
from openmeter_wsgi.sandbox.resources import ulid
from openmeter_wsgi.sandbox.windows import rfc3339

if TYPE_CHECKING:
    from openmeter_wsgi.sandbox.resources import Document

_KEPT = ("priority", "metadata", "annotations", "expiration")


def new_grant(entitlement: Document, asked: Document, now: float) -> Document:
    """Return the grant that a client *asked* for, or answer 400.

    It takes effect at the start of a minute, as in OpenMeter.
    """
    if asked["amount"] <= 0:
        raise Problem(400, "validation error: amount must be positive")
    start = current_period(entitlement, now)[0]
    effective = parse_moment(asked["effectiveAt"])
    # A period that began within this minute is the only one that starts between two.
    effective = max(whole_minute(effective), start if effective >= start else 0)
    if effective < start:
        detail = f"grant effective date {rfc3339(effective)} is before the current"
        raise Problem(400, f"validation error: {detail} usage period {rfc3339(start)}")
    grant = {
        "id": ulid(),
        "entitlementId": entitlement["id"],
        "createdAt": rfc3339(now),
        "updatedAt": rfc3339(now),
        "amount": asked["amount"],
        "priority": 1,
        "effectiveAt": rfc3339(effective),
        "minRolloverAmount": asked.get("minRolloverAmount", 0),
        "maxRolloverAmount": asked.get("maxRolloverAmount", asked["amount"]),
        "_": {"epoch": len(entitlement["_"]["resets"])},
    }
    grant |= {name: asked[name] for name in _KEPT if name in asked}
    if expiration := asked.get("expiration"):
        grant["expiresAt"] = rfc3339(_expiry(effective, expiration))
    if recurrence := asked.get("recurrence"):
        grant["recurrence"] = recurring(
            {"anchor": rfc3339(effective)} | recurrence, now
        )
    return grant


def _expiry(effective: int, expiration: Document) -> int:
    if expiration["duration"] == "HOUR":
        interval = Interval(0, 3600)
    else:
        interval = parse_interval(expiration["duration"])
    return interval.after(effective, int(expiration["count"]))


def document(grant: Document, now: float) -> Document:
    """Return *grant* as the API shows it."""
    shown = {name: value for name, value in grant.items() if name != "_"}
    if recurrence := grant.get("recurrence"):
        interval = parse_interval(recurrence["intervalISO"])
        anchor = Recurrence(parse_time(recurrence["anchor"]), interval)
        shown["nextRecurrence"] = rfc3339(anchor.end(now))
    return shown

"""The three kinds of entitlements: what each keeps of what a client asked for."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from openmeter_wsgi.sandbox.cloudevent import parse_time
from openmeter_wsgi.sandbox.grants import new_grant
from openmeter_wsgi.sandbox.parameters import parse_moment
from openmeter_wsgi.sandbox.periods import Recurrence, parse_interval, whole_minute
from openmeter_wsgi.sandbox.problems import Problem
from openmeter_wsgi.sandbox.windows import rfc3339

if TYPE_CHECKING:
    from openmeter_wsgi.sandbox.resources import Document

_PRESETS = ("CURRENT_PERIOD_START", "NOW")


def _boolean(*_: Any) -> Document:
    return {}


def _static(_: Document, __: Document, asked: Document, *___: Any) -> Document:
    try:
        json.loads(asked["config"])
    except ValueError:
        detail = "invalid entitlement value for type static: Config is not valid JSON"
        raise Problem(400, detail) from None
    return {"config": asked["config"]}


def _metered(
    entitlement: Document,
    feature: Document,
    asked: Document,
    now: float,
    edge: tuple[int, int] | None,
) -> Document:
    if "meterSlug" not in feature:
        raise Problem(400, f"invalid feature {feature['id']}: Feature has no meter")
    period = entitlement["usagePeriod"]
    start, arrived = edge or (_measure_from(asked, period, now), 0)
    metered = {
        "isSoftLimit": asked.get("isSoftLimit", False),
        "preserveOverageAtReset": asked.get("preserveOverageAtReset", False),
        "measureUsageFrom": rfc3339(start),
        "_": {
            "meter": feature["meterSlug"],
            "filters": feature.get("meterGroupByFilters", {}),
            "measureFrom": [start, arrived],
            "anchor": parse_time(period["anchor"]),
            "resets": [],
            "grants": [],
        },
    }
    metered |= _issue(asked)
    whole = entitlement | metered
    if amount := metered.get("issueAfterReset"):
        own = {"minRolloverAmount": amount, "maxRolloverAmount": amount}
        grant = {
            "amount": amount,
            "priority": metered["issueAfterResetPriority"],
            "effectiveAt": rfc3339(start),
        }
        metered["_"]["grants"].append(new_grant(whole, grant | own, now))
    for grant in asked.get("grants", ()):
        metered["_"]["grants"].append(new_grant(whole, grant, now))
    return metered


#: The part of an entitlement that is peculiar to its kind.
KINDS = {"boolean": _boolean, "static": _static, "metered": _metered}


def _issue(asked: Document) -> Document:
    """Return what is granted anew in every period, in its old form and its new one."""
    issue = asked.get("issue") or {}
    amount = issue.get("amount", asked.get("issueAfterReset"))
    priority = issue.get("priority", asked.get("issueAfterResetPriority"))
    if amount is None:
        if priority is not None:
            detail = "IssueAfterResetPriority requires IssueAfterReset"
            raise Problem(400, f"invalid entitlement value for type metered: {detail}")
        return {}
    priority = priority or 1
    return {
        "issueAfterReset": amount,
        "issueAfterResetPriority": priority,
        "issue": {"amount": amount, "priority": priority},
    }


def _measure_from(asked: Document, period: Document, now: float) -> int:
    wanted = asked.get("measureUsageFrom", "NOW")
    if wanted == "CURRENT_PERIOD_START":
        interval = parse_interval(period["intervalISO"])
        return Recurrence(parse_time(period["anchor"]), interval).start(now)
    if wanted == "NOW":
        return whole_minute(now)
    if re.match(r"\d{4}-", wanted):
        return whole_minute(parse_moment(wanted))
    expected = f"a time or one of {', '.join(_PRESETS)}"
    raise Problem(400, f"measureUsageFrom: expected {expected}, got {wanted!r}")

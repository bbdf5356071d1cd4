"""Who has access to what, as the page shows it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from openmeter_wsgi.sandbox.access import NO_ACCESS
from openmeter_wsgi.sandbox.problems import Problem

if TYPE_CHECKING:
    from openmeter_wsgi.sandbox.parts import Parts
    from openmeter_wsgi.sandbox.resources import Document

#: Rows shown, the newest; every balance is computed each time the page looks.
ROWS = 100
#: Names offered for a new grant.
NAMES = 200


def entitlement_table(here: Parts) -> Document:
    """Return the rows of the table, and what a new grant can be made for."""
    customers = {customer["id"]: customer for customer in here.customers.all()}
    entitlements = here.entitlements.all()
    asked = _asked(here)
    rows = [
        _row(here, customers[entitlement["customerId"]], entitlement, asked)
        for entitlement in entitlements[-ROWS:]
        if entitlement["customerId"] in customers
    ]
    meters = [meter["slug"] for meter in here.meters.all()]
    features = [feature["key"] for feature in here.features.all()]
    names = {c["key"] for c in customers.values() if "key" in c}
    return {
        "rows": rows,
        "moreRows": max(0, len(entitlements) - ROWS),
        "questions": sum(asked.values()),
        "customers": sorted(names)[:NAMES],
        "features": sorted({*meters, *features})[:NAMES],
    }


def _asked(here: Parts) -> Counter[tuple[str, str | None]]:
    asked: Counter[tuple[str, str | None]] = Counter()
    for question, count in here.questions.counts().items():
        asked[question.customer, question.feature] += count
    return asked


def _row(
    here: Parts,
    customer: Document,
    entitlement: Document,
    asked: Counter[tuple[str, str | None]],
) -> Document:
    feature = entitlement["featureKey"]
    names = {customer["id"], customer.get("key", customer["id"])}
    shown = here.entitlements.document(entitlement)
    return {
        "id": entitlement["id"],
        "customer": customer.get("key", customer["id"]),
        "name": customer["name"],
        "feature": feature,
        "kind": entitlement["type"],
        "soft": entitlement.get("isSoftLimit", False),
        "periodEnd": shown.get("currentUsagePeriod", {}).get("to"),
        "asked": sum(asked[name, part] for name in names for part in (feature, None)),
        **_value(here, customer, entitlement),
    }


def _value(here: Parts, customer: Document, entitlement: Document) -> Document:
    try:
        value = here.access.value(customer, entitlement)
    except Problem as problem:
        return NO_ACCESS | {"error": problem.reason}
    return {name: part for name, part in value.items() if name != "grantBalances"}

"""Granting, revoking and resetting in one step, as a test or a person wants it."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from openmeter_wsgi.sandbox.access import NO_ACCESS
from openmeter_wsgi.sandbox.burndown import current_period
from openmeter_wsgi.sandbox.entitlements import begun
from openmeter_wsgi.sandbox.problems import Problem
from openmeter_wsgi.sandbox.windows import rfc3339

if TYPE_CHECKING:
    from collections.abc import Mapping

    from openmeter_wsgi.sandbox.parts import Parts
    from openmeter_wsgi.sandbox.resources import Document


class Granting:
    """Access, given and taken without the several requests that the API needs.

    Unlike the API, which knows minutes, it takes effect at once: what arrived before
    does not count. Any thread.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def grant(
        self,
        customer: str,
        feature: str,
        amount: float | None = None,
        *,
        soft: bool = False,
        period: str = "MONTH",
        config: Mapping[str, Any] | None = None,
    ) -> Document:
        """Give *customer* access to *feature*, creating what is missing for it.

        With an *amount*, or a *soft* limit, the entitlement is metered, with a *config*
        it is static, else boolean. One of the same kind stays, and an amount is added
        to it; any other is replaced.
        """
        payer = self._customer(customer)
        asked = _asked(amount, soft=soft, period=period, config=config)
        known = self._feature(feature, metered=asked["type"] == "metered")
        found = self._parts.entitlements.find(payer, known["key"])
        if found and _same(found, asked):
            return self._add(found, amount) if amount else found
        if found:
            self._parts.entitlements.delete(found)
        edge = self._now()
        return self._parts.entitlements.create(payer, known, asked, edge)

    def revoke(self, customer: str, feature: str) -> None:
        """Take the access to *feature* from *customer*."""
        self._parts.entitlements.delete(self._found(customer, feature))

    def reset(self, customer: str, feature: str) -> None:
        """Begin a new usage period: usage is zero, what recurs is granted anew."""
        found, edge = self._found(customer, feature), self._now()
        # Where nothing has arrived since the period began there is nothing to reset.
        if edge > begun(found, self._parts.store.clock()):
            self._parts.entitlements.reset_at(found, edge, {"retainAnchor": True})

    def value(self, customer: str, feature: str) -> Document:
        """Return the value of the entitlement, ``hasAccess`` always included."""
        payer = self._parts.customers.get(customer)
        found = self._parts.entitlements.find(payer, feature)
        return self._parts.access.value(payer, found) if found else NO_ACCESS

    def forget(self, customer: str) -> None:
        """Delete *customer*, with all entitlements."""
        found = self._parts.customers.get(customer)
        for entitlement in self._parts.entitlements.of(found):
            self._parts.entitlements.delete(entitlement)
        self._parts.customers.retire(found["id"])

    def _add(self, entitlement: Document, amount: float) -> Document:
        now = self._parts.store.clock()
        start = current_period(entitlement, now)[0]
        grant = {"amount": amount, "effectiveAt": rfc3339(max(start, int(now)))}
        self._parts.entitlements.grant(entitlement, grant)
        return self._parts.entitlements.get_by_id(entitlement["id"])

    def _now(self) -> tuple[int, int]:
        with self._parts.store.reading() as connection:
            (newest,) = connection.execute("SELECT max(seq) FROM events").fetchone()
        return int(self._parts.store.clock()), newest or 0

    def _found(self, customer: str, feature: str) -> Document:
        payer = self._parts.customers.get(customer)
        return self._parts.entitlements.get(payer, feature)

    def _customer(self, key: str) -> Document:
        found = self._parts.customers.find(key)
        return found or self._parts.customers.create({"key": key, "name": key})

    def _feature(self, key: str, *, metered: bool) -> Document:
        if found := self._parts.features.find(key):
            return found
        feature = {"key": key, "name": key}
        if self._parts.meters.find(key):
            feature["meterSlug"] = key
        elif metered:
            detail = f"feature {key!r}: neither a feature nor a meter has this name"
            raise Problem(404, f"{detail}; create the meter first")
        return self._parts.features.create(feature)


def _asked(
    amount: float | None,
    *,
    soft: bool,
    period: str,
    config: Mapping[str, Any] | None,
) -> Document:
    if amount is not None and not 0 <= amount < math.inf:
        detail = f"amount: expected a number of at least 0, got {amount!r}"
        raise Problem(400, detail)
    if amount is not None or soft:
        asked = {"type": "metered", "isSoftLimit": soft}
        issued = {} if amount is None else {"issueAfterReset": amount}
        return asked | issued | {"usagePeriod": {"interval": period}}
    if config is not None:
        return {"type": "static", "config": json.dumps(dict(config))}
    return {"type": "boolean"}


def _same(entitlement: Document, asked: Document) -> bool:
    names = ("type", "isSoftLimit", "config")
    return all(entitlement.get(name) == asked.get(name) for name in names)

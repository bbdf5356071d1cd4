"""Entitlements: one per customer and feature, with grants if it is metered.

`Entitlements` stores them, `Access` computes their values (access and balance), and
`Granting` offers the short calls of `Sandbox`. In this module *asked* is the body of a
client's request, which fits its schema.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from openmeter_wsgi.sandbox.balance import (
    Interval,
    Recurrence,
    burn_down,
    current_period,
    parse_interval,
    recurring,
    whole_minute,
)
from openmeter_wsgi.sandbox.request_validation import (
    Problem,
    go_time,
    parse_moment,
    parse_time,
    rfc3339,
    tidy,
)
from openmeter_wsgi.sandbox.store import Resources, subjects_of, ulid
from openmeter_wsgi.sandbox.usage import Edge, Query, UsageCache

if TYPE_CHECKING:
    from collections.abc import Mapping

    from openmeter_wsgi.sandbox.balance import Balance
    from openmeter_wsgi.sandbox.request_validation import Document
    from openmeter_wsgi.sandbox.store import Customers, Store

#: The members of a request for a grant that the grant has unchanged.
_KEPT = ("priority", "metadata", "annotations", "expiration")


def new_grant(entitlement: Document, asked: Document, now: float) -> Document:
    """Return a new grant for the request *asked*; answer 400 if it is invalid.

    As in OpenMeter it takes effect at the start of a minute.
    """
    if asked["amount"] <= 0:
        raise Problem(400, "validation error: amount must be positive")
    start = current_period(entitlement, now)[0]
    effective = parse_moment(asked["effectiveAt"])
    # A period that began within this minute may start in the middle of the minute.
    effective = max(whole_minute(effective), start if effective >= start else 0)
    if effective < start:
        detail = f"grant effective date {go_time(effective)} is before the current"
        raise Problem(400, f"validation error: {detail} usage period {go_time(start)}")
    grant = {
        "id": ulid(),
        "entitlementId": entitlement["id"],
        "createdAt": rfc3339(now),
        "updatedAt": rfc3339(now),
        "amount": asked["amount"],
        "priority": 0,
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


def grant_document(grant: Document, now: float) -> Document:
    """Return *grant* as the API shows it."""
    shown = {name: value for name, value in grant.items() if name != "_"}
    if recurrence := grant.get("recurrence"):
        interval = parse_interval(recurrence["intervalISO"])
        anchor = Recurrence(parse_time(recurrence["anchor"]), interval)
        shown["nextRecurrence"] = rfc3339(anchor.end(now))
    return shown


def v1_grant_document(grant: Document, now: float) -> Document:
    """Return *grant* as version 1 of the API shows it, where each grant expires."""
    shown = grant_document(grant, now)
    if "expiration" not in shown:
        shown["expiration"] = {"count": 100, "duration": "YEAR"}
        ends = parse_interval("YEAR").after(int(now), 100)
        shown["expiresAt"] = rfc3339(ends + now % 1)
    return shown


#: The values of ``measureUsageFrom`` that are not times.
PRESETS = ("CURRENT_PERIOD_START", "NOW")


def _static(asked: Document) -> Document:
    try:
        json.loads(asked["config"])
    except ValueError:
        raise Problem(400, "validation error: invalid JSON config") from None
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
    if amount := metered["issueAfterReset"]:
        grant = {
            "amount": amount,
            "priority": metered.get("issueAfterResetPriority", 1),
            "effectiveAt": rfc3339(start),
            "minRolloverAmount": amount,
            "maxRolloverAmount": amount,
            "annotations": {"issueAfterReset": True},
        }
        metered["_"]["grants"].append(new_grant(whole, grant, now))
    for grant in asked.get("grants", ()):
        metered["_"]["grants"].append(new_grant(whole, grant, now))
    return metered


def _issue(asked: Document) -> Document:
    """Return the amount granted in each period, in the API's old and new form."""
    issue = asked.get("issue") or {}
    amount = issue.get("amount", asked.get("issueAfterReset"))
    priority = issue.get("priority", asked.get("issueAfterResetPriority"))
    if amount is None and priority is not None:
        detail = "IssueAfterResetPriority requires IssueAfterReset"
        raise Problem(400, f"invalid entitlement value for type metered: {detail}")
    if amount is not None and "grants" in asked:
        detail = "issueAfterReset and grants cannot be used together"
        raise Problem(400, f"validation error: {detail}")
    shown = {"issueAfterReset": amount or 0, "issue": {"amount": amount or 0}}
    if priority is None:
        return shown
    issued = {"amount": amount, "priority": priority}
    return shown | {"issueAfterResetPriority": priority, "issue": issued}


def _measure_from(asked: Document, period: Document, now: float) -> int:
    wanted = asked.get("measureUsageFrom", "NOW")
    if wanted == "CURRENT_PERIOD_START":
        interval = parse_interval(period["intervalISO"])
        return Recurrence(parse_time(period["anchor"]), interval).start(now)
    if wanted == "NOW":
        return whole_minute(now)
    return whole_minute(parse_moment(wanted))


class Entitlements:
    """The store of all entitlements. Thread-safe.

    A document has the members that the API shows, and under ``_`` the data for
    balances: the meter, the start of measuring, the resets and the grants.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._all = Resources(store, "entitlement")

    def create(
        self,
        customer: Document,
        feature: Document,
        asked: Document,
        edge: tuple[int, int] | None = None,
    ) -> Document:
        """Create the entitlement for the request *asked*.

        :param edge: the start of measuring, as a time and a number of arrival; None
            takes it from *asked*.
        """
        if old := self.find(customer, feature["key"]):
            detail = f"entitlement with id {old['id']} already exists for feature"
            detail = f"{detail} {feature['id']} and customer {customer['id']}"
            raise Problem(409, detail, extensions={"conflictingEntityId": old["id"]})
        now = self._store.clock()
        entitlement = {
            "id": ulid(),
            "key": f"{customer['id']}:{feature['key']}",
            "type": asked["type"],
            "featureKey": feature["key"],
            "featureId": feature["id"],
            "customerId": customer["id"],
            "activeFrom": rfc3339(now),
        }
        entitlement |= {k: v for k, v in (("customerKey", customer.get("key")),) if v}
        entitlement |= {name: asked[name] for name in ("metadata",) if name in asked}
        if "usagePeriod" in asked:
            entitlement["usagePeriod"] = recurring(asked["usagePeriod"], now)
        if asked["type"] == "static":
            entitlement |= _static(asked)
        if asked["type"] == "metered":
            entitlement |= _metered(entitlement, feature, asked, now, edge)
        return self._all.create(entitlement)

    def find(self, customer: Document, id_or_feature: str) -> Document | None:
        """Return the entitlement of *customer* with this id or feature key, or None."""
        found = self._all.find(f"{customer['id']}:{id_or_feature}")
        if found is None:
            found = self._all.find(id_or_feature)
        if found is None or found["customerId"] != customer["id"]:
            return None
        return found

    def get(self, customer: Document, id_or_feature: str) -> Document:
        """Return the entitlement that `find` finds, or answer 404."""
        found = self.find(customer, id_or_feature)
        if found is None:
            detail = f"entitlement not found {id_or_feature} in namespace default"
            raise Problem(404, detail)
        return found

    def of(self, customer: Document) -> list[Document]:
        """Return all entitlements of *customer*, the oldest first."""
        with self._store.reading() as connection:
            return self._all.within(connection, f"{customer['id']}:")

    def all(self) -> list[Document]:
        """Return all entitlements, the oldest first."""
        return self._all.all()

    def delete(self, entitlement: Document) -> None:
        """Delete *entitlement*. Its customer loses the access at once."""
        self._all.retire(entitlement["id"])

    def grant(self, entitlement: Document, asked: Document) -> Document:
        """Add a grant to *entitlement*, and return it."""
        made: list[Document] = []

        def add(current: Document) -> None:
            _require_metered(current)
            grant = new_grant(current, asked, self._store.clock())
            current["_"]["grants"].append(grant)
            made.append(grant)

        self._all.change(entitlement["id"], add)
        return made[0]

    def reset(self, entitlement: Document, asked: Document) -> None:
        """Begin a new usage period at the start of a minute, as OpenMeter does."""
        now = self._store.clock()
        moment = asked.get("effectiveAt")
        at = parse_moment(moment) if moment else now
        if at > now:
            detail = f"cannot reset at {go_time(at)} in the future"
            raise Problem(400, f"validation error: {detail}")
        self.reset_at(entitlement, (whole_minute(at), 0), asked)

    def reset_at(
        self, entitlement: Document, edge: tuple[int, int], asked: Document
    ) -> None:
        """Begin a new usage period at *edge*, a time and a number of arrival."""

        def begin(current: Document) -> None:
            _require_metered(current)
            data = current["_"]
            last = period_start(current, self._store.clock())
            if edge <= last:
                detail = f"reset at {go_time(edge[0])} must be after last reset at"
                raise Problem(400, f"validation error: {detail} {go_time(last[0])}")
            anchors = [data["anchor"], *(reset["anchor"] for reset in data["resets"])]
            retained = asked.get("retainAnchor", False)
            preserve = asked.get("preserveOverage", current["preserveOverageAtReset"])
            data["resets"].append(
                {
                    "edge": list(edge),
                    "anchor": anchors[-1] if retained else edge[0],
                    "preserve": preserve,
                }
            )

        self._all.change(entitlement["id"], begin)

    def document(self, entitlement: Document) -> Document:
        """Return *entitlement* as the API shows it."""
        shown = {k: v for k, v in entitlement.items() if k not in ("_", "key")}
        if "usagePeriod" in entitlement and entitlement["type"] == "metered":
            start, end = current_period(entitlement, self._store.clock())
            shown["lastReset"] = rfc3339(start)
            shown["currentUsagePeriod"] = {"from": rfc3339(start), "to": rfc3339(end)}
        return shown


def period_start(entitlement: Document, now: float) -> tuple[int, int]:
    """Return the edge at which the current period of *entitlement* began."""
    _require_metered(entitlement)
    data = entitlement["_"]
    time, seq = data["resets"][-1]["edge"] if data["resets"] else data["measureFrom"]
    # A period that began without a reset starts at a time, not after an event.
    return max((time, seq), (current_period(entitlement, now)[0], 0))


def _require_metered(entitlement: Document) -> None:
    if entitlement["type"] != "metered":
        kind = entitlement["type"]
        raise Problem(400, f"expected entitlement type metered but got {kind}")


NO_ACCESS = {"hasAccess": False}
#: Seconds of a hundred years.
CENTURY = 36_525 * 86_400


class Access:
    """The values of entitlements: access and balances. Thread-safe."""

    def __init__(self, store: Store, meters: Resources) -> None:
        self._store = store
        self._meters = meters
        self._usage_cache = UsageCache()

    def value(
        self, customer: Document, entitlement: Document | None, at: int | None = None
    ) -> Document:
        """Return the value of *entitlement*, with ``hasAccess`` and all balances.

        :param at: a time in Unix seconds; None is now.
        """
        if entitlement is None:
            return NO_ACCESS
        if entitlement["type"] == "boolean":
            return {"hasAccess": True}
        if entitlement["type"] == "static":
            return {"hasAccess": True, "config": entitlement["config"]}
        if at is not None and at < parse_time(entitlement["activeFrom"]):
            return NO_ACCESS
        now = self._store.clock()
        if at is not None and at > now + CENTURY:
            raise Problem(501, "the sandbox looks at most a century ahead")
        if entitlement["_"]["measureFrom"][0] > (at or now):
            raise Problem(500, reason="usage is measured from a time in the future on")
        balance = self.balance(customer, entitlement, at)
        return {
            "hasAccess": entitlement["isSoftLimit"] or balance.left > 0,
            "balance": tidy(balance.left),
            "usage": tidy(balance.usage),
            "overage": tidy(balance.overage),
            "totalAvailableGrantAmount": tidy(balance.left + balance.burnt),
            "grantBalances": {k: tidy(left) for k, left in balance.grants.items()},
        }

    def balance(
        self, customer: Document, entitlement: Document, at: int | None = None
    ) -> Balance:
        """Return the balance of a metered *entitlement* at the time *at*, or now."""
        data = entitlement["_"]
        meter = self._meters.find(data["meter"])
        if meter is None:
            raise Problem(500, reason=f"meter {data['meter']} was deleted")
        # OpenMeter rounds the time up to a minute. So the usage of the whole current
        # minute counts, and the last minute of a period has the balance of the next.
        now = self._store.clock()
        until = math.ceil(at / 60) * 60 if at else whole_minute(now) + 60
        with self._store.reading() as connection:
            query = Query(
                subjects=subjects_of(customer),
                filters={name: [text] for name, text in data["filters"].items()},
                horizon=self._store.horizon(connection),
            )

            def used(start: Edge, end: Edge) -> float:
                until_end = replace(query, before=end)
                return self._usage_cache.usage(connection, meter, until_end, start)

            return burn_down(entitlement, until, until, used)


def v1(value: Document) -> Document:
    """Return *value* as the v1 API shows it: without the balances of grants."""
    return {name: part for name, part in value.items() if name != "grantBalances"}


def v2(value: Document) -> Document:
    """Return *value* as the v2 API shows it: without ``hasAccess`` if that is false."""
    if value["hasAccess"]:
        return value
    return {name: part for name, part in value.items() if name != "hasAccess"}


@dataclass(frozen=True, slots=True)
class Granting:
    """Short calls that grant and revoke access; the API needs several requests.

    Changes take effect at once, between two events. In the API they take effect at the
    start of a minute. Thread-safe.
    """

    store: Store
    customers: Customers
    features: Resources
    meters: Resources
    entitlements: Entitlements

    def grant(self, customer: str, feature: str, asked: Document) -> Document:
        """Give *customer* the entitlement *asked*; create missing objects.

        If the customer has an entitlement of the same kind, the amount is added to it.
        An entitlement of another kind is replaced.
        """
        payer = self._customer(customer)
        measured = self._feature(feature, metered=asked["type"] == "metered")
        current = self.entitlements.find(payer, measured["key"])
        if current and _is_same_kind(current, asked):
            amount = asked.get("issueAfterReset")
            return self._add(payer, current, amount) if amount else current
        if current:
            self.entitlements.delete(current)
        return self.entitlements.create(payer, measured, asked, self._now())

    def revoke(self, customer: str, feature: str) -> None:
        """Delete the entitlement of *customer* to *feature*."""
        self.entitlements.delete(self._get(customer, feature))

    def reset(self, customer: str, feature: str) -> None:
        """Begin a new usage period: usage is zero, recurring grants are renewed."""
        entitlement, edge = self._get(customer, feature), self._now()
        # Without an event since the period began there is nothing to reset.
        if edge > period_start(entitlement, self.store.clock()):
            self.entitlements.reset_at(entitlement, edge, {"retainAnchor": True})

    def delete_customer(self, customer: str) -> None:
        """Delete *customer* and its entitlements."""
        payer = self.customers.get(customer)
        for entitlement in self.entitlements.of(payer):
            self.entitlements.delete(entitlement)
        self.customers.retire(payer["id"])

    def _add(self, payer: Document, entitlement: Document, amount: float) -> Document:
        now = self.store.clock()
        start = current_period(entitlement, now)[0]
        grant = {"amount": amount, "effectiveAt": rfc3339(max(start, int(now)))}
        # The same priority as the amount of the period, which is burnt first, as it is
        # the older grant.
        grant["priority"] = 1
        self.entitlements.grant(entitlement, grant)
        return self.entitlements.get(payer, entitlement["id"])

    def _now(self) -> tuple[int, int]:
        """Return the current edge: the time and the number of the newest event."""
        with self.store.reading() as connection:
            (newest,) = connection.execute("SELECT max(seq) FROM events").fetchone()
        return int(self.store.clock()), newest or 0

    def _get(self, customer: str, feature: str) -> Document:
        payer = self.customers.get(customer)
        return self.entitlements.get(payer, feature)

    def _customer(self, key: str) -> Document:
        """Return the customer *key*, which is created if it is missing."""
        found = self.customers.find(key)
        return found or self.customers.create({"key": key, "name": key})

    def _feature(self, key: str, *, metered: bool) -> Document:
        """Return the feature *key*, which is created if it is missing."""
        if found := self.features.find(key):
            return found
        feature = {"key": key, "name": key}
        if self.meters.find(key):
            feature["meterSlug"] = key
        elif metered:
            detail = f"feature {key!r}: neither a feature nor a meter has this name"
            raise Problem(404, f"{detail}; create the meter first")
        return self.features.create(feature)


def wanted(
    amount: float | None = None,
    *,
    soft: bool = False,
    period: str = "MONTH",
    config: Mapping[str, Any] | None = None,
) -> Document:
    """Return a request for an entitlement: metered, static or boolean.

    It is metered if there is an *amount* or a *soft* limit, else static if there is a
    *config*, else boolean.
    """
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


def _is_same_kind(entitlement: Document, asked: Document) -> bool:
    names = ("type", "isSoftLimit", "config")
    return all(entitlement.get(name) == asked.get(name) for name in names)

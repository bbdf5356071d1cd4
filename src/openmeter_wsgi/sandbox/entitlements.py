"""Entitlements as OpenMeter keeps them: one per customer and feature, with grants."""

from __future__ import annotations

from typing import TYPE_CHECKING

from openmeter_wsgi.sandbox.burndown import current_period
from openmeter_wsgi.sandbox.entitlement_kinds import KINDS
from openmeter_wsgi.sandbox.grants import new_grant
from openmeter_wsgi.sandbox.parameters import parse_moment
from openmeter_wsgi.sandbox.periods import recurring, whole_minute
from openmeter_wsgi.sandbox.problems import Problem
from openmeter_wsgi.sandbox.resources import Resources, ulid
from openmeter_wsgi.sandbox.windows import rfc3339

if TYPE_CHECKING:
    from openmeter_wsgi.sandbox.resources import Document
    from openmeter_wsgi.sandbox.store import Store


class Entitlements:
    """All entitlements. Any thread.

    A document holds what the API shows, and under ``_`` what balances are computed
    from: the meter, where measuring began, the resets and the grants.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._all = Resources(store, "entitlement", key="key")

    def create(
        self,
        customer: Document,
        feature: Document,
        asked: Document,
        edge: tuple[int, int] | None = None,
    ) -> Document:
        """Store what a client *asked* for, which has passed the schema.

        :param edge: where measuring begins, if not where *asked* says.
        """
        if old := self.find(customer, feature["key"]):
            detail = f"entitlement with id {old['id']} already exists for feature"
            raise Problem(
                409, f"{detail} {feature['id']} and customer {customer['id']}"
            )
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
        entitlement |= KINDS[asked["type"]](entitlement, feature, asked, now, edge)
        return self._all.create(entitlement)

    def find(self, customer: Document, id_or_feature: str) -> Document | None:
        """Return the one of *customer* with this id, or for the feature of this key."""
        found = self._all.find(f"{customer['id']}:{id_or_feature}")
        if found is None:
            found = self._all.find(id_or_feature)
        if found is None or found["customerId"] != customer["id"]:
            return None
        return found

    def get(self, customer: Document, id_or_feature: str) -> Document:
        """Return what `find` finds, or answer 404."""
        found = self.find(customer, id_or_feature)
        if found is None:
            detail = f"entitlement not found {id_or_feature} in namespace default"
            raise Problem(404, detail)
        return found

    def get_by_id(self, id_: str) -> Document:
        """Return the one with this id, whoever's it is, or answer 404."""
        return self._all.get(id_)

    def of(self, customer: Document) -> list[Document]:
        """Return all of *customer*, oldest first."""
        return self._all.with_prefix(f"{customer['id']}:")

    def all(self) -> list[Document]:
        """Return all, oldest first."""
        return self._all.all()

    def delete(self, entitlement: Document) -> None:
        """Delete *entitlement*; its customer has no access from now on."""
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
        """Begin a new usage period, to the minute as OpenMeter does."""
        now = self._store.clock()
        moment = asked.get("effectiveAt")
        at = parse_moment(moment) if moment else now
        if at > now:
            raise Problem(
                400, f"validation error: cannot reset at {moment} in the future"
            )
        self.reset_at(entitlement, (whole_minute(at), 0), asked)

    def reset_at(
        self, entitlement: Document, edge: tuple[int, int], asked: Document
    ) -> None:
        """Begin a new usage period at *edge*."""

        def begin(current: Document) -> None:
            _require_metered(current)
            own = current["_"]
            if edge <= begun(current, self._store.clock()):
                reason = "can only end usage period after current period start time"
                raise Problem(400, f"validation error: {reason}")
            anchors = [own["anchor"], *(reset["anchor"] for reset in own["resets"])]
            retained = asked.get("retainAnchor", False)
            preserve = asked.get("preserveOverage", current["preserveOverageAtReset"])
            own["resets"].append(
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


def begun(entitlement: Document, now: float) -> tuple[int, int]:
    """Return the edge at which the current period of *entitlement* began."""
    _require_metered(entitlement)
    own = entitlement["_"]
    time, seq = own["resets"][-1]["edge"] if own["resets"] else own["measureFrom"]
    # A period that began by itself has no event of its own to begin with.
    return max((time, seq), (current_period(entitlement, now)[0], 0))


def _require_metered(entitlement: Document) -> None:
    if entitlement["type"] != "metered":
        kind = entitlement["type"]
        raise Problem(400, f"expected entitlement type metered but got {kind}")

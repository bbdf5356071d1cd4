"""What a customer may do: the values of entitlements, computed live from the events."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from openmeter_wsgi.sandbox.burndown import burn_down
from openmeter_wsgi.sandbox.cloudevent import parse_time
from openmeter_wsgi.sandbox.listing import subjects_of
from openmeter_wsgi.sandbox.periods import whole_minute
from openmeter_wsgi.sandbox.problems import Problem
from openmeter_wsgi.sandbox.readings import Edge, Readings, Source
from openmeter_wsgi.sandbox.usage import tidy

if TYPE_CHECKING:
    from openmeter_wsgi.sandbox.burndown import Balance
    from openmeter_wsgi.sandbox.resources import Document, Resources
    from openmeter_wsgi.sandbox.store import Store

NO_ACCESS = {"hasAccess": False}


class Access:
    """Answers whether a customer has access. Any thread."""

    def __init__(self, store: Store, meters: Resources) -> None:
        self._store = store
        self._meters = meters
        self._readings = Readings()

    def value(
        self, customer: Document, entitlement: Document, at: int | None = None
    ) -> Document:
        """Return the value of *entitlement*, with ``hasAccess`` and all balances.

        :param at: Unix seconds; None is now.
        """
        if entitlement["type"] == "boolean":
            return {"hasAccess": True}
        if entitlement["type"] == "static":
            return {"hasAccess": True, "config": entitlement["config"]}
        if at is not None and at < entitlement["_"]["measureFrom"][0]:
            return NO_ACCESS
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
        """Return the balance of a metered *entitlement*, *at* a time or now."""
        source, since = self._source(customer, entitlement)
        # The running minute counts as a whole: OpenMeter's resolution.
        if at is None:
            moment = self._store.clock()
            until = whole_minute(moment) + 60
        else:
            moment, until = at, math.ceil(at / 60) * 60
        with self._store.reading() as connection:
            horizon = self._store.horizon(connection)

            def usage(start: Edge, end: Edge) -> float:
                first = Edge(max(start.time, since), start.seq)
                return self._readings.usage(connection, source, first, end, horizon)

            return burn_down(entitlement, moment, until, usage)

    def _source(self, customer: Document, entitlement: Document) -> tuple[Source, int]:
        """Return what *entitlement* counts, and since when its meter does."""
        own = entitlement["_"]
        meter = self._meters.find(own["meter"])
        if meter is None:
            raise Problem(500, reason=f"meter {own['meter']} was deleted")
        groups = meter.get("groupBy", {})
        since = meter.get("eventFrom")
        source = Source(
            meter["id"],
            meter["eventType"],
            meter["aggregation"],
            meter.get("valueProperty"),
            tuple(subjects_of(customer)),
            tuple((groups[name], text) for name, text in own["filters"].items()),
        )
        return source, parse_time(since) if since else 0


def v1(value: Document) -> Document:
    """Return *value* as the v1 API shows it: without the balance of each grant."""
    return {name: part for name, part in value.items() if name != "grantBalances"}


def v2(value: Document) -> Document:
    """Return *value* as the v2 API shows it: a denial has no ``hasAccess``."""
    if value["hasAccess"]:
        return value
    return {name: part for name, part in value.items() if name != "hasAccess"}

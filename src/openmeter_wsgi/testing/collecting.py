"""A transport that keeps what it is given, and what else a test has of OpenMeter."""

from __future__ import annotations

import dataclasses
import datetime  # noqa: TC003 - decoded into
from typing import TYPE_CHECKING, Any

import msgspec

from openmeter_wsgi.billing import Audit
from openmeter_wsgi.delivery.queue import Backlog
from openmeter_wsgi.entitlements.checking import Entitlements
from openmeter_wsgi.entitlements.countdown import Countdown
from openmeter_wsgi.entitlements.known import Lifetimes
from openmeter_wsgi.events import RequestIds
from openmeter_wsgi.ledger import Ledger
from openmeter_wsgi.ledger.sqlite import SqliteStore
from openmeter_wsgi.process import Process
from openmeter_wsgi.stats import Counts
from openmeter_wsgi.testing.granting import DirectAsker, Grants, GrantsClient
from openmeter_wsgi.testing.responses import OpenResponses

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from openmeter_wsgi.health import Problem
    from openmeter_wsgi.policy import Policy


class Event(msgspec.Struct, frozen=True):
    """One event as OpenMeter would have got it."""

    type: str
    subject: str
    #: A number that is no float travels as text, as it would to OpenMeter.
    data: dict[str, Any]
    id: str
    source: str
    time: datetime.datetime


class Unmetered(msgspec.Struct, frozen=True):
    """A request that became no event, and why."""

    reason: str
    method: str
    path: str
    status: str | None
    #: ``default``, or the rule of a route.
    policy: str


class Collected:
    """What all middlewares of a test have settled. Any thread."""

    def __init__(self) -> None:
        self.grants = Grants()
        self.responses = OpenResponses()
        self.events: list[Event] = []
        self.unmetered: list[Unmetered] = []
        self._counts: list[Counts] = []
        self._stores: list[SqliteStore] = []
        #: Of all requests of the test: request-1, request-2, …
        self._ids = RequestIds("request")

    def process(self, policy: Policy) -> Process:
        """Return what bills the requests of one middleware."""
        counts = Counts()
        self._counts.append(counts)
        # Also of a dry run: a test wants to see the events.
        transport = Collector(self.events, counts)
        return Process(
            _observed(policy, self._tell),
            counts=counts,
            transport=transport,
            ids=self._ids,
            entitlements=self._entitlements(policy, transport),
            watch=self.responses.watch,
        )

    def end(self) -> None:
        """Finish what is open, and leave nothing behind."""
        self.responses.finish()
        for store in self._stores:
            store.close()

    def _tell(self, record: Mapping[str, Any]) -> None:
        self.unmetered.append(msgspec.convert(record, Unmetered))

    def _entitlements(self, policy: Policy, transport: Collector) -> Entitlements:
        """Return entitlements that ask the test, and each time anew."""
        client = GrantsClient(self.grants)
        store = SqliteStore()
        self._stores.append(store)
        ledger = Ledger(
            store,
            visibility_lag=policy.visibility_lag,
            delivered_until=transport.delivered_until,
        )
        return Entitlements(
            new_asker=lambda answering: DirectAsker(client, answering),
            countdown=Countdown(ledger, policy.entitlement_meters, tends=False),
            lifetimes=Lifetimes(0, 0, policy.max_stale),
            cache_size=policy.entitlement_cache_size,
            close_store=store.close,
            tells_periods=False,
        )

    @property
    def dropped(self) -> dict[str, int]:
        """Meters that were lost, by reason."""
        found: dict[str, int] = {}
        for counts in self._counts:
            for reason, n in counts.dropped.items():
                if n:
                    found[reason] = found.get(reason, 0) + n
        return found


class Collector:
    """A transport that hands events to a test. Nothing ever waits in it."""

    started = True
    in_spool = in_memory = Backlog()
    problems: tuple[Problem, ...] = ()

    def __init__(self, events: list[Event], counts: Counts) -> None:
        self._events = events
        self._counts = counts

    def start(self, environ: Mapping[str, Any]) -> None:
        """Do nothing: there is no thread."""

    def put(self, event: bytes) -> None:
        """Take one event."""
        self._events.append(msgspec.json.decode(event, type=Event))
        self._counts.delivered += 1

    def delivered_until(self) -> float:
        """Return the beginning: a quota counts down all that the test has used."""
        return 0.0

    def flush(self, timeout: float | None = None) -> bool:  # noqa: ARG002
        """Say that nothing waits."""
        return True

    def close(self, timeout: float | None = None) -> None:
        """Do nothing: nothing waits."""


def _observed(policy: Policy, tell: Callable[[Mapping[str, Any]], object]) -> Policy:
    """Return *policy* without disk and network, telling also *tell* what is audited."""
    routes = policy.routes and {
        rule: {**own, "audit": _both(own["audit"], tell)}
        if own and "audit" in own
        else own
        for rule, own in policy.routes.items()
    }
    return dataclasses.replace(
        policy,
        audit=_both(policy.audit, tell),
        routes=routes,
        spool_dir=None,
        redis_url=None,
        delivery="thread",
    )


def _both(
    own: Any, tell: Callable[[Mapping[str, Any]], object]
) -> Callable[[dict[str, Any]], object]:
    if own is None:
        return tell
    audit = Audit(own)

    def tell_both(record: dict[str, Any]) -> None:
        tell(record)
        audit.tell(record)

    return tell_both

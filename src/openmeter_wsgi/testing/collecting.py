"""A metering that keeps what it would send, in the process and nowhere else."""

from __future__ import annotations

import dataclasses
import datetime  # noqa: TC003 - decoded into
from typing import TYPE_CHECKING, Any

import msgspec

from openmeter_wsgi.audit import Audit
from openmeter_wsgi.delivery.queue import Backlog
from openmeter_wsgi.entitlements.checking import Entitlements
from openmeter_wsgi.entitlements.countdown import Countdown
from openmeter_wsgi.entitlements.known import Lifetimes
from openmeter_wsgi.events import RequestIds
from openmeter_wsgi.ledger import Ledger
from openmeter_wsgi.ledger.sqlite import SqliteStore
from openmeter_wsgi.metering import Metering
from openmeter_wsgi.testing.granting import DirectAsker, Grants, GrantsClient
from openmeter_wsgi.testing.responses import OpenResponses

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from openmeter_wsgi.health import Problem
    from openmeter_wsgi.policy import Policy
    from openmeter_wsgi.stats import Counts
    from openmeter_wsgi.testing.responses import Response


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
        self.meterings: list[_CollectingMetering] = []
        #: Of all requests of the test: request-1, request-2, …
        self.ids = RequestIds("request")

    # -- As a Substitute

    def metering(self, policy: Policy) -> Metering:
        """Return what collects the usage of one middleware."""
        made = _CollectingMetering(policy, self)
        self.meterings.append(made)
        return made

    def watch(self, response: Iterable[bytes]) -> Response:
        """Return what does not wait for a client to close it."""
        return self.responses.watch(response)

    def end(self) -> None:
        """Finish what is open, and leave nothing behind."""
        self.responses.finish()
        for metering in self.meterings:
            metering.end()

    # -- For the meterings

    def put(self, event: bytes) -> None:
        """Take one event."""
        self.events.append(msgspec.json.decode(event, type=Event))

    def tell(self, record: Mapping[str, Any]) -> None:
        """Take what is told of a request that became no event."""
        self.unmetered.append(msgspec.convert(record, Unmetered))

    @property
    def dropped(self) -> dict[str, int]:
        """Meters that were lost, by reason."""
        found: dict[str, int] = {}
        for metering in self.meterings:
            for reason, n in metering.counts.dropped.items():
                if n:
                    found[reason] = found.get(reason, 0) + n
        return found


class _CollectingMetering(Metering):
    """Settles as any other, and hands its events to the test."""

    def __init__(self, policy: Policy, collected: Collected) -> None:
        self._collected = collected
        self._original = policy
        self._begin(_observed(policy, collected.tell))

    def another(self) -> Metering:
        """Return one under the same policy: for a process that the test forks."""
        return self._collected.metering(self._original)

    def end(self) -> None:
        """Close the store of quotas."""
        self._store.close()

    def _new_queue(self, policy: Policy) -> Any:  # noqa: ARG002
        return _Queue(self._collected.put, self.counts)

    def _way_out(self, policy: Policy) -> Callable[[bytes], object]:  # noqa: ARG002
        return self.queue.put  # also of a dry run: a test wants to see it

    def _plain(self) -> None:
        return None  # each response is watched

    def _new_ids(self) -> RequestIds:
        return self._collected.ids

    def _new_entitlements(self, policy: Policy) -> Entitlements:
        """Return entitlements that ask the test, and each time anew."""
        client = GrantsClient(self._collected.grants)
        self._store = SqliteStore()
        ledger = Ledger(
            self._store,
            visibility_lag=policy.visibility_lag,
            delivered_until=self.queue.delivered_until,
        )
        return Entitlements(
            new_asker=lambda answering: DirectAsker(client, answering),
            countdown=Countdown(ledger, policy.entitlement_meters, tends=False),
            lifetimes=Lifetimes(0, 0, policy.max_stale),
            cache_size=policy.entitlement_cache_size,
            close_store=self._store.close,
            tells_periods=False,
        )


class _Queue:
    """Hands over what is put. Nothing ever waits in it."""

    started = True
    waiting = 0
    in_spool = in_memory = Backlog()
    problems: tuple[Problem, ...] = ()

    def __init__(self, collect: Callable[[bytes], None], counts: Counts) -> None:
        self._collect = collect
        self._counts = counts

    def put(self, event: bytes) -> None:
        self._collect(event)
        self._counts.delivered += 1

    def delivered_until(self) -> float:
        return 0.0  # so that a quota counts down all that the test has used

    def flush(self, timeout: float | None = None) -> bool:  # noqa: ARG002
        return True

    def close(self, timeout: float | None = None) -> None:
        pass

    def release(self) -> None:
        pass


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

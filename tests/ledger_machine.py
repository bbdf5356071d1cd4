"""State machine of several workers: a quota is never exceeded, and fully served."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from ledger_contract import START, Clock
from openmeter_wsgi.quota.account import Reservation
from openmeter_wsgi.quota.ledger import Ledger
from openmeter_wsgi.quota.sqlite import SqliteStore
from openmeter_wsgi.quota.visibility_mark import Probes

#: Number of seconds after which an event counts as visible even if it is not listed.
MAX_LAG = 40.0
WORKERS = 3
#: Tolerance for rounding errors of floats.
NOTHING = 1e-6


class OpenMeter:
    """Model of OpenMeter: usage is visible *lag* seconds after its delivery."""

    def __init__(self, quota):
        self.quota = quota
        self.lag = 5.0
        self.accepted = {}  # id to the time at which it is visible, and its amount

    def accept(self, now, events, *, lost=()):
        for event_id, amount in events:
            # Events become visible in the order of arrival, even if the lag shrinks.
            last = max((at for at, _ in self.accepted.values()), default=0.0)
            if event_id not in lost:
                self.accepted[event_id] = (max(now + self.lag, last), amount)

    def listed(self, now, ids):
        return {one for one in ids if self.accepted.get(one, (now + 1,))[0] <= now}

    def balance(self, now):
        return self.quota - sum(a for at, a in self.accepted.values() if at <= now)


class Spool:
    """Model of the spool: the waiting events of all workers, and the probes."""

    def __init__(self, clock):
        self._clock = clock
        self.waiting = []  # (settled at, id, amount)
        self.probes = Probes(MAX_LAG, clock)

    def delivered_until(self):
        return min((at for at, *_ in self.waiting), default=self._clock.now)

    def look(self, openmeter):
        """Ask OpenMeter for the oldest probes, as the sender's thread does."""
        self.probes.close_group(self.delivered_until())
        ids = self.probes.oldest_unlisted(10)
        self.probes.note_listed(openmeter.listed(self._clock.now, ids))

    def new_sender(self):
        """Let another process continue as the sender."""
        state, self.probes = self.probes.state(), Probes(MAX_LAG, self._clock)
        self.probes.restore(state)


class Worker:
    def __init__(self, store, spool, clock):
        self.store = store
        self.ledger = Ledger(
            store, visible_until=lambda: spool.probes.visible_until, clock=clock
        )
        self.account = self.ledger.account("acme")
        self.in_flight = []


class Machine(RuleBasedStateMachine):
    """Several workers of one host, one customer, and a clock that the rules move."""

    #: Seconds between two checks at the end: some stores notice dead workers late.
    step = 0.5

    @initialize(quota=st.integers(0, 12), unit=st.sampled_from([1.0, 0.1, 7.0]))
    def begin(self, quota, unit):
        self.directory = Path(tempfile.mkdtemp())
        self.clock = Clock()
        self.unit = unit
        self.openmeter = OpenMeter(quota * unit)
        self.spool = Spool(self.clock)
        self.served = self.lost = 0.0
        self.ids = itertools.count()
        self.workers = [self.new_worker() for _ in range(WORKERS)]
        self.workers[0].account.answered(self.openmeter.quota, START)

    def new_store(self):
        return SqliteStore(self.directory, self.clock)

    def end(self, worker):
        """End a worker as kill -9 does."""
        worker.store._liveness.leave(worker.ledger._token)
        worker.store.close()

    def new_worker(self):
        return Worker(self.new_store(), self.spool, self.clock)

    @rule(who=st.integers(0, WORKERS - 1), units=st.integers(0, 8))
    def reserve(self, who, units):
        worker = self.workers[who]
        outcome = worker.account.reserve(units * self.unit)
        if isinstance(outcome, Reservation):
            worker.in_flight.append((outcome, units * self.unit))
        else:
            assert outcome.available < units * self.unit or not units

    @rule(who=st.integers(0, WORKERS - 1), used=st.booleans())
    def take_all(self, who, used):
        """Reserve until nothing is left, to find quota granted by mistake."""
        worker = self.workers[who]
        self.clock.now += 0.3  # a refusal is cached for a moment
        while isinstance(outcome := worker.account.reserve(self.unit), Reservation):
            worker.in_flight.append((outcome, self.unit))
            self.the_quota_holds()
        while used and worker.in_flight:
            self.settle(who, 1)

    @rule(who=st.integers(0, WORKERS - 1), share=st.sampled_from([0, 0.3, 1, 1]))
    def settle(self, who, share):
        worker = self.workers[who]
        if worker.in_flight:
            reservation, amount = worker.in_flight.pop(0)
            used = amount * share
            if used:  # the event is put before the reservation is settled
                event = self.clock.now, next(self.ids), used
                self.spool.waiting.append(event)
            reservation.settle(used)
            self.served += used

    @rule(seconds=st.sampled_from([0.1, 0.6, 1.0, 3.0, 7.0]))
    def time_goes(self, seconds):
        self.clock.now += seconds

    @rule(
        count=st.integers(1, 10),
        first=st.booleans(),
        loses=st.sampled_from([False, False, False, True]),
    )
    def deliver(self, count, first, loses):
        waiting = self.spool.waiting
        batch, rest = waiting[:count], waiting[count:]
        if not first:  # parts of a split batch, and held events, go out of order
            rest, batch = waiting[:-count], waiting[-count:]
        events = [(event_id, amount) for _, event_id, amount in batch]
        # OpenMeter may lose events that it answered with 204: the last two here.
        lost = {event_id for event_id, _ in events[-2:]} if loses else set()
        self.openmeter.accept(self.clock.now, events, lost=lost)
        self.lost += sum(amount for event_id, amount in events if event_id in lost)
        if events:
            self.spool.probes.add([event_id for event_id, _ in events])
        self.spool.waiting = rest

    @rule(lag=st.sampled_from([0.0, 2.0, 5.0, 30.0]))
    def the_lag_changes(self, lag):
        self.openmeter.lag = lag

    @rule()
    def look_at_the_list(self):
        self.spool.look(self.openmeter)

    @rule()
    def another_process_sends(self):
        self.spool.new_sender()

    @rule()
    def reset(self):
        """Reset the usage: neither visible nor waiting events count from now on."""
        self.openmeter.accepted = dict.fromkeys(
            self.openmeter.accepted, (self.clock.now + self.openmeter.lag, 0.0)
        )
        waiting = [(at, event_id, 0.0) for at, event_id, _ in self.spool.waiting]
        self.spool.waiting = waiting
        self.lost = self.served = 0.0

    @rule(who=st.integers(0, WORKERS - 1))
    def maintain(self, who):
        self.workers[who].ledger.maintain()

    @rule(
        who=st.integers(0, WORKERS - 1),
        on_the_way=st.sampled_from([0, 0, 0.5, 2]),
    )
    def ask(self, who, on_the_way):
        asked_at = self.clock.now
        balance = self.openmeter.balance(asked_at)
        self.clock.now += on_the_way
        self.workers[who].account.answered(balance, asked_at)

    @rule(who=st.integers(0, WORKERS - 1), in_the_middle=st.booleans())
    def crash(self, who, in_the_middle):
        """Kill a worker: its settled usage is in the spool, the rest is lost."""
        if in_the_middle:  # settled, but not yet written to the store
            self.reserve(who, 1)
            self.settle(who, 1)
        self.end(self.workers[who])
        self.workers[who] = self.new_worker()
        if in_the_middle:
            self.maintain((who + 1) % WORKERS)

    @precondition(lambda self: hasattr(self, "served"))
    @invariant()
    def the_quota_holds(self):
        in_flight = sum(a for w in self.workers for _, a in w.in_flight)
        # Lost usage is served a second time once it has been missing for long.
        allowed = self.openmeter.quota + self.lost
        assert self.served + in_flight <= allowed + NOTHING

    def everything_is_served_in_the_end(self):
        for worker in self.workers:
            while worker.in_flight:
                reservation, _ = worker.in_flight.pop()
                reservation.settle(0.0)
        events = [(event_id, amount) for _, event_id, amount in self.spool.waiting]
        self.openmeter.accept(self.clock.now, events)
        if events:
            self.spool.probes.add([event_id for event_id, _ in events])
        self.spool.waiting = []
        account = self.workers[-1].account
        account.reserve(0.0)  # accounts that nobody uses are not maintained
        for _ in range(45):
            self.clock.now += max(self.step, 2.0)
            self.spool.look(self.openmeter)
            for worker in self.workers:
                worker.ledger.maintain()
        account.answered(self.openmeter.balance(self.clock.now), self.clock.now)
        left = self.openmeter.balance(self.clock.now)
        if left > NOTHING:
            assert isinstance(account.reserve(left - NOTHING), Reservation)

    def teardown(self):
        if not hasattr(self, "workers"):
            return
        try:
            self.everything_is_served_in_the_end()
        finally:
            for worker in self.workers:
                worker.ledger.close()
                worker.store.close()
            shutil.rmtree(self.directory)


def machine_settings(examples):
    return settings(
        max_examples=int(os.environ.get("LEDGER_EXAMPLES", examples)),
        stateful_step_count=60,
        deadline=None,
    )

"""Whatever happens between answers, in whatever order: a quota holds, and is served."""

from __future__ import annotations

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
from openmeter_wsgi.quota.visibility import FixedLag

LAG = 5.0
WORKERS = 3
#: Floats.
NOTHING = 1e-6


class OpenMeter:
    """A toy of it: usage is in a balance when it was delivered LAG seconds ago."""

    def __init__(self, quota):
        self.quota = quota
        self.delivered = []  # (when, amount)

    def balance(self, now):
        seen = sum(amount for at, amount in self.delivered if at <= now - LAG)
        return self.quota - seen


class Spool:
    """What waits to be delivered, of all workers of the host."""

    def __init__(self, clock):
        self._clock = clock
        self.waiting = []  # (settled at, amount)

    def delivered_until(self):
        return min((at for at, _ in self.waiting), default=self._clock.now)


class Worker:
    def __init__(self, store, spool, clock):
        self.store = store
        visible = FixedLag(spool.delivered_until, LAG, clock)
        self.ledger = Ledger(store, visible_until=visible.until, clock=clock)
        self.account = self.ledger.account("acme")
        self.in_flight = []


class Machine(RuleBasedStateMachine):
    """Several workers of one host and one customer; time goes when a rule says so."""

    #: Seconds between two looks at the end; some stores find out late who is dead.
    step = 0.5

    @initialize(quota=st.integers(0, 12), unit=st.sampled_from([1.0, 0.1, 7.0]))
    def begin(self, quota, unit):
        self.directory = Path(tempfile.mkdtemp())
        self.clock = Clock()
        self.unit = unit
        self.openmeter = OpenMeter(quota * unit)
        self.spool = Spool(self.clock)
        self.served = 0.0
        self.workers = [self.new_worker() for _ in range(WORKERS)]
        self.workers[0].account.answered(self.openmeter.quota, START)

    def new_store(self):
        return SqliteStore(self.directory, self.clock)

    def end(self, worker):
        """End a worker as kill -9 does."""
        worker.store._present.leave(worker.ledger._token)
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
        """The greediest of customers: whatever is granted too much shows."""
        worker = self.workers[who]
        self.clock.now += 0.3  # a refusal is believed for a moment
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
            if used:  # the event is put first, and has the earlier time
                self.spool.waiting.append((self.clock.now, used))
            reservation.settle(used)
            self.served += used

    @rule(seconds=st.sampled_from([0.1, 0.6, 1.0, 3.0, 7.0]))
    def time_goes(self, seconds):
        self.clock.now += seconds

    @rule(count=st.integers(1, 10), first=st.booleans())
    def deliver(self, count, first):
        waiting = self.spool.waiting
        batch, rest = waiting[:count], waiting[count:]
        if not first:  # what was split, or stood aside, goes out of order
            rest, batch = waiting[:-count], waiting[-count:]
        self.openmeter.delivered += [(self.clock.now, amount) for _, amount in batch]
        self.spool.waiting = rest

    @rule(who=st.integers(0, WORKERS - 1))
    def tend(self, who):
        self.workers[who].ledger.tend()

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
        """What was settled is in the spool; what was in flight is never settled."""
        if in_the_middle:  # settled, and not handed in
            self.reserve(who, 1)
            self.settle(who, 1)
        self.end(self.workers[who])
        self.workers[who] = self.new_worker()
        if in_the_middle:
            self.tend((who + 1) % WORKERS)

    @precondition(lambda self: hasattr(self, "served"))
    @invariant()
    def the_quota_holds(self):
        in_flight = sum(a for w in self.workers for _, a in w.in_flight)
        assert self.served + in_flight <= self.openmeter.quota + NOTHING

    def everything_is_served_in_the_end(self):
        for worker in self.workers:
            while worker.in_flight:
                reservation, _ = worker.in_flight.pop()
                reservation.settle(0.0)
        self.openmeter.delivered += [(self.clock.now, a) for _, a in self.spool.waiting]
        self.spool.waiting = []
        account = self.workers[-1].account
        account.reserve(0.0)  # somebody is there: else nobody tends
        for _ in range(25):
            self.clock.now += self.step
            for worker in self.workers:
                worker.ledger.tend()
        account.answered(self.openmeter.balance(self.clock.now), self.clock.now)
        left = self.openmeter.quota - self.served
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

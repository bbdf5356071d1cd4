"""The ledger on the stores that need no server."""

from __future__ import annotations

import threading
import time

import pytest

from ledger_contract import START, Clock, LedgerContract
from ledger_machine import Machine, machine_settings
from openmeter_wsgi.quota.account import Account, NotReserved
from openmeter_wsgi.quota.ledger import CLOSE_TIMEOUT, Ledger, LocalQuota
from openmeter_wsgi.quota.sqlite import SqliteStore
from openmeter_wsgi.quota.store import Lessee
from servers import TIMEOUT


def _crash(ledger):
    """End a ledger as kill -9 ends its process: nothing is handed in."""
    ledger._store._liveness.leave(ledger._token)
    ledger._lessee = None


class TestProcessStore(LedgerContract):
    shares_answers = False

    @pytest.fixture
    def new_store(self, clock):
        store = SqliteStore(clock=clock)
        yield lambda: store
        store.close()

    @pytest.fixture
    def crash(self):
        return _crash


class TestHostStore(LedgerContract):
    @pytest.fixture
    def new_store(self, clock, tmp_path):
        stores = []

        def new():
            stores.append(SqliteStore(tmp_path, clock))
            return stores[-1]

        yield new
        for store in stores:
            store.close()

    @pytest.fixture
    def crash(self):
        return _crash


def test_what_is_left_is_known_also_while_the_store_is_asked():
    """A request that reads the ledger during an exchange gets the same result."""
    store, clock, seen = SqliteStore(), Clock(), []

    def exchange(requests):
        seen.append(account.available())
        if away.is_set():
            raise ConnectionError
        return store.exchange(Lessee("0" * 24, "spool"), requests, clock.now)

    away = threading.Event()
    account = Account("acme", exchange, visible_until=float, clock=clock)
    account.answered(100.0, START)
    account.reserve(10.0).settle(4.0)
    account.spend(30.0)
    del seen[:]

    for change in (away.set, away.clear, away.clear):
        clock.now += 1
        account.answered(100.0, clock.now)

        assert account.available() == 66.0
        change()
    assert seen == [66.0] * 3
    store.close()


def test_a_store_in_memory_waits_for_a_slow_thread(monkeypatch):
    """There is no other store that could take its place."""
    monkeypatch.setattr("openmeter_wsgi.quota.sqlite.STORE_TIMEOUT", 0.0)
    store, waits = SqliteStore(), threading.Event()
    lock = store._database._lock

    class Watched:
        release = lock.release

        def acquire(self, timeout):
            waits.set()
            return lock.acquire(timeout=timeout)

    taken = []
    thread = threading.Thread(target=lambda: taken.append(store.take_token(10.0)))
    with lock:
        store._database._lock = Watched()
        thread.start()
        assert waits.wait(TIMEOUT)
    thread.join(TIMEOUT)
    assert taken == [0.0]
    store._database._lock = lock
    store.close()


def test_closing_waits_for_the_exchange_that_the_thread_makes(tmp_path, monkeypatch):
    """Or else the lease would count as usage: the account is locked."""
    store, other = SqliteStore(tmp_path), SqliteStore(tmp_path)
    entered, goes_on = threading.Event(), threading.Event()

    def check_lessees(lessee, now):
        account = ledger.account("acme\0searches")
        pending = account.try_begin_exchange()
        entered.set()
        assert goes_on.wait(TIMEOUT)
        account.undo_exchange(pending)
        account.unlock()

    monkeypatch.setattr(store, "check_lessees", check_lessees)
    ledger = Ledger(store, origin="spool", visible_until=time.time)
    quota = LocalQuota(ledger, {"searches": None})
    quota.answered("acme", "searches", 1_000.0, time.time())
    quota.reserve("acme", "searches", 10.0).settle(4.0)
    assert entered.wait(TIMEOUT)

    join = quota._thread.join
    monkeypatch.setattr(
        quota._thread, "join", lambda timeout: (goes_on.set(), join(timeout))
    )
    monkeypatch.setattr("openmeter_wsgi.quota.ledger.CLOSE_TIMEOUT", TIMEOUT)
    quota.close()
    goes_on.set()

    later = Ledger(other, origin="spool", visible_until=time.time)
    refusal = later.account("acme\0searches").reserve(1_000.0)
    assert refusal == NotReserved(held_back=False, available=996.0)
    later.close()
    for each in (store, other):
        each.close()


@pytest.mark.parametrize(
    ("timeout", "limit"), [(None, CLOSE_TIMEOUT), (60.0, CLOSE_TIMEOUT), (0.0, 0.0)]
)
def test_closing_is_bounded_by_its_own_limit_and_by_the_caller(
    timeout, limit, monkeypatch
):
    ledger = Ledger(SqliteStore(), visible_until=time.time)
    quota = LocalQuota(ledger, {"searches": None})
    quota.answered("acme", "searches", 10.0, time.time())
    close, limits = ledger.close, []
    monkeypatch.setattr(ledger, "close", limits.append)

    quota.close(timeout)

    assert 0.0 <= limits[0] <= limit
    close()
    ledger._store.close()


TestLedgerMachine = Machine.TestCase
TestLedgerMachine.settings = machine_settings(40)

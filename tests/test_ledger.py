"""The ledger on the stores that need no server."""

from __future__ import annotations

import threading

import pytest

from ledger_contract import START, Clock, LedgerContract
from ledger_machine import Machine, machine_settings
from openmeter_wsgi.quota.account import Account
from openmeter_wsgi.quota.sqlite import SqliteStore
from openmeter_wsgi.quota.store import Lessee


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


TestLedgerMachine = Machine.TestCase
TestLedgerMachine.settings = machine_settings(40)

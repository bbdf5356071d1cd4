"""The ledger on the stores that need no server."""

from __future__ import annotations

import pytest

from ledger_contract import LedgerContract
from ledger_machine import Machine, machine_settings
from openmeter_wsgi.ledger.sqlite import SqliteStore


def _crash(ledger):
    """End a ledger as kill -9 ends its process: nothing is handed in."""
    ledger._store._present.leave(ledger._token)
    ledger._known = None


class TestProcessStore(LedgerContract):
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


TestLedgerMachine = Machine.TestCase
TestLedgerMachine.settings = machine_settings(40)

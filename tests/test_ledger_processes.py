"""The ledger between real processes, their deaths, and files that are no ledger."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ledger_contract import end
from openmeter_wsgi.quota.account import NotReserved, Reservation
from openmeter_wsgi.quota.fallback_store import open_store
from openmeter_wsgi.quota.ledger import Ledger
from openmeter_wsgi.quota.sqlite import Database, SqliteStore, database_name
from openmeter_wsgi.quota.store import STORE_TIMEOUT
from spooling import Process, until

DATABASE_NAME = database_name("")

QUOTA = 1_000
PROCESSES, THREADS = 4, 8
#: Seconds.
VISIBILITY_LAG = 1.0
#: Maximum number of seconds of a step, also on a slow machine.
LONG = 30.0

HAMMER = """
import json, random, sys, threading, time
from urllib.request import urlopen
from openmeter_wsgi.quota.ledger import Ledger
from openmeter_wsgi.quota.account import NotReserved
from openmeter_wsgi.quota.fallback_store import open_store
from openmeter_wsgi.quota.visibility_mark import FixedLag

directory, url, threads, lag = sys.argv[1:]
lock = threading.Lock()
undelivered, served, open_ = [], 0, True

def delivered_until():
    with lock:
        return min(undelivered, default=time.time())

def deliver():
    while True:
        with lock:
            batch = undelivered[:50]
        if batch:
            urlopen(url, data=json.dumps(batch).encode()).read()
            with lock:
                del undelivered[:len(batch)]
        time.sleep(random.random() / 5)

visible = FixedLag(delivered_until, float(lag))
ledger = Ledger(open_store(directory), origin=None, visible_until=visible.until)
ledger._origin = ledger._token  # each delivers its own usage
account = ledger.account("acme")

def ask():
    asked_at = time.time()
    account.answered(json.load(urlopen(url)), asked_at)

def maintain():
    while True:
        time.sleep(0.1)
        ledger.maintain()

def refresh():
    while True:
        ask()
        time.sleep(0.3)

def work():
    global served
    while open_:
        outcome = account.reserve(1.0)
        if isinstance(outcome, NotReserved):
            time.sleep(0.02)
            continue
        time.sleep(random.random() / 100)
        with lock:
            served += 1
            undelivered.append(time.time())
        outcome.settle(1.0)

ask()
for background in (deliver, maintain, refresh):
    threading.Thread(target=background, daemon=True).start()
workers = [threading.Thread(target=work) for _ in range(int(threads))]
for worker in workers:
    worker.start()
print("works", flush=True)
sys.stdin.readline()
open_ = False
for worker in workers:
    worker.join()
print(served, flush=True)
ledger.close()
"""

HOLDING = """
import sys, time
from openmeter_wsgi.quota.ledger import Ledger
from openmeter_wsgi.quota.fallback_store import open_store

ledger = Ledger(open_store(sys.argv[1]), visible_until=time.time)
account = ledger.account("acme")
account.answered(100.0, time.time())
account.reserve(60.0)
print("holds", flush=True)
sys.stdin.read()
"""

OPENING = """
import logging, sys, time
from openmeter_wsgi.quota.ledger import Ledger
from openmeter_wsgi.quota.fallback_store import open_store

logging.basicConfig(stream=sys.stdout, format="%(message)s")
store = open_store(sys.argv[1])
print("is there", flush=True)
sys.stdin.readline()
print(store.origin, flush=True)
"""

LOCKING = """
import sqlite3, sys

db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""


class Balances(ThreadingHTTPServer):
    """Model of OpenMeter: posted usage is in the balance some time later."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.arrived = []
        self.asked = 0

    def balance(self):
        now = time.time()
        return QUOTA - sum(at <= now - VISIBILITY_LAG for at in list(self.arrived))

    def __enter__(self):
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Balances

    def do_GET(self):
        self.server.asked += 1
        self._answer(json.dumps(self.server.balance()).encode())

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        now = time.time()
        self.server.arrived += [now for _ in json.loads(body)]
        self._answer(b"")

    def _answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.mark.load
def test_processes_and_threads_serve_the_quota_and_not_more(tmp_path):
    with Balances() as openmeter:
        arguments = str(tmp_path), openmeter.url, str(THREADS), str(VISIBILITY_LAG)
        workers = [Process(HAMMER, *arguments) for _ in range(PROCESSES)]
        assert [worker.line() for worker in workers] == ["works"] * PROCESSES
        until(lambda: len(openmeter.arrived) >= QUOTA, 40)
        until(lambda: openmeter.balance() <= 0)
        # Many more answers come, so that a worker could serve too much.
        asked = openmeter.asked
        until(lambda: openmeter.asked > asked + 12 * PROCESSES)
        for worker in workers:
            worker.process.stdin.write(b"\n")
            worker.process.stdin.flush()
        served = sum(int(worker.line()) for worker in workers)
        assert [worker.end() for worker in workers] == [0] * PROCESSES
    assert QUOTA <= served <= QUOTA + PROCESSES * THREADS


def new_ledger(directory):
    return Ledger(open_store(directory), visible_until=time.time)


def test_what_a_killed_process_held_comes_back(tmp_path):
    ledger = new_ledger(tmp_path)
    account = ledger.account("acme")
    with Process(HOLDING, str(tmp_path)) as process:
        assert process.line() == "holds"
        assert account.reserve(100.0).held_back
        process.kill()

    def comes_back():
        ledger.maintain()
        account.answered(100.0, time.time())
        return isinstance(account.reserve(100.0), Reservation)

    until(comes_back)
    end(ledger)
    assert not list(tmp_path.glob("*.lock"))


def test_a_forked_child_leaves_its_parents_ledger_alone(tmp_path):
    ledger = new_ledger(tmp_path)
    account = ledger.account("acme")
    account.answered(100.0, time.time())
    account.reserve(60.0)
    pid = os.fork()
    if not pid:
        ledger.maintain()
        end(ledger)
        mine = new_ledger(tmp_path)
        refused = isinstance(mine.account("acme").reserve(50.0), NotReserved)
        granted = isinstance(mine.account("acme").reserve(10.0), Reservation)
        mine.close()
        os._exit(0 if refused and granted else 1)
    assert os.waitpid(pid, 0)[1] == 0
    ledger.maintain()
    assert isinstance(account.reserve(31.0), NotReserved)
    assert isinstance(account.reserve(30.0), Reservation)
    end(ledger)


def test_a_store_is_used_by_a_child_as_by_another_process(tmp_path):
    store = SqliteStore(tmp_path, clock=lambda: 1_000.0)  # that refills nothing
    assert store.take_token(10.0) == 0.0
    pid = os.fork()
    if not pid:
        took = [store.take_token(10.0, reserve=0.0) for _ in range(9)]
        os._exit(0 if took == [0.0] * 9 else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert store.take_token(10.0) > 0
    store.close()


def test_many_that_open_a_new_store_at_once_all_meet_there(tmp_path):
    workers = [Process(OPENING, str(tmp_path)) for _ in range(8)]
    assert {worker.line() for worker in workers} == {"is there"}
    for worker in workers:
        worker.process.stdin.write(b"\n")
        worker.process.stdin.flush()
    (name,) = {worker.line() for worker in workers}
    assert len(name) == 24
    assert [worker.end() for worker in workers] == [0] * 8


# -- Files that are no ledger


def served(directory, times=3):
    """Count down a quota, and say how long the slowest step took."""
    ledger = new_ledger(directory)
    account = ledger.account("acme")
    slowest = 0.0
    account.answered(10.0, time.time())
    for _ in range(times):
        began = time.monotonic()
        assert isinstance(account.reserve(1.0), Reservation)
        ledger.maintain()
        slowest = max(slowest, time.monotonic() - began)
    assert isinstance(account.reserve(11.0 - times), NotReserved)
    end(ledger)
    return slowest


@pytest.mark.parametrize(
    "content",
    [
        b"this is no database",
        b"SQLite format 3\0" + bytes(4_080),
        b"SQLite format 3\0" + os.urandom(8_000),
    ],
    ids=["text", "zeros", "noise"],
)
def test_a_file_that_cannot_be_read_is_set_aside(tmp_path, content, caplog):
    (tmp_path / DATABASE_NAME).write_bytes(content)
    served(tmp_path)
    assert (tmp_path / f"{DATABASE_NAME}.unreadable").read_bytes()[:16] == content[:16]
    assert "a new one is created" in caplog.text
    with sqlite3.connect(tmp_path / DATABASE_NAME) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()


def test_a_file_of_another_version_is_set_aside(tmp_path):
    with sqlite3.connect(tmp_path / DATABASE_NAME) as db:
        db.execute("CREATE TABLE accounts (something TEXT)")
        db.execute("PRAGMA user_version = 77")
    db.close()
    served(tmp_path)
    assert (tmp_path / f"{DATABASE_NAME}.unreadable").exists()


def test_a_file_that_is_damaged_while_it_is_used_is_replaced(tmp_path, caplog):
    ledger = new_ledger(tmp_path)
    account = ledger.account("acme")
    account.answered(100.0, time.time())
    account.reserve(50.0).settle(50.0)
    account.reserve(20.0).settle(20.0)
    with sqlite3.connect(tmp_path / DATABASE_NAME) as db:
        for table in ("accounts", "spent", "leases"):
            db.execute(f"DROP TABLE {table}")
    db.close()
    # The new file gets the usage of this process.
    assert isinstance(account.reserve(31.0), NotReserved)
    assert isinstance(account.reserve(30.0), Reservation)
    assert "a new one is created" in caplog.text
    end(ledger)


def test_a_deleted_file_is_made_anew_and_all_meet_there(tmp_path):
    ours, others = new_ledger(tmp_path), new_ledger(tmp_path)
    for ledger in (ours, others):
        ledger.account("acme").answered(100.0, time.time())
    ours.account("acme").reserve(50.0).settle(50.0)
    for path in tmp_path.glob(f"{DATABASE_NAME}*"):
        path.unlink()
    for ledger in (ours, others):
        ledger.maintain()
    ours.account("acme").reserve(20.0).settle(20.0)
    assert isinstance(others.account("acme").reserve(31.0), NotReserved)
    for ledger in (ours, others):
        end(ledger)


def test_a_locked_database_costs_a_moment_and_only_once(tmp_path, caplog):
    served(tmp_path)
    began = time.monotonic()
    with Process(LOCKING, str(tmp_path / DATABASE_NAME)) as process:
        assert process.line() == "locked"
        ledger = new_ledger(tmp_path)
        account = ledger.account("another")
        began = time.monotonic()
        account.answered(10.0, time.time())
        assert isinstance(account.reserve(1.0), Reservation)
        for _ in range(400):
            ledger.account("other").reserve(1.0)
        # Half of the time that it would take if each request waited for the store.
        assert time.monotonic() - began < 200 * STORE_TIMEOUT
        assert "may be overshot" in caplog.text
    until(lambda: ledger.maintain() or "counted here again" in caplog.text)
    # The store gets the usage of the time without it.
    assert account.reserve(10.0).available == 9.0
    end(ledger)


@pytest.fixture
def store_was_busy(monkeypatch):
    """An event that is set when a transaction has waited `STORE_TIMEOUT` in vain."""
    event, transaction = threading.Event(), Database._transaction

    def watched(self, *arguments, **options):
        try:
            return transaction(self, *arguments, **options)
        except sqlite3.OperationalError:
            event.set()
            raise

    monkeypatch.setattr(Database, "_transaction", watched)
    return event


def used_ledger(directory):
    """Return a ledger that has used 4 of a balance of 100."""
    ledger = new_ledger(directory)
    account = ledger.account("acme")
    account.answered(100.0, time.time())
    account.reserve(10.0).settle(4.0)
    return ledger


def assert_handed_in(closed, directory):
    """Assert that the store has the usage of a used ledger, and no lease of it."""
    other = new_ledger(directory)
    refusal = other.account("acme").reserve(100.0)
    assert refusal == NotReserved(held_back=False, available=96.0)
    end(other)
    closed._store.close()


def test_closing_waits_longer_for_a_locked_store_than_a_request(
    tmp_path, store_was_busy, caplog
):
    ledger = used_ledger(tmp_path)
    with Process(LOCKING, str(tmp_path / DATABASE_NAME)) as process:
        assert process.line() == "locked"
        closing = threading.Thread(target=ledger.close, args=(LONG,))
        closing.start()
        assert store_was_busy.wait(LONG)
        process.end()
        closing.join(LONG)
    assert not caplog.text
    assert_handed_in(ledger, tmp_path)


def test_closing_retries_a_store_that_was_locked_just_before(tmp_path, caplog):
    ledger = used_ledger(tmp_path)
    with Process(LOCKING, str(tmp_path / DATABASE_NAME)) as process:
        assert process.line() == "locked"
        ledger.maintain()
        assert "may be overshot" in caplog.text
        process.end()
    ledger.close(LONG)
    assert_handed_in(ledger, tmp_path)


def test_closing_gives_a_locked_store_up_in_time(tmp_path, caplog):
    ledger = used_ledger(tmp_path)
    with Process(LOCKING, str(tmp_path / DATABASE_NAME)) as process:
        assert process.line() == "locked"
        ledger.close(2 * STORE_TIMEOUT)
    assert "database is locked" in caplog.text
    ledger._store.close()


def test_a_directory_that_takes_nothing_is_done_without(tmp_path, caplog):
    assert served(tmp_path / "is" / "not" / "there") < LONG
    assert "may be overshot" in caplog.text


def test_a_place_that_cannot_be_written_to_is_done_without(tmp_path, caplog):
    """A directory in place of the file cannot be written to even by root."""
    (tmp_path / DATABASE_NAME).mkdir()
    assert served(tmp_path) < LONG
    assert "may be overshot" in caplog.text


def test_the_file_is_for_its_owner_alone(tmp_path):
    ledger = new_ledger(tmp_path)
    ledger.account("acme").answered(1.0, time.time())
    made = [path for path in tmp_path.iterdir() if path.name.startswith(DATABASE_NAME)]
    assert {path.stat().st_mode & 0o777 for path in made} == {0o600}
    assert len(made) == 3
    end(ledger)


def test_a_key_may_hold_what_no_database_takes_as_text(tmp_path, caplog):
    ledger = new_ledger(tmp_path)
    account = ledger.account("a\0\udcff\n\U0001f600")
    account.answered(1.0, time.time())
    assert isinstance(account.reserve(1.0), Reservation)
    assert isinstance(account.reserve(1.0), NotReserved)
    assert not caplog.text
    end(ledger)


def test_long_gone_accounts_are_forgotten(tmp_path):
    now = 1_000_000.0
    store = SqliteStore(tmp_path)
    ledger = Ledger(store, visible_until=lambda: now, clock=lambda: now, max_accounts=1)
    for n in range(3):
        ledger.account(f"old-{n}").answered(10.0, now)
        ledger.account(f"old-{n}").spend(1.0)
    ledger.maintain()
    for name in ("new", "newer"):
        now += 2 * 3_600
        ledger.account(name).answered(10.0, now)
        ledger.maintain()
    with sqlite3.connect(tmp_path / DATABASE_NAME) as db:
        keys = {key for (key,) in db.execute("SELECT key FROM accounts")}
        assert keys == {"new", "newer"}
        assert db.execute("SELECT * FROM spent").fetchall() == []
    db.close()
    end(ledger)
    store.close()

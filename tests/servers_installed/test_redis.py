"""The ledger on a real Redis."""

from __future__ import annotations

import signal
import socket
import subprocess
import time

import pytest
import redis
from hypothesis.stateful import run_state_machine_as_test

from ledger_contract import START, LedgerContract, end
from ledger_machine import Machine, machine_settings
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.quota.account import NotReserved, Reservation
from openmeter_wsgi.quota.fallback_store import open_store
from openmeter_wsgi.quota.ledger import Ledger
from openmeter_wsgi.quota.redis import LESSEE_TTL, ORIGIN_TTL, RedisStore
from openmeter_wsgi.quota.store import STORE_TIMEOUT
from openmeter_wsgi.quota.visibility_mark import FixedLag
from spooling import until

#: Maximum number of seconds of a step, also on a slow machine.
LONG = 30.0


class Redis:
    """A Redis server for one test, on 127.0.0.1."""

    def __init__(self, directory):
        self._directory = directory
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self):
        self._process = subprocess.Popen(
            [
                "/usr/bin/redis-server", "--port", str(self.port), "--save", "",
                "--bind", "127.0.0.1", "--dir", str(self._directory),
            ],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        until(self._answers)

    def _answers(self):
        with redis.Redis.from_url(self.url) as client:
            try:
                return client.ping()
            except redis.ConnectionError:
                return False

    def stop(self):
        with self._process:
            self._process.kill()

    def pause(self):
        self._process.send_signal(signal.SIGSTOP)

    def resume(self):
        self._process.send_signal(signal.SIGCONT)

    def keys(self):
        with redis.Redis.from_url(self.url, decode_responses=True) as client:
            return {key: client.ttl(key) for key in client.scan_iter()}

    def flush(self):
        with redis.Redis.from_url(self.url) as client:
            client.flushall()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def _empty(server):
    server.flush()


class TestRedisStore(LedgerContract):
    @pytest.fixture
    def new_store(self, clock, server):
        stores = []

        def new():
            stores.append(RedisStore(server.url, redis_clock=clock))
            return stores[-1]

        yield new
        for store in stores:
            store.close()

    @pytest.fixture
    def crash(self, clock):
        def crash(ledger):
            """Let the lease of a ledger expire, while the others renew theirs."""
            ledger._lessee = None
            clock.now += LESSEE_TTL + 1

        return crash

    def test_a_host_that_is_never_heard_of_again_is_not_waited_for(
        self, new_ledger, clock
    ):
        never = 0.0
        gone = new_ledger(origin="host-1", delivered_until=lambda: never)
        here = new_ledger(origin="host-2")
        account = gone.account("acme")
        account.answered(10.0, START)
        account.reserve(10.0).settle(10.0)
        clock.now += 1
        gone.maintain()
        other = here.account("acme")
        clock.now += 60
        here.maintain()
        other.answered(10.0, clock.now)
        assert isinstance(other.reserve(1.0), NotReserved)
        gone._lessee = None
        clock.now += ORIGIN_TTL + 60
        here.maintain()
        other.answered(10.0, clock.now)
        assert isinstance(other.reserve(10.0), Reservation)

    def test_a_process_that_was_given_up_and_is_back_is_believed(
        self, new_ledger, clock
    ):
        ours, others = new_ledger(delivered_until=lambda: START), new_ledger()
        ours._origin = ours._token
        account = ours.account("acme")
        account.answered(10.0, START)
        account.reserve(10.0)
        clock.now += LESSEE_TTL + 1
        others.account("acme").available()
        others.account("other").reserve(0.0)
        others.maintain()
        clock.now += 1
        account.spend(10.0)
        for _ in range(20):
            clock.now += 1
            ours.maintain()
            others.maintain()
        account.answered(10.0, clock.now)
        assert isinstance(account.reserve(1.0), NotReserved)  # it is not delivered

    def test_all_keys_share_one_hash_tag_and_those_of_accounts_expire(
        self, new_ledger, server
    ):
        account = new_ledger().account("acme")
        account.answered(1_000.0, START)
        account.reserve(1.0).settle(1.0)
        account.reserve(500.0)
        kept = server.keys()
        assert all(key.startswith("{openmeter_wsgi:}:") for key in kept)
        accounts = [key for key in kept if "acme" in key]
        assert len(accounts) == 3
        assert all(kept[key] > 0 for key in accounts)


class RedisMachine(Machine):
    """Workers with a store in Redis: a dead one is noticed when its lease expires."""

    step = LESSEE_TTL / 20
    url = ""

    def new_store(self):
        return RedisStore(self.url, redis_clock=self.clock)

    def end(self, worker):
        worker.store.close()


@pytest.mark.timeout(200)
def test_whatever_happens_a_quota_in_redis_holds_and_is_served(server):
    class OnServer(RedisMachine):
        url = server.url

        def __init__(self):
            super().__init__()
            server.flush()

    run_state_machine_as_test(OnServer, settings=machine_settings(25))


def test_while_redis_is_away_the_spools_store_stands_in(server, tmp_path, caplog):
    ledger = Ledger(open_store(tmp_path, server.url), visible_until=time.time)
    account = ledger.account("acme")
    account.answered(100.0, time.time())
    account.reserve(40.0).settle(40.0)
    server.stop()
    began = time.monotonic()
    outcome = account.reserve(50.0)
    assert time.monotonic() - began < LONG
    assert isinstance(outcome, Reservation)
    assert isinstance(account.reserve(20.0), NotReserved)  # the 40 still count
    assert "Redis at 127.0.0.1" in caplog.text
    outcome.settle(50.0)

    server.start()  # with empty memory
    ledger.maintain()
    until(lambda: ledger.maintain() or "counted here again" in caplog.text)
    assert isinstance(account.reserve(20.0), NotReserved)  # Redis has the 90
    assert isinstance(account.reserve(10.0), Reservation)
    end(ledger)


def test_a_redis_that_hangs_costs_a_request_a_moment_and_only_once(server, caplog):
    ledger = Ledger(open_store(redis_url=server.url), visible_until=time.time)
    account = ledger.account("acme")
    account.answered(100.0, time.time())
    server.pause()
    try:
        began = time.monotonic()
        assert isinstance(account.reserve(100.0), Reservation)
        assert time.monotonic() - began < LONG
        began = time.monotonic()
        for _ in range(100):
            ledger.account("other").reserve(1.0)
        # Half of the time that it would take if each request waited for the store.
        assert time.monotonic() - began < 50 * STORE_TIMEOUT
    finally:
        server.resume()
    end(ledger)


def test_a_redis_that_comes_back_is_told_of_leases_that_are_none_any_more(server):
    ledgers = [
        Ledger(open_store(redis_url=server.url), visible_until=time.time)
        for _ in range(2)
    ]
    ours, others = ledgers
    account = ours.account("acme")
    account.answered(100.0, time.time())
    reservation = account.reserve(100.0)
    server.pause()
    try:
        account.reserve(1.0)  # falls back
        reservation.settle(0.0)
        until(lambda: ours.maintain() or not account.lease.free)  # and gives back there
    finally:
        server.resume()

    def come_back():
        ours.maintain()
        return isinstance(others.account("acme").reserve(90.0), Reservation)

    until(come_back)
    for ledger in ledgers:
        end(ledger)


def test_a_password_is_not_logged(caplog):
    ledger = Ledger(
        open_store(redis_url="redis://:hunter2@127.0.0.1:1/0"),
        visible_until=time.time,
    )
    assert isinstance(ledger.account("acme").reserve(1.0), Reservation)
    assert "127.0.0.1" in caplog.text
    assert "hunter2" not in caplog.text
    end(ledger)


def test_a_url_of_something_else_is_a_configuration_error():
    with pytest.raises(ConfigError, match="redis_url"):
        open_store(redis_url="http://127.0.0.1")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://:hunter2@127.0.0.1/0?socket_timeout=60", "got 'socket_timeout'"),
        ("redis://:hunter2@127.0.0.1/0?decode_responses=no", "got 'decode_responses'"),
        ("redis://:hunter2@127.0.0.1/0?timout=1", "got 'timout'"),
        ("redis://:hunter2@127.0.0.1/first", "the number of a database, got 'first'"),
        ("redis://:hunter2@127.0.0.1/0?db=first", "the URL cannot be used"),
        ("redis://:hunter2@127.0.0.1/0?ssl_cert_reqs=none", "the URL cannot be used"),
    ],
)
def test_an_option_that_cannot_work_is_refused_at_start(url, message):
    with pytest.raises(ConfigError) as caught:
        open_store(redis_url=url)

    assert message in str(caught.value)
    assert "redis_url" in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    ["", "?client_name=api&health_check_interval=30", "?socket_keepalive=yes&db=1"],
)
def test_an_option_that_works_is_taken(server, options):
    store = RedisStore(server.url.removesuffix("/0") + options)
    assert store.take_token(10.0) == 0.0
    store.close()


# -- Clocks, and several servers on one Redis


class Host:
    """A ledger on a host whose clock is *ahead* seconds ahead."""

    def __init__(self, url, ahead, openmeter):
        self.clock = lambda: time.time() + ahead
        self.openmeter = openmeter
        self.ledger = Ledger(
            RedisStore(url, clock=self.clock),
            # Usage is delivered at once.
            visible_until=FixedLag(self.clock, 0.4, self.clock).until,
            clock=self.clock,
        )
        self.account = self.ledger.account("acme")

    def ask(self):
        asked_at = self.clock()
        self.account.answered(self.openmeter.balance(), asked_at)

    def serve(self):
        """Serve one request if it is allowed."""
        outcome = self.account.reserve(1.0)
        if isinstance(outcome, NotReserved):
            return outcome
        self.openmeter.used_at.append(time.monotonic())
        outcome.settle(1.0)
        return None


class Lagging:
    """Model of OpenMeter: usage is visible 0.2 seconds after its arrival."""

    def __init__(self, quota):
        self.quota = quota
        self.used_at = []

    def balance(self):
        now = time.monotonic()
        return float(self.quota - sum(at <= now - 0.2 for at in self.used_at))


@pytest.mark.parametrize("ahead", [180.0, 8.0, 0.0, -8.0, -180.0])
def test_two_hosts_whose_clocks_differ_serve_the_whole_quota(server, ahead, caplog):
    openmeter = Lagging(500)
    hosts = [Host(server.url, difference, openmeter) for difference in (0.0, ahead)]
    for host in hosts:
        host.ask()

    def is_used_up():
        refused = [host.serve() for host in hosts]
        for host in hosts:
            host.ledger.maintain()
        if None not in refused:
            for host in hosts:
                host.ask()
        return None not in refused and openmeter.balance() <= 0

    until(is_used_up)

    assert len(openmeter.used_at) == 500
    lines = [r.getMessage() for r in caplog.records if "clock" in r.getMessage()]
    assert len(lines) == (ahead != 0.0)
    for host in hosts:
        end(host.ledger)


def test_two_servers_on_one_redis_do_not_see_each_others_leases(server):
    stores = [
        RedisStore(server.url, scope=lambda name=name: name)
        for name in ("live", "test")
    ]
    live, test = (Ledger(store, visible_until=time.time) for store in stores)
    for ledger in (live, test):
        ledger.account("acme").answered(10.0, time.time())

    assert isinstance(test.account("acme").reserve(10.0), Reservation)
    assert isinstance(live.account("acme").reserve(10.0), Reservation)
    assert isinstance(live.account("acme").reserve(1.0), NotReserved)
    while stores[0].take_token(1.0) == 0.0:
        pass
    assert stores[1].take_token(1.0) == 0.0
    for ledger in (live, test):
        end(ledger)

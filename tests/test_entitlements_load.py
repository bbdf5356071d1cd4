"""Entitlements when much happens at once: crowds, outages, forks, the end.

What forks or ends is a function that runs in an interpreter of its own.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import overshoot
from entitling import ask, sandbox_with_meter
from openmeter_wsgi import OpenMeterMiddleware
from openmeter_wsgi.quota.sqlite import DATABASE_NAME, SqliteStore
from openmeter_wsgi.quota.store import LeaseRequest, Lessee, StoreAway
from servers import GTHREAD, Consumer, Server, make_environ
from spooling import threads, until
from test_entitlements import ok
from test_fork import (
    FORKS,
    LATER,
    finish,
    start_code,
    wait_for,
    wait_until_threads_sleep,
)

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator

    from openmeter_wsgi.sandbox import Sandbox

THREADS = 64
REQUESTS = 10_000


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with sandbox_with_meter("api_requests") as sandbox:
        yield sandbox


def limited(url: str, **options: Any) -> OpenMeterMiddleware:
    """An application that counts a quota down."""
    usual: dict[str, Any] = {
        "meters": {"api_requests": 1},
        "required_entitlements": ["api_requests"],
        "entitlement_meters": ["api_requests"],
        "flush_interval": LATER,
        "shutdown_timeout": 0,
        # No test fails because the machine is busy.
        "entitlement_timeout": 30,
    }
    return OpenMeterMiddleware(ok, api_url=url, **{**usual, **options})


def statuses(app: OpenMeterMiddleware, requests: int, subject: str = "acme") -> Any:
    """Serve *requests* requests one after the other, and count their statuses."""
    return Counter(ask(app, subject).status for _ in range(requests))


def crowd(work: Callable[[int], None], threads: int = THREADS) -> None:
    """Call *work* in *threads* threads that start at the same moment."""
    together = threading.Barrier(threads)

    def run(number: int) -> None:
        together.wait(40)
        work(number)

    all_ = [threading.Thread(target=run, args=(n,)) for n in range(threads)]
    for thread in all_:
        thread.start()
    for thread in all_:
        thread.join()


# -- A crowd


@pytest.mark.parametrize(
    ("features", "question"),
    [
        (["api_requests"], {"kind": "value_v2", "feature": "api_requests"}),
        (["api_requests", "exports"], {"kind": "access"}),
    ],
    ids=["one feature", "two features"],
)
def test_ten_thousand_requests_of_a_new_subject_ask_once(
    sandbox: Sandbox, features: list[str], question: dict[str, str]
) -> None:
    sandbox.grant("acme", "api_requests", 1_000_000)
    sandbox.grant("acme", "exports", config={"yes": True})
    sandbox.faults.entitlements.set(latency=0.3)
    app = limited(
        sandbox.url,
        required_entitlements=features,
        entitlement_meters=[],
    )
    found = Counter[str]()
    counting = threading.Lock()

    def work(number: int) -> None:
        share = REQUESTS // THREADS + (number < REQUESTS % THREADS)
        mine = statuses(app, share)
        with counting:
            found.update(mine)

    crowd(work)
    app.close(20)

    assert found == {"200 OK": REQUESTS}
    assert sandbox.asked(customer="acme", **question) == 1
    assert sandbox.asked() == 1


def test_a_crowd_gets_a_quota_and_hardly_more(sandbox: Sandbox) -> None:
    """A request that waits too long for other requests is served beyond the quota."""
    sandbox.grant("acme", "api_requests", 1_000)
    app = limited(sandbox.url)
    found = Counter[str]()
    counting = threading.Lock()

    def work(number: int) -> None:
        mine = statuses(app, 50)
        with counting:
            found.update(mine)

    crowd(work)
    app.close(20)

    assert found.total() == THREADS * 50
    assert found.keys() == {"200 OK", "429 Too Many Requests"}
    assert 1_000 <= found["200 OK"] <= 1_000 + THREADS


# -- An OpenMeter that takes every question and answers none


def test_a_known_decision_is_not_delayed_by_an_openmeter_that_hangs(
    sandbox: Sandbox,
) -> None:
    sandbox.grant("acme", "api_requests", 1_000_000)
    timeout = 10
    app = limited(sandbox.url, allow_ttl=3_600, entitlement_timeout=timeout)
    assert ask(app).status == "200 OK"
    known = app.process().entitlements.cached_answer
    until(lambda: known("acme", "api_requests").terms)  # asked in the background
    sandbox.faults.entitlements.set(hang=60)

    # The cached answer is too old and is asked for in the background, without success.
    known("acme", "api_requests").fresh_until = 0.0
    started = time.monotonic()
    assert statuses(app, 1_000) == {"200 OK": 1_000}
    taken = time.monotonic() - started
    sandbox.faults.clear()
    until(lambda: not threads("openmeter_wsgi.question"))  # that begin anew
    app.close(40)

    assert app.stats().allowed == {"openmeter": 1, "stale": 1_000}
    assert taken < timeout  # a single wait would take longer


@pytest.mark.load
def test_each_new_subject_waits_once_at_most_and_then_nobody(
    sandbox: Sandbox,
) -> None:
    sandbox.faults.entitlements.set(hang=60)
    timeout = 6
    app = limited(sandbox.url, entitlement_timeout=timeout)
    first, again = [0.0] * 20, [0.0] * 20

    def work(number: int) -> None:
        for times in (first, again):
            started = time.perf_counter()
            assert ask(app, f"subject-{number}").status == "200 OK"
            times[number] = time.perf_counter() - started

    crowd(work, 20)
    app.close(20)
    asked = sandbox.asked()
    sandbox.faults.clear()

    assert max(first) < 2 * timeout  # one wait, and the delay of a busy machine
    assert max(again) < timeout
    assert 1 <= asked <= 12  # the parallel questions, and later retries


# -- Closing


@pytest.mark.parametrize("spool", ["spool", ""], ids=["spool", "memory"])
def test_a_request_after_close_works_as_before(
    sandbox: Sandbox, tmp_path: Path, spool: str
) -> None:
    sandbox.grant("acme", "api_requests", 10)
    app = limited(sandbox.url, spool_dir=str(tmp_path / spool) if spool else None)
    assert statuses(app, 4) == {"200 OK": 4}

    app.close(20)
    assert open_files(tmp_path / "spool" / DATABASE_NAME) == []

    assert statuses(app, 10) == {"200 OK": 6, "429 Too Many Requests": 4}
    assert sandbox.asked(kind="value_v2") == 1
    app.close(20)


def open_files(path: Path) -> list[str]:
    """Return the open files of this process whose paths start with *path*."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(str(descriptor.readlink()))
    return [name for name in found if name.startswith(str(path))]


# -- Forks


def start(case: Callable[..., None], *arguments: str) -> subprocess.Popen[str]:
    name = case.__name__
    call = f"import sys, test_entitlements_load as t; t.{name}(*sys.argv[1:])"
    return start_code(call, *arguments)


def fork_after_use(url: str, spool_dir: str, fork: str, leave: str) -> None:
    app = limited(url, spool_dir=spool_dir or None)
    assert statuses(app, 3) == {"200 OK": 3}
    children = []
    for _ in range(2):
        wait_until_threads_sleep()
        child = FORKS[fork]()
        if child == 0:
            before = set(threading.enumerate())
            assert statuses(app, 5) == {"200 OK": 5}
            own = {thread.name for thread in set(threading.enumerate()) - before}
            assert "openmeter_wsgi.ledger" in own
            # The answer is shared through the spool, where there is one.
            asked = {"cache": 5} if spool_dir else {"openmeter": 1, "cache": 4}
            assert app.stats().allowed == asked
            if leave == "_exit":
                app.close(0)
                os._exit(0)
            sys.exit(0)
        children.append(child)
    wait_for(*children)
    assert app.stats().allowed == {"openmeter": 1, "cache": 2}
    served = 0
    while (response := ask(app)).status == "200 OK" or _is_soon(response):
        served += response.status == "200 OK"
    print(served, end="", flush=True)  # noqa: T201
    app.close(0)
    os._exit(0)  # without delivery, which is not tested here


def _is_soon(response: Any) -> bool:
    """Wait a moment, and return True if Retry-After is one second."""
    threading.Event().wait(0.05)
    return int(dict(response.headers)["Retry-After"]) == 1


@pytest.mark.parametrize("leave", ["_exit", "sys_exit"])
@pytest.mark.parametrize("fork", FORKS)
def test_processes_that_share_a_spool_serve_one_quota(
    sandbox: Sandbox, tmp_path: Path, fork: str, leave: str
) -> None:
    sandbox.grant("acme", "api_requests", 30)
    spool = str(tmp_path / "spool")

    process = start(fork_after_use, sandbox.url, spool, fork, leave)

    # The parent gets the quota that its children left, except their open leases.
    assert served_by(process) == 30 - 3 - 2 * 5
    assert sandbox.asked(kind="value_v2") == 1


@pytest.mark.parametrize("fork", FORKS)
def test_without_a_spool_each_process_counts_for_itself(
    sandbox: Sandbox, fork: str
) -> None:
    sandbox.grant("acme", "api_requests", 30)

    process = start(fork_after_use, sandbox.url, "", fork, "_exit")

    assert served_by(process) == 30 - 3
    assert sandbox.asked(kind="value_v2") == 3


def served_by(process: subprocess.Popen[str]) -> int:
    with process:
        output, said = process.communicate(timeout=40)
    assert process.returncode == 0, said
    assert "Traceback" not in said
    return int(output)


def fork_while_tended(directory: str) -> None:
    """Fork again and again while other threads are within SQLite."""
    where = Path(directory) if directory else None
    store = SqliteStore(where)
    stop = threading.Event()

    def busy(number: int) -> None:
        while not stop.is_set():
            _exchange(store, f"{number:024x}")

    threads = [threading.Thread(target=busy, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for number in range(40):
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            for _ in range(3):
                _exchange(SqliteStore(where), f"{number + 10:024x}")
            os._exit(0)
        wait_for(child)
    stop.set()
    for thread in threads:
        thread.join()
    store.close()


def _exchange(store: SqliteStore, token: str) -> None:
    now = time.time()
    request = LeaseRequest("acme\0api_requests", 0.0, 1.0, {int(now): 1.0})
    try:
        store.exchange(Lessee(token, "host"), [request], now)
        store.take_token(25.0)
    except StoreAway:
        pass  # busy: it is many at once


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_fork_while_threads_are_within_sqlite_hangs_nobody(
    tmp_path: Path, kind: str
) -> None:
    directory = str(tmp_path) if kind == "file" else ""

    finish(start(fork_while_tended, directory))

    assert not list(tmp_path.glob("*unreadable*"))


@pytest.mark.load
def test_workers_of_a_preloaded_application_serve_one_quota(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    sandbox.grant("acme", "api_requests", 100)
    command = [*GTHREAD, "--preload", "--keep-alive", "75"]

    with Server(
        command, "apps:limited", tmp_path / "log",
        OPENMETER_API_URL=sandbox.url,
        OPENMETER_SPOOL_DIR=str(tmp_path / "spool"),
        **overshoot.COUNTED,
    ) as server:  # fmt: skip
        found = overshoot.Crowd([server.address], clients=8)
        assert server.stop() == 0

    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log
    assert found.served == 100, log
    assert 1 <= sandbox.asked(kind="value_v2") <= 2 + found.denied


# -- The end of the interpreter


class Late:
    """An object that serves a request when it is freed, without imports."""

    def __init__(self, app: OpenMeterMiddleware) -> None:
        self._serve = functools.partial(Consumer().serve, app, make_environ())
        self._write = functools.partial(os.write, 1)

    def __del__(self) -> None:
        self._write(self._serve().status.encode())


def ask_in_teardown(url: str, used: str) -> None:
    app = limited(url, fail_mode="closed")
    if used:
        assert ask(app, "someone").status == "403 Forbidden"
    module: Any = sys.modules[__name__]
    module.held = Late(app)


@pytest.mark.parametrize("used", ["", "used"], ids=["unused", "used"])
def test_a_request_in_teardown_gets_the_fail_mode(sandbox: Sandbox, used: str) -> None:
    sandbox.grant("acme", "api_requests", 10)
    process = start(ask_in_teardown, sandbox.url, used)

    with process:
        output, said = process.communicate(timeout=40)

    assert (process.returncode, output) == (0, "503 Service Unavailable")
    assert "Traceback" not in said
    assert "Exception ignored" not in said

"""Measure the overshoot of a quota while usage becomes visible 90 seconds late.

``python -m tests.overshoot_lag [--only NAME] [--lag 90]`` serves a quota of 1,000 with
four workers of gunicorn that share a spool, to 32 clients that retry after Retry-After.
All cases run at the same time, each with its own server and sandbox, and take about
four minutes. The exit status is 1 if a case serves too many requests, or refuses a
customer who has balance.
"""

# ruff: noqa: T201 - also a program that prints
from __future__ import annotations

import argparse
import contextlib
import http.client
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import requests

sys.path.insert(0, str(Path(__file__).parent))

import overshoot
from openmeter_wsgi.sandbox import Sandbox
from servers import GUNICORN, Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

QUOTA, CLIENTS, WORKERS = 1_000, 32, 4
#: Allowed overshoot: the number of requests that run at the same time.
MORE = CLIENTS
METER = {
    "slug": "api_requests", "eventType": "api_requests", "aggregation": "SUM",
    "valueProperty": "$.total", "groupBy": {"half": "$.half"},
}  # fmt: skip
FEATURE = {"key": "api_requests", "name": "api_requests", "meterSlug": "api_requests"}


class Crowd:
    """Clients of one customer that send requests until `stop`."""

    def __init__(self, address: tuple[str, int], think: float) -> None:
        self.served_at: list[float] = []
        self.denied = 0
        self._address = address
        self._think = think
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._client, args=(n,), daemon=True)
            for n in range(CLIENTS)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def served(self) -> int:
        return len(self.served_at)

    def _client(self, number: int) -> None:
        connection = http.client.HTTPConnection(*self._address, timeout=60)
        headers = {"X-Subject": "acme", "X-Half": "ab"[number % 2]}
        with contextlib.closing(connection):
            wait = 0.0
            while not self._stopped.wait(wait):
                connection.request("GET", "/", headers=headers)
                response = connection.getresponse()
                response.read()
                with self._lock:
                    if response.status == 200:
                        self.served_at.append(time.time())
                    else:
                        self.denied += 1
                wait = self._think
                if response.status != 200:
                    # Retry-After may be a month; the client retries earlier.
                    wait = min(float(response.headers["Retry-After"]), 30.0)

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()


class Run(NamedTuple):
    """One run: a sandbox, its clients, and the time at which they began."""

    sandbox: Sandbox
    crowd: Crowd
    began: float
    lag: float

    def wait(self, seconds: float) -> None:
        """Wait until *seconds* after the beginning."""
        time.sleep(max(self.began + seconds - time.time(), 0))

    def wait_until_served(self, requests: int, timeout: float = 120) -> None:
        """Wait until *requests* requests were served, at most *timeout* seconds."""
        deadline = time.time() + timeout
        while self.crowd.served < requests and time.time() < deadline:
            time.sleep(0.1)

    def wait_until_stored(self, events: int, timeout: float = 60) -> None:
        """Wait until *events* events were stored, at most *timeout* seconds."""
        deadline = time.time() + timeout
        while self.stored() < events and time.time() < deadline:
            time.sleep(0.1)

    def served_until(self, moment: float) -> int:
        return sum(at < moment for at in self.crowd.served_at)

    def stored(self, like: str = "%") -> int:
        """Return the number of events in the sandbox, visible or not."""
        with self.sandbox.store.reading() as connection:
            query = "SELECT COUNT(*) FROM events WHERE data LIKE ?"
            (count,) = connection.execute(query, (like,)).fetchone()
        return int(count)


@contextlib.contextmanager
def running(
    lag: float,
    before: Callable[[Sandbox], object],
    *,
    think: float = 0.0,
    **options: str,
) -> Iterator[Run]:
    """Serve a crowd; *before* creates the entitlement."""
    command = [
        *GUNICORN, "--workers", str(WORKERS), "--worker-class", "gthread",
        "--threads", str(CLIENTS // WORKERS), "--keep-alive", "75",
    ]  # fmt: skip
    with (
        Sandbox(visible_after=lag) as sandbox,
        tempfile.TemporaryDirectory() as directory,
    ):
        post(sandbox, "/api/v1/meters", METER)
        before(sandbox)
        with Server(
            command, "apps:halves", Path(directory, "log"),
            OPENMETER_API_URL=sandbox.url,
            OPENMETER_SPOOL_DIR=str(Path(directory, "spool")),
            **overshoot.COUNTED, **options,
        ) as server:  # fmt: skip
            began = time.time()
            crowd = Crowd(server.address, think)
            try:
                yield Run(sandbox, crowd, began, lag)
            finally:
                crowd.stop()
                server.stop()


def post(sandbox: Sandbox, path: str, document: Any) -> None:
    requests.post(sandbox.url + path, json=document, timeout=60).raise_for_status()


def granted(sandbox: Sandbox) -> None:
    sandbox.grant("acme", "api_requests", QUOTA)


def write_200(sandbox: Sandbox) -> None:
    """Send 200 events as another writer than the middleware."""
    events = [
        {"specversion": "1.0", "id": f"other-{n}", "source": "other",
         "type": "api_requests", "subject": "acme", "data": {"total": 1, "half": "a"}}
        for n in range(200)
    ]  # fmt: skip
    headers = {"Content-Type": "application/cloudevents-batch+json"}
    url = f"{sandbox.url}/api/v1/events"
    requests.post(url, json=events, headers=headers, timeout=60).raise_for_status()


class Found(NamedTuple):
    """The result of a case; `fine` is True if it is as expected."""

    served: str
    denied: int
    fine: bool


def plain(lag: float) -> Found:
    """Nothing else happens."""
    with running(lag, granted) as run:
        run.wait(lag + 30)
    crowd = run.crowd
    fine = QUOTA <= crowd.served <= QUOTA + MORE
    return Found(f"{crowd.served:,} of 1,000", crowd.denied, fine)


def visible_before(lag: float) -> Found:
    """Another writer has used 200 before the run."""

    def before(sandbox: Sandbox) -> None:
        granted(sandbox)
        sandbox.store.visible_after = 0.0
        write_200(sandbox)
        sandbox.store.visible_after = lag

    with running(lag, before) as run:
        run.wait(lag + 30)
    crowd = run.crowd
    fine = 800 <= crowd.served <= 800 + MORE
    return Found(f"{crowd.served:,} of 800", crowd.denied, fine)


def visible_later(lag: float) -> Found:
    """Another writer's 200 become visible after two thirds of the lag."""
    later = lag * 2 / 3

    def before(sandbox: Sandbox) -> None:
        granted(sandbox)
        write_200(sandbox)
        with sandbox.store.writing() as connection:
            connection.execute(
                "UPDATE events SET stored_at = ?", (time.time() + later,)
            )

    with running(lag, before) as run:
        run.wait(lag + 40)
    crowd = run.crowd
    after = crowd.served - run.served_until(run.began + later)
    fine = crowd.served + 200 <= QUOTA + 200 + MORE and after == 0
    result = f"{crowd.served:,} + 200, {after} of them after those were visible"
    return Found(result, crowd.denied, fine)


def filtered(lag: float) -> Found:
    """The feature counts only half of the events."""

    def before(sandbox: Sandbox) -> None:
        filters = {"meterGroupByFilters": {"half": "a"}}
        post(sandbox, "/api/v1/features", FEATURE | filters)
        granted(sandbox)

    with running(lag, before) as run:
        run.wait(lag + 70)
        first = run.crowd.served
        run.wait(2 * lag + 120)
        billed = run.stored('%"half":"a"%')
    # Half of the usage does not count, so another thousand is served bit by bit.
    fine = billed <= QUOTA + MORE and first >= 1_250 and run.crowd.served > first
    result = f"{run.crowd.served:,}, {billed:,.0f} of them billed of 1,000"
    return Found(result, run.crowd.denied, fine)


def reset(lag: float) -> Found:
    """The usage is reset."""
    with running(lag, granted) as run:
        run.wait_until_served(QUOTA)
        # An event that arrives after the reset, dated in its second, would count in
        # the new period.
        run.wait_until_stored(QUOTA)
        time.sleep(1)
        run.sandbox.reset("acme", "api_requests")
        run.wait_until_served(2 * QUOTA, timeout=lag + 150)
        time.sleep(15)
    fine = 2 * QUOTA <= run.crowd.served <= 2 * (QUOTA + MORE)
    return Found(f"{run.crowd.served:,} of 1,000 + 1,000", run.crowd.denied, fine)


def grant(lag: float) -> Found:
    """500 more are granted."""
    with running(lag, granted) as run:
        run.wait_until_served(QUOTA)
        run.sandbox.grant("acme", "api_requests", 500)
        run.wait_until_served(1_500, timeout=lag + 150)
        time.sleep(15)
    fine = 1_500 <= run.crowd.served <= 1_500 + MORE
    return Found(f"{run.crowd.served:,} of 1,000 + 500", run.crowd.denied, fine)


def changing(lag: float) -> Found:
    """The lag changes: 2 s, then 90 s, then 2 s."""
    with running(2.0, granted, think=1.0) as run:
        run.wait(8)
        run.sandbox.store.visible_after = lag
        run.wait(24)
        run.sandbox.store.visible_after = 2.0
        run.wait(90)
    fine = QUOTA <= run.crowd.served <= QUOTA + MORE
    return Found(f"{run.crowd.served:,} of 1,000", run.crowd.denied, fine)


def period_end(lag: float) -> Found:
    """The period ends, and a new one begins."""
    end = 0

    def before(sandbox: Sandbox) -> None:
        nonlocal end
        end = int((time.time() + 75) // 60 + 1) * 60
        time.sleep(max(end - 75 - time.time(), 0))
        post(sandbox, "/api/v1/features", FEATURE)
        post(sandbox, "/api/v1/customers", {"key": "acme", "name": "acme"})
        anchor = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(end))
        path = "/api/v2/customers/acme/entitlements"
        post(sandbox, path, {
            "type": "metered", "featureKey": "api_requests", "issueAfterReset": QUOTA,
            "usagePeriod": {"interval": "PT1H", "anchor": anchor},
        })  # fmt: skip

    with running(lag, before, think=1.0) as run:
        time.sleep(max(end + 75 - time.time(), 0))
    old = run.served_until(end)
    new = run.crowd.served - old
    fine = QUOTA <= old <= QUOTA + MORE and QUOTA <= new <= QUOTA + MORE
    result = f"{old:,} of 1,000 before the end, {new:,} of 1,000 after it"
    return Found(result, run.crowd.denied, fine)


def lost(lag: float) -> Found:
    """OpenMeter loses one event in a hundred after its 204; maximum lag 20 s."""
    bound, count = 20.0, 0

    def before(sandbox: Sandbox) -> None:
        granted(sandbox)
        add = sandbox.store.add

        def losing(events: Any) -> Any:
            nonlocal count
            kept = []
            for event in events:
                count += 1
                if count % 100:
                    kept.append(event)
            return add(kept)

        sandbox.store.add = losing  # type: ignore[method-assign]

    longest = 0.0
    with running(lag / 45, before, OPENMETER_MAX_VISIBILITY_LAG=str(bound)) as run:
        exhausted_at = time.time()  # the last time at which no quota was left
        while time.time() < run.began + 120:
            time.sleep(0.5)
            last = max(run.crowd.served_at, default=0.0)
            if run.stored() >= QUOTA:
                exhausted_at = time.time()
            longest = max(longest, time.time() - max(last, exhausted_at))
        left = QUOTA - run.stored()
    # Added to the bound: the time of the next answer, and the wait of the client.
    fine = left <= 1 and longest <= bound + 35 and run.crowd.served <= 1_010 + 2 * MORE
    result = f"{run.crowd.served:,}, {left} left, denied for {longest:.0f} s at most"
    return Found(result, run.crowd.denied, fine)


CASES = {
    case.__name__: case
    for case in (
        plain, visible_before, visible_later, filtered, reset, grant, changing,
        period_end, lost,
    )
}  # fmt: skip


def main(names: list[str], lag: float) -> None:
    """Run all cases at the same time and print a row for each."""
    print("| during the run | served | denied | as expected |")
    print("|---|---|---:|---|", flush=True)
    fine = []

    def run(name: str) -> None:
        case = CASES[name]
        found = case(lag)
        title = (case.__doc__ or "").rstrip(".")
        fine_text = "yes" if found.fine else "NO"
        row = f"| {title} | {found.served} | {found.denied:,} | {fine_text} |"
        print(row, flush=True)
        fine.append(found.fine)

    threads = [threading.Thread(target=run, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
        time.sleep(2)
    for thread in threads:
        thread.join()
    if len(fine) < len(names) or not all(fine):
        sys.exit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=CASES, action="append")
    parser.add_argument("--lag", type=float, default=90.0)
    args = parser.parse_args()
    main(args.only or [*CASES], args.lag)

"""Measure the overshoot of a quota, with real servers and many clients.

``python -m tests.overshoot [--redis URL]`` serves a quota of 1,000 with four workers of
gunicorn to 32 clients that retry after Retry-After. Usage becomes visible in OpenMeter
after 3 s. It measures the quota counted down by the middleware and, for comparison, a
plain cache of 60 seconds; with --redis also two gunicorns that share only a Redis.
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
from typing import TYPE_CHECKING, NamedTuple

import requests

sys.path.insert(0, str(Path(__file__).parent))

from openmeter_wsgi.sandbox import Sandbox
from servers import GUNICORN, Server

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

QUOTA = 1_000
CLIENTS = 32
WORKERS = 4
VISIBLE_AFTER = 3.0
#: A longer Retry-After means that the quota is spent: the client stops.
SPENT = 60
#: Maximum number of requests, and of seconds, of a measurement.
MAX_REQUESTS = 8_000
MAX_SECONDS = 90.0

LIMITED = {
    "OPENMETER_REQUIRED_ENTITLEMENTS": "api_requests",
    "OPENMETER_FLUSH_INTERVAL": "0.2",
    "OPENMETER_SUBJECT": "header:X-Subject",
}
COUNTED = {**LIMITED, "OPENMETER_ENTITLEMENT_METERS": "api_requests"}


class Served(NamedTuple):
    """The result of one measurement."""

    #: Number of requests with status 200, and with 429.
    served: int
    denied: int
    #: Usage that OpenMeter counted in the end.
    billed: float
    seconds: float


class Crowd:
    """Clients of one customer that send as many requests as they are allowed."""

    def __init__(
        self, addresses: Sequence[tuple[str, int]], clients: int = CLIENTS
    ) -> None:
        self.served = self.denied = 0
        self._lock = threading.Lock()
        self._deadline = time.monotonic() + MAX_SECONDS
        started = time.monotonic()
        threads = [
            threading.Thread(target=self._client, args=(addresses[n % len(addresses)],))
            for n in range(clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.seconds = time.monotonic() - started

    def _client(self, address: tuple[str, int]) -> None:
        connection = http.client.HTTPConnection(*address, timeout=30)
        with contextlib.closing(connection):
            wait: float | None = 0.0
            while wait is not None and time.monotonic() + wait < self._deadline:
                threading.Event().wait(wait)
                wait = self._ask(connection)

    def _ask(self, connection: http.client.HTTPConnection) -> float | None:
        """Send a request; return the seconds until the next one, or None to stop."""
        connection.request("GET", "/", headers={"X-Subject": "acme"})
        response = connection.getresponse()
        response.read()
        with self._lock:
            if response.status == 200:
                self.served += 1
            else:
                self.denied += 1
            if self.served + self.denied >= MAX_REQUESTS:
                return None
        if response.status == 200:
            return 0.0
        assert response.status == 429
        wait = int(response.headers["Retry-After"])
        return wait if wait <= SPENT else None


@contextlib.contextmanager
def quota() -> Iterator[Sandbox]:
    """Run a sandbox that has granted the quota to one customer."""
    meter = {
        "slug": "api_requests", "eventType": "api_requests", "aggregation": "SUM",
        "valueProperty": "$.total",
    }  # fmt: skip
    with Sandbox(visible_after=VISIBLE_AFTER) as sandbox:
        made = requests.post(f"{sandbox.url}/api/v1/meters", json=meter, timeout=40)
        made.raise_for_status()
        sandbox.grant("acme", "api_requests", QUOTA)
        yield sandbox


def measure(directories: Sequence[Path], **options: str) -> Served:
    """Serve with one gunicorn for each of *directories*, which holds its spool."""
    threads = str(CLIENTS // WORKERS // len(directories))
    command = [
        *GUNICORN, "--workers", str(WORKERS), "--worker-class", "gthread",
        "--threads", threads, "--keep-alive", "75",
    ]  # fmt: skip
    with quota() as sandbox, contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(
                Server(
                    command, "apps:limited", directory / "log",
                    OPENMETER_API_URL=sandbox.url,
                    OPENMETER_SPOOL_DIR=str(directory / "spool"),
                    **options,
                )
            )
            for directory in directories
        ]  # fmt: skip
        crowd = Crowd([server.address for server in servers])
        for server in servers:
            server.stop()
        billed = _billed(sandbox, crowd.served)
    return Served(crowd.served, crowd.denied, billed, crowd.seconds)


def _billed(sandbox: Sandbox, expected: int) -> float:
    """Return the usage once all of it is visible."""
    deadline = time.monotonic() + 30
    while True:
        value = sandbox.value("acme", "api_requests")
        usage = float(value["usage"])
        if usage >= expected or time.monotonic() > deadline:
            return usage
        threading.Event().wait(0.1)


def main(redis_url: str | None) -> None:
    """Print a row for each kind of limit."""
    print("| during the run | served of 1,000 | denied | billed | seconds |")
    print("|---|---:|---:|---:|---:|")
    limits = [
        ("nothing else happens", 1, COUNTED),
        ("instead of this package, a plain cache with a TTL of 60 s", 1, LIMITED),
    ]
    if redis_url is not None:
        shared = {**COUNTED, "OPENMETER_REDIS_URL": redis_url}
        limits.insert(1, ("two gunicorns share a Redis, and no spool", 2, shared))
    for name, servers, options in limits:
        with contextlib.ExitStack() as stack:
            directories = [
                Path(stack.enter_context(tempfile.TemporaryDirectory()))
                for _ in range(servers)
            ]
            found = measure(directories, **options)
        print(
            f"| {name} | {found.served:,} | {found.denied:,} | {found.billed:,.0f} "
            f"| {found.seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--redis", help="the address of an empty Redis")
    main(parser.parse_args().redis)

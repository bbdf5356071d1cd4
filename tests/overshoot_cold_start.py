"""Count wrong decisions of a new process, for 1,000 customers and a healthy OpenMeter.

``python -m tests.overshoot_cold_start`` serves 140 requests a second from a process
with an empty cache; every second customer is over its quota. OpenMeter answers within
a millisecond. Then a second process on the same spool does the same.
"""

# ruff: noqa: T201 - also a program that prints
from __future__ import annotations

import argparse
import http.server
import json
import random
import socketserver
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

from openmeter_wsgi import OpenMeterMiddleware
from servers import Consumer, make_environ

if TYPE_CHECKING:
    from collections.abc import Iterable

CUSTOMERS = 1_000
REQUESTS_PER_SECOND = 140
THREADS = 64


class Healthy(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Fake OpenMeter that answers at once; odd-numbered customers are over quota."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: Counter[str] = Counter()
        #: The time of the first question for each customer.
        self.asked_at: dict[str, float] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Healthy

    def do_GET(self) -> None:
        parts = self.path.split("/")
        if parts[-1] == "value":
            self.server.asked[parts[4]] += 1
            self.server.asked_at.setdefault(parts[4], time.monotonic())
        spent = int(parts[4].partition("-")[2] or 0) % 2
        left = 0 if spent else 1_000_000
        value = {"hasAccess": not spent, "balance": left, "usage": 1_000_000 - left,
                 "overage": 0, "totalAvailableGrantAmount": 1_000_000}  # fmt: skip
        body = json.dumps(value if parts[-1] == "value" else {}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Started(NamedTuple):
    """The counts of one new process."""

    requests: int
    #: Number of refused requests of customers with quota left.
    refused: int
    #: Number of served requests of customers without quota.
    let_through: int
    #: Number of decisions without an answer, as questions were limited by their rate.
    busy: int
    #: Number of questions to OpenMeter, and maximum for one customer.
    asked: int
    most_asked: int


def _ok(environ: Any, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [])
    return [b"ok"]


def start(
    openmeter: Healthy, spool: Path, *, seconds: float, mode: str, rate: float
) -> Started:
    """Serve requests with a new middleware, whose cache is empty."""
    before = openmeter.asked.total()
    app = OpenMeterMiddleware(
        _ok,
        api_url=openmeter.url,
        meters=None,
        required_entitlements=["searches"],
        fail_mode=mode,
        question_rate=rate,
        deny_ttl=3_600,
        spool_dir=str(spool),
    )
    found: Counter[tuple[bool, str]] = Counter()
    began = time.monotonic()
    chance = random.Random(7)  # the same customers for each process
    customers = [
        chance.randrange(CUSTOMERS) for _ in range(int(seconds * REQUESTS_PER_SECOND))
    ]

    def serve(number: int) -> None:
        wait = began + number / REQUESTS_PER_SECOND - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        customer = customers[number]
        environ = make_environ()
        environ["REMOTE_USER"] = f"customer-{customer}"
        consumer = Consumer()
        consumer.serve(app, environ)
        found[customer % 2 == 0, consumer.status[:3]] += 1

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(serve, range(len(customers))))
    stats = app.stats()
    # Pending questions are still asked, although their requests have ended.
    pending = app.process().entitlements._lookup._pending  # type: ignore[attr-defined]
    while pending:
        time.sleep(0.05)
    app.close(10)
    return Started(
        requests=found.total(),
        refused=found[True, "503"],
        let_through=found[False, "200"],
        busy=stats.denied.get("busy", 0) + stats.let_through.get("busy", 0),
        asked=openmeter.asked.total() - before,
        most_asked=max(openmeter.asked.values(), default=0),
    )


def main(seconds: float) -> None:
    """Print a row for each rate, fail mode and process."""
    print(
        "| question_rate | fail_mode | process | requests | refused with quota left "
        "| served without quota | busy | questions | most for one customer |"
    )
    print("|---:|---|---|---:|---:|---:|---:|---:|---:|")
    for rate in (200.0, 25.0):
        for mode in ("closed", "open"):
            openmeter = Healthy()
            with tempfile.TemporaryDirectory() as directory:
                for process in ("first", "second"):
                    one = start(
                        openmeter, Path(directory, "spool"),
                        seconds=seconds, mode=mode, rate=rate,
                    )  # fmt: skip
                    print(
                        f"| {rate:g} | {mode} | {process} | {one.requests:,} "
                        f"| {one.refused:,} | {one.let_through:,} | {one.busy:,} "
                        f"| {one.asked:,} | {one.most_asked} |",
                        flush=True,
                    )
                if rate == 25.0:
                    _print_pace(openmeter)
            openmeter.stop()


def _print_pace(openmeter: Healthy) -> None:
    times = sorted(openmeter.asked_at.values())
    n = len(times)
    print(f"(OpenMeter was first asked for customer {n} {times[-1] - times[0]:.1f} s "
          f"after the first one; {n} / 25 = {n / 25:.1f} s)", flush=True)  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10)
    main(parser.parse_args().seconds)

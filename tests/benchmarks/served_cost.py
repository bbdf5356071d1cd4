"""Time that metering adds to a Flask "hello" under gunicorn, compared with amberflo.

    python -m tests.benchmarks.served_cost [--rounds 5] [--seconds 4]

gunicorn has two sync workers, wrk eight connections. Every round measures the bare
application, this package and amberflo in turn. amberflo is the fastest other package
that sends an event for each request. Needs wrk; installs amberflo from PyPI.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import time
import urllib.request
from typing import TYPE_CHECKING

from tests.benchmarks import report
from tests.benchmarks.peers import CHECKOUT, Peer, interpreter
from tests.benchmarks.report import Row
from tests.benchmarks.sink import running_sink

if TYPE_CHECKING:
    from collections.abc import Iterator

AMBERFLO = Peer(
    "amberflo-metering-python 3.3.1",
    ("amberflo-metering-python==3.3.1", "flask", "gunicorn"),
)
THIS_PACKAGE = Peer("this package", ())
WORKERS, CONNECTIONS = 2, 8
#: Maximum of this package's added wall time, divided by that of the peer.
MOST = 1 / 6


@contextlib.contextmanager
def serving(name: str, python: str, sink: str) -> Iterator[str]:
    """Run gunicorn with the application and yield its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [
            python, "-m", "gunicorn", "--no-control-socket",
            "--bind", f"127.0.0.1:{port}", "--workers", str(WORKERS),
            "--log-level", "error", "tests.benchmarks.served_app",
        ],
        cwd=CHECKOUT,
        env=os.environ | {"SERVED_AS": name, "SERVED_SINK": sink},
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}/"
    try:
        _wait_for(url, process)
        yield url
    finally:
        process.terminate()
        process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise SystemExit(f"gunicorn ended with {process.returncode}")
        with contextlib.suppress(OSError), urllib.request.urlopen(url):
            return
        time.sleep(0.05)
    raise SystemExit(f"nothing answers at {url}")


def requests_per_second(url: str, seconds: int) -> float:
    """Return the request rate that wrk reports."""
    done = subprocess.run(
        ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", url],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    if "Non-2xx" in done.stdout:
        raise SystemExit(done.stdout)
    (rate,) = re.findall(r"Requests/sec:\s+([\d.]+)", done.stdout)
    return float(rate)


def measure(rounds: int, seconds: int) -> dict[str, list[float]]:
    """Return the requests per second of each application, by round."""
    pythons = {
        "bare": interpreter(THIS_PACKAGE),
        "metered": interpreter(THIS_PACKAGE),
        "amberflo": interpreter(AMBERFLO),
    }
    rates: dict[str, list[float]] = {name: [] for name in pythons}
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(running_sink())
        urls = {
            name: stack.enter_context(serving(name, python, sink))
            for name, python in pythons.items()
        }
        for turn in range(rounds + 1):
            for name, url in urls.items():
                rate = requests_per_second(url, seconds)
                if turn:  # the first round warms up
                    rates[name].append(rate)
    return rates


def rows(rates: dict[str, list[float]]) -> list[Row]:
    """Return the rows; differences and ratios are taken within each round."""
    added = {
        name: [
            (1 / rate - 1 / bare) * 1e6
            for rate, bare in zip(rates[name], rates["bare"], strict=True)
        ]
        for name in ("metered", "amberflo")
    }
    ratios = [
        ours / theirs
        for ours, theirs in zip(added["metered"], added["amberflo"], strict=True)
    ]
    return [
        *[Row(f"{name}", "requests/s", rates[name]) for name in rates],
        Row("time added to a request, this package", "µs", added["metered"]),
        Row("time added to a request, amberflo 3.3.1", "µs", added["amberflo"]),
        Row("time added, this package ÷ amberflo", "x", ratios, target=MOST),
    ]


def main() -> None:
    """Print the figures."""
    args = report.arguments(__doc__, rounds=5, seconds=4).parse_args()
    rates = measure(args.rounds, args.seconds)
    report.show("A Flask hello under gunicorn", rows(rates), args.json)


if __name__ == "__main__":
    main()

"""Time that the middleware adds to a request.

    python -m tests.benchmarks.request_cost [--rounds 11] [--requests 2000] [--peers]

Every round times all variants one after the other, so that a busy machine slows all of
them. A figure is the median over the rounds, with the smallest and the largest value.
Each variant is compared with the bare application of the same round, and the time that
it adds with the time that the naive wrapper adds in the same run.

With --peers the same rounds also time other packages (`tests.benchmarks.peers`). These
deliver to a sink while they are timed, as they would in use, and so does "this package,
with delivery". The rows above it only make events while they are timed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import platform
import statistics
import tempfile
from typing import TYPE_CHECKING, NamedTuple

from openmeter_wsgi import OpenMeterMiddleware
from tests.benchmarks import paths, peers
from tests.benchmarks.report import number
from tests.benchmarks.sink import running_sink

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from wsgiref.types import WSGIApplication


class Rounds(NamedTuple):
    """The figures of one variant, one for each round."""

    #: Time of a request, divided by that of the bare application.
    ratios: list[float]
    #: Microseconds added to a request.
    added: list[float]

    def append(self, bare: float, seconds: float) -> None:
        """Add the seconds of a request in one round, bare and in this variant."""
        self.ratios.append(seconds / bare)
        self.added.append((seconds - bare) * 1e6)


class Compared:
    """The peers that wrap one application, and the reasons for missing ones."""

    def __init__(
        self,
        application: str,
        url: str,
        installed: Mapping[str, str | peers.UnavailableError],
        stack: contextlib.ExitStack,
    ) -> None:
        self.running: list[peers.Running] = []
        self.missing: dict[str, str] = {}
        for peer in peers.PEERS:
            if application not in peer.applications:
                continue
            python = installed[peer.name]
            if isinstance(python, peers.UnavailableError):
                self.missing[peer.name] = str(python)
                continue
            running = peers.Running(peer, application, url, python)
            stack.callback(running.close)
            self.running.append(running)

    def turn(self, requests: int) -> Iterator[tuple[str, peers.Turn]]:
        """Yield the times of each peer; a peer that fails is left out from then on."""
        for running in tuple(self.running):
            try:
                yield running.name, running.turn(requests)
            except peers.UnavailableError as error:
                self.missing[running.name] = str(error)
                self.running.remove(running)


def measure(
    app: WSGIApplication,
    url: str,
    spool_dir: str,
    *,
    rounds: int,
    requests: int,
    compared: Compared | None = None,
) -> dict[str, Rounds]:
    """Return the figures of each variant, compared with the bare application."""
    variants = paths.applications(app, spool_dir, api_url=url)
    figures = {name: Rounds([], []) for name in variants}
    for turn in range(rounds + 1):
        gc.collect()
        taken = {
            name: _serve(variant, requests) / requests
            for name, variant in variants.items()
        }
        others = dict(compared.turn(requests)) if compared else {}
        if not turn:  # the first round warms up
            continue
        for name, seconds in taken.items():
            figures[name].append(taken[paths.BARE], seconds)
        for name, other in others.items():
            figures.setdefault(name, Rounds([], [])).append(*other)
    for variant in variants.values():
        if isinstance(variant, OpenMeterMiddleware):
            variant.close(60)
    return figures


def _serve(app: WSGIApplication, requests: int) -> float:
    taken = paths.serve(app, requests)
    if isinstance(app, OpenMeterMiddleware):
        app.flush(60)
    return taken


def rows(
    label: str, figures: Mapping[str, Rounds], missing: Mapping[str, str]
) -> Iterator[str]:
    """Yield the rows of the table: the figures, then the reasons for missing peers."""
    naive = statistics.median(figures[paths.NAIVE].added)
    for name, variant in figures.items():
        if name != paths.BARE and name not in missing:
            yield (
                f"| {label} | {name} | {_spread(variant.ratios)} "
                f"| {_spread(variant.added)} µs "
                f"| {number(statistics.median(variant.added) / naive)} |"
            )
    for name, reason in missing.items():
        yield f"| {label} | {name} | not measured: {reason} | | |"


def _spread(values: Sequence[float]) -> str:
    median = number(statistics.median(values))
    return f"{median} ({number(min(values))} to {number(max(values))})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--requests", type=int, default=2_000)
    parser.add_argument(
        "--peers", action="store_true", help="compare other packages, from PyPI"
    )
    args = parser.parse_args()
    installed = peers.install() if args.peers else {}
    print(f"{platform.python_implementation()} {platform.python_version()}, ", end="")
    print(f"{args.rounds} rounds of {args.requests} requests\n")
    print("| application | metering | time ÷ bare ", end="")
    print("| added (smallest to largest) | ÷ naive wrapper |")
    print("|---|---|---|---:|---:|")
    applications = {peers.TRIVIAL: paths.trivial_app, peers.FLASK: paths.flask_app()}
    for label, app in applications.items():
        with contextlib.ExitStack() as stack:
            url = stack.enter_context(running_sink())
            directory = stack.enter_context(tempfile.TemporaryDirectory())
            compared = Compared(label, url, installed, stack) if installed else None
            figures = measure(
                app, url, directory, rounds=args.rounds, requests=args.requests,
                compared=compared,
            )  # fmt: skip
            for line in rows(label, figures, compared.missing if compared else {}):
                print(line, flush=True)


if __name__ == "__main__":
    main()

"""How much longer a request takes when it is metered.

    python -m tests.benchmarks.request_cost [--rounds 11] [--requests 2000] [--peers]

Every round times all variants one after the other, so that what slows the machine
down slows all of them; a figure is the median over the rounds, a ratio to the bare
application of the same round, with the smallest and the largest. What is added is
compared with what the naive wrapper adds in the same run.

With --peers the same rounds time what others would pick instead
(`tests.benchmarks.peers`). These deliver to a sink while they are timed, as they would
in use, and so does "this package, as it comes"; the ways before them only make events,
and deliver afterwards.
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
    """What one variant took, round by round."""

    #: The ratio to the bare application.
    ratios: list[float]
    #: The microseconds that it adds.
    added: list[float]

    def append(self, bare: float, seconds: float) -> None:
        """Add what a request took in one round."""
        self.ratios.append(seconds / bare)
        self.added.append((seconds - bare) * 1e6)


class Compared:
    """The peers around one application, and why some of them are not measured."""

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
        """Yield what each takes; who fails once is not asked again."""
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
    """Return what each variant takes beside the bare one."""
    variants = paths.applications(app, spool_dir, api_url=url)
    found = {name: Rounds([], []) for name in variants}
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
            found[name].append(taken[paths.BARE], seconds)
        for name, other in others.items():
            found.setdefault(name, Rounds([], [])).append(*other)
    for variant in variants.values():
        if isinstance(variant, OpenMeterMiddleware):
            variant.close(60)
    return found


def _serve(app: WSGIApplication, requests: int) -> float:
    taken = paths.serve(app, requests)
    if isinstance(app, OpenMeterMiddleware):
        app.flush(60)
    return taken


def rows(
    label: str, found: Mapping[str, Rounds], missing: Mapping[str, str]
) -> Iterator[str]:
    """Yield the lines of the table: what was measured, and what was not and why."""
    naive = statistics.median(found[paths.NAIVE].added)
    for name, each in found.items():
        if name != paths.BARE and name not in missing:
            yield (
                f"| {label} | {name} | {_spread(each.ratios)} "
                f"| {_spread(each.added)} µs "
                f"| {number(statistics.median(each.added) / naive)} |"
            )
    for name, reason in missing.items():
        yield f"| {label} | {name} | not measured: {reason} | | |"


def _spread(of: Sequence[float]) -> str:
    return f"{number(statistics.median(of))} ({number(min(of))} to {number(max(of))})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--requests", type=int, default=2_000)
    parser.add_argument(
        "--peers", action="store_true", help="install from PyPI what is compared, too"
    )
    given = parser.parse_args()
    installed = peers.install() if given.peers else {}
    print(f"{platform.python_implementation()} {platform.python_version()}, ", end="")
    print(f"{given.rounds} rounds of {given.requests} requests\n")
    print("| application | metering | time, ratio to bare | added | of naive |")
    print("|---|---|---|---:|---:|")
    applications = {peers.TRIVIAL: paths.trivial_app, peers.FLASK: paths.flask_app()}
    for label, app in applications.items():
        with contextlib.ExitStack() as stack:
            url = stack.enter_context(running_sink())
            directory = stack.enter_context(tempfile.TemporaryDirectory())
            compared = Compared(label, url, installed, stack) if installed else None
            found = measure(
                app, url, directory, rounds=given.rounds, requests=given.requests,
                compared=compared,
            )  # fmt: skip
            for line in rows(label, found, compared.missing if compared else {}):
                print(line, flush=True)


if __name__ == "__main__":
    main()

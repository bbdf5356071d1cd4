"""How much longer a request takes when it is metered.

    python -m benchmarks.request_cost [--rounds 15] [--requests 2000]

Every round times all variants one after the other, so that what slows the machine
down slows all of them; a figure is the median over the rounds of the ratio to the
bare application of the same round, with the smallest and the largest. Of the trivial
application, which takes a quarter of a microsecond, what is added is compared with
what the naive wrapper adds in the same round.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import tempfile
from typing import TYPE_CHECKING, NamedTuple

from benchmarks import paths
from benchmarks.sink import running_sink
from openmeter_wsgi import OpenMeterMiddleware

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication


class Rounds(NamedTuple):
    """What one variant took, round by round."""

    #: The ratio to the bare application.
    ratios: list[float]
    #: The microseconds that it adds, and the same as a part of the naive wrapper's.
    added: list[float]
    of_naive: list[float]


def measure(
    app: WSGIApplication, url: str, spool_dir: str, *, rounds: int, requests: int
) -> dict[str, Rounds]:
    """Return what each variant takes beside the bare one."""
    variants = paths.applications(app, spool_dir, api_url=url)
    found = {name: Rounds([], [], []) for name in variants}
    for turn in range(rounds + 1):
        gc.collect()
        taken = {name: _serve(variant, requests) for name, variant in variants.items()}
        if not turn:  # the first round warms up
            continue
        bare = taken[paths.BARE]
        for name, seconds in taken.items():
            found[name].ratios.append(seconds / bare)
            found[name].added.append((seconds - bare) / requests * 1e6)
            found[name].of_naive.append((seconds - bare) / (taken[paths.NAIVE] - bare))
    for variant in variants.values():
        if isinstance(variant, OpenMeterMiddleware):
            variant.close(60)
    return found


def _serve(app: WSGIApplication, requests: int) -> float:
    taken = paths.serve(app, requests)
    if isinstance(app, OpenMeterMiddleware):
        app.flush(60)
    return taken


def _spread(of: list[float]) -> str:
    return f"{statistics.median(of):.2f} ({min(of):.2f} to {max(of):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--requests", type=int, default=2_000)
    given = parser.parse_args()
    print(f"{platform.python_implementation()} {platform.python_version()}, ", end="")
    print(f"{given.rounds} rounds of {given.requests} requests\n")
    print("| application | metering | time, ratio to bare | added | of naive |")
    print("|---|---|---|---:|---|")
    for label, app in (("trivial", paths.trivial_app), ("Flask", paths.flask_app())):
        with running_sink() as url, tempfile.TemporaryDirectory() as directory:
            found = measure(
                app, url, directory, rounds=given.rounds, requests=given.requests
            )
        for name, each in found.items():
            if name != paths.BARE:
                print(
                    f"| {label} | {name} | {_spread(each.ratios)} "
                    f"| {statistics.median(each.added):.1f} µs "
                    f"| {statistics.median(each.of_naive):.2f} |"
                )


if __name__ == "__main__":
    main()

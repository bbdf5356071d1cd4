"""Whether an event costs the same however much there is of everything else.

    python -m tests.benchmarks.growth [--rounds 5] [--plots build/bench]

Processor time of one event: with so many waiting, so many workers on one directory of
a spool, so many routes, so many known subjects. Rounds go through all sizes in turns;
a figure is the median. One plot each is written to --plots.
"""

from __future__ import annotations

import gc
import itertools
import logging
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tests.benchmarks import growing, report
from tests.benchmarks.plot import plot

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: What still passes for flat: caches of the processor are smaller than a million.
FLAT = 1.5


class Dimension(NamedTuple):
    """What there may be much of, and what is measured of each size."""

    name: str
    sizes: Sequence[int]
    #: Returns the nanoseconds of one event by what is done with it.
    measure: Callable[[int, str], dict[str, float]]


MILLION = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)
DIMENSIONS = (
    Dimension("waiting events", MILLION, growing.waiting_events),
    Dimension("workers", (1, 2, 4, 8, 16, 32, 64), growing.workers),
    Dimension("routes", (1, 10, 100, 1_000), growing.routes),
    Dimension("known subjects", MILLION, growing.subjects),
)


def measure(dimension: Dimension, rounds: int) -> dict[str, dict[int, list[float]]]:
    """Return the figures of each round, by what is done and by size."""
    found: defaultdict[str, defaultdict[int, list[float]]]
    found = defaultdict(lambda: defaultdict(list))
    for _, size in itertools.product(range(rounds), dimension.sizes):
        with tempfile.TemporaryDirectory() as directory:
            gc.collect()
            for what, taken in dimension.measure(size, directory).items():
                found[what][size].append(taken)
    return {what: dict(by_size) for what, by_size in found.items()}


def rows(
    dimension: Dimension, found: dict[str, dict[int, list[float]]]
) -> list[report.Row]:
    """Return the cost of an event among the fewest, and how it grows to the most."""
    least, most = dimension.sizes[0], dimension.sizes[-1]
    made = []
    for what, by_size in found.items():
        ratios = [b / a for a, b in zip(by_size[least], by_size[most], strict=True)]
        made += [
            report.Row(f"{what}, {dimension.name}: {least}", "ns", by_size[least]),
            report.Row(
                f"{what}, {dimension.name}: {most:,}, beside {least}", "x", ratios, FLAT
            ),
        ]
    return made


def main() -> None:
    parser = report.arguments(__doc__, rounds=5)
    parser.add_argument("--plots", type=Path, default=Path("build/bench"))
    given = parser.parse_args()
    logging.getLogger("openmeter_wsgi").addHandler(logging.NullHandler())
    given.plots.mkdir(parents=True, exist_ok=True)
    table = []
    for dimension in DIMENSIONS:
        found = measure(dimension, given.rounds)
        table += rows(dimension, found)
        medians = {
            what: {size: statistics.median(of) for size, of in by_size.items()}
            for what, by_size in found.items()
        }
        drawn = plot(medians, across=dimension.name, upwards="ns of one event")
        name = f"growth-{dimension.name.replace(' ', '-')}.svg"
        (given.plots / name).write_text(drawn)
    report.show("Growth", table, given.json)


if __name__ == "__main__":
    main()

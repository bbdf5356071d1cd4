"""Cost of an event or request, by the number of events, workers, routes and subjects.

    python -m tests.benchmarks.growth [--rounds 5] [--plots build/bench]

Measures the processor time of one event or request for growing numbers of waiting
events, workers on one spool directory, routes, and known subjects. Each round measures
all sizes in turn; a figure is the median. --plots is the directory for the plots.
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

#: Maximum growth that counts as constant: a table of a million entries is larger than
#: the caches of the processor.
FLAT = 1.5


class Dimension(NamedTuple):
    """A number that may grow, its sizes, and the measurement at each size."""

    name: str
    sizes: Sequence[int]
    #: Takes the size and a directory; returns the nanoseconds of each operation.
    measure: Callable[[int, str], dict[str, float]]


MILLION = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)
DIMENSIONS = (
    Dimension("waiting events", MILLION, growing.waiting_events),
    Dimension("workers", (1, 2, 4, 8, 16, 32, 64), growing.workers),
    Dimension("routes", (1, 10, 100, 1_000), growing.routes),
    Dimension("known subjects", MILLION, growing.subjects),
)


def measure(dimension: Dimension, rounds: int) -> dict[str, dict[int, list[float]]]:
    """Return the figures of each round, by operation and by size."""
    figures: defaultdict[str, defaultdict[int, list[float]]]
    figures = defaultdict(lambda: defaultdict(list))
    for _, size in itertools.product(range(rounds), dimension.sizes):
        with tempfile.TemporaryDirectory() as directory:
            gc.collect()
            for operation, taken in dimension.measure(size, directory).items():
                figures[operation][size].append(taken)
    return {operation: dict(by_size) for operation, by_size in figures.items()}


def rows(
    dimension: Dimension, figures: dict[str, dict[int, list[float]]]
) -> list[report.Row]:
    """Return the cost at the smallest size, and its growth up to the largest size."""
    least, most = dimension.sizes[0], dimension.sizes[-1]
    table = []
    for operation, by_size in figures.items():
        ratios = [b / a for a, b in zip(by_size[least], by_size[most], strict=True)]
        table += [
            report.Row(f"{operation}, {dimension.name}: {least}", "ns", by_size[least]),
            report.Row(
                f"{operation}, {dimension.name}: {most:,}, beside {least}",
                "x",
                ratios,
                FLAT,
            ),
        ]
    return table


def main() -> None:
    parser = report.arguments(__doc__, rounds=5)
    parser.add_argument("--plots", type=Path, default=Path("build/bench"))
    args = parser.parse_args()
    logging.getLogger("openmeter_wsgi").addHandler(logging.NullHandler())
    args.plots.mkdir(parents=True, exist_ok=True)
    table = []
    for dimension in DIMENSIONS:
        figures = measure(dimension, args.rounds)
        table += rows(dimension, figures)
        medians = {
            operation: {
                size: statistics.median(values) for size, values in by_size.items()
            }
            for operation, by_size in figures.items()
        }
        drawn = plot(medians, across=dimension.name, upwards="ns of one event")
        name = f"growth-{dimension.name.replace(' ', '-')}.svg"
        (args.plots / name).write_text(drawn)
    report.show("Growth", table, args.json)


if __name__ == "__main__":
    main()

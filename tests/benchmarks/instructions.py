"""Instructions that the middleware adds to a request, for different policies.

    python -m tests.benchmarks.instructions [--requests 1000] [--json FILE] [--guard]

valgrind counts them, so the figures are the same on a busy machine and on an idle one.
One process serves --requests requests to each application in turn. Only the
instructions of these requests count: not those between the turns, in the kernel, or in
delivery threads, which sleep meanwhile.

With --guard the exit status is 1 if a row exceeds its budget by more than 5 %.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from openmeter_wsgi.values import clock
from tests.benchmarks import counting, paths

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

FLASK = "Flask, bare"

#: Maximum number of instructions added, and the row to which they are added.
BUDGETS = {
    paths.NO_METERS: (16_500, paths.BARE),
    paths.FILTERED: (16_500, paths.BARE),
    paths.MEMORY: (23_000, paths.BARE),
    paths.SPOOL: (23_500, paths.BARE),
    paths.THREE: (2 * 6_500, paths.MEMORY),
    paths.ENTITLED: (4_500, paths.NO_METERS),
}
#: Factor by which the guard lets a budget be exceeded, for another build of CPython or
#: another libc.
TOLERANCE = 1.05
_WARM_UP = 300


def run(requests: int, directory: str) -> None:
    """Serve *requests* requests to each application, and exit. Runs under valgrind."""
    apps = counted_applications(directory)
    # Under valgrind requests are slow, so that the cached time would expire too often.
    clock.renew()
    clock.until = inf
    Path(directory, counting.NAMES).write_text(json.dumps(list(apps)))
    for app in apps.values():
        paths.serve(app, _WARM_UP)
        counting.begin()
        paths.serve(app, requests)
        counting.end()
    os._exit(0)


def counted_applications(directory: str) -> dict[str, WSGIApplication]:
    """Return all applications whose requests are counted, by label."""
    # delivery="ship": the thread of a spool would run while requests are counted.
    apps = paths.applications(
        paths.trivial_app, directory, api_url="http://127.0.0.1:9", delivery="ship"
    )
    return {**apps, paths.ENTITLED: paths.entitled_app(), FLASK: paths.flask_app()}


def rows(counts: dict[str, float]) -> list[dict[str, object]]:
    """Return the rows of the table."""
    table_rows: list[dict[str, object]] = []
    for name, counted in counts.items():
        budget, base = BUDGETS.get(name, (None, paths.BARE))
        table_rows.append(
            {
                "request": name,
                "instructions": round(counted),
                "added": round(counted - counts[base]),
                "to": base,
                "budget": budget,
            }
        )
    return table_rows


def table(rows: list[dict[str, object]]) -> str:
    """Return *rows* in Markdown."""
    lines = [
        "| request | instructions | added | in comparison with | budget |",
        "|---|---:|---:|---|---:|",
    ]
    for row in rows:
        budget = f"{row['budget']:,}" if row["budget"] else ""
        lines.append(
            f"| {row['request']} | {row['instructions']:,} | {row['added']:,} "
            f"| {row['to']} | {budget} |"
        )
    return "\n".join(lines)


def over_budget(rows: list[dict[str, object]]) -> list[str]:
    """Return a sentence for each row that exceeds its budget."""
    return [
        f"{row['request']}: expected at most {row['budget']:,} instructions more than "
        f"{row['to']}, got {row['added']:,}"
        for row in rows
        if row["budget"] and row["added"] > row["budget"] * TOLERANCE  # type: ignore[operator]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1_000)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--guard", action="store_true", help="fail above the budgets")
    parser.add_argument("--run", metavar="DIRECTORY", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run(args.requests, args.run)
    counted = rows(
        counting.count("tests.benchmarks.instructions", "--requests", args.requests)
    )
    print(table(counted))
    if args.json:
        args.json.write_text(json.dumps(counted, indent=1) + "\n")
    if args.guard and (exceeded := over_budget(counted)):
        sys.exit("\n".join(exceeded))


if __name__ == "__main__":
    main()

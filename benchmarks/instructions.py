"""How many instructions each way through the middleware adds to a request.

    python -m benchmarks.instructions [--requests 1000] [--json FILE] [--guard]

Counted by valgrind, so the figures are the same on a busy machine and on an idle one.
One process serves so many requests in each way, one after the other; what it executes
before, between and after is not counted, nor is what the kernel does in a system call.
The delivery threads sleep meanwhile: what they do later is not the request's.

With --guard it ends with 1 if a way costs 5 % more than its budget.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import counting, paths
from openmeter_wsgi.timestamps import clock

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

FLASK = "Flask, bare"

#: What a way may cost more than which other, in instructions.
BUDGETS = {
    paths.NO_METERS: (16_500, paths.BARE),
    paths.FILTERED: (16_500, paths.BARE),
    paths.MEMORY: (23_000, paths.BARE),
    paths.SPOOL: (23_500, paths.BARE),
    paths.THREE: (2 * 6_500, paths.MEMORY),
    paths.ENTITLED: (4_500, paths.NO_METERS),
}
#: What the guard lets pass, for another build of CPython or another libc.
TOLERANCE = 1.05
_WARM_UP = 300


def run(requests: int, directory: str) -> None:
    """Serve so many requests in each way, and end at once. Runs under valgrind."""
    apps = ways(directory)
    # Under valgrind a hundredth of a second is over after some requests, not hundreds.
    clock.renew()
    clock.until = inf
    Path(directory, counting.NAMES).write_text(json.dumps(list(apps)))
    for app in apps.values():
        paths.serve(app, _WARM_UP)
        counting.begin()
        paths.serve(app, requests)
        counting.end()
    os._exit(0)


def ways(directory: str) -> dict[str, WSGIApplication]:
    """Return all applications that are counted."""
    # The thread of a spool would look for work while requests are counted.
    found = paths.applications(
        paths.trivial_app, directory, api_url="http://127.0.0.1:9", delivery="ship"
    )
    return {**found, paths.ENTITLED: paths.entitled_app(), FLASK: paths.flask_app()}


def rows(counts: dict[str, float]) -> list[dict[str, object]]:
    """Return what the table says of each way."""
    made: list[dict[str, object]] = []
    for name, counted in counts.items():
        budget, base = BUDGETS.get(name, (None, paths.BARE))
        made.append(
            {
                "way": name,
                "instructions": round(counted),
                "added": round(counted - counts[base]),
                "to": base,
                "budget": budget,
            }
        )
    return made


def table(rows: list[dict[str, object]]) -> str:
    """Return *rows* in Markdown."""
    lines = [
        "| way | instructions | added | to | budget |",
        "|---|---:|---:|---|---:|",
    ]
    for row in rows:
        budget = f"{row['budget']:,}" if row["budget"] else ""
        lines.append(
            f"| {row['way']} | {row['instructions']:,} | {row['added']:,} "
            f"| {row['to']} | {budget} |"
        )
    return "\n".join(lines)


def over_budget(rows: list[dict[str, object]]) -> list[str]:
    """Return a sentence for each way that costs more than it may."""
    return [
        f"{row['way']}: expected at most {row['budget']:,} instructions more than "
        f"{row['to']}, got {row['added']:,}"
        for row in rows
        if row["budget"] and row["added"] > row["budget"] * TOLERANCE  # type: ignore[operator]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1_000)
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument("--guard", action="store_true", help="fail above the budgets")
    parser.add_argument("--run", metavar="DIRECTORY", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        run(given.requests, given.run)
    counted = rows(
        counting.count("benchmarks.instructions", "--requests", given.requests)
    )
    print(table(counted))
    if given.json:
        given.json.write_text(json.dumps(counted, indent=1) + "\n")
    if given.guard and (exceeded := over_budget(counted)):
        sys.exit("\n".join(exceeded))


if __name__ == "__main__":
    main()

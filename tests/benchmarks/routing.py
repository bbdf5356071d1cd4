"""Cost of finding a route, compared with werkzeug's matcher.

    python -m tests.benchmarks.routing [--rounds 15] [--calls 2000]

There are 100 routes, 50 of them exact. A round times werkzeug's matcher with the same
rules, a variable route and an exact one, one after the other. A figure is the ratio
to the matcher in the same round.
"""

from __future__ import annotations

import gc
import time
from typing import TYPE_CHECKING, Any

from werkzeug.routing import Map, Rule

from openmeter_wsgi.routes import RouteRule, Routes
from tests.benchmarks import report

if TYPE_CHECKING:
    from collections.abc import Callable

_RULES = [f"/v1/thing{n}/<id>" for n in range(50)]
_RULES += [f"/v1/exact{n}" for n in range(50)]

VARIABLE = "a variable route, one of 100, ÷ werkzeug's matcher"
EXACT = "an exact route, one of 100, ÷ werkzeug's matcher"
#: Maximum ratio to the time of the matcher.
_TARGETS = {VARIABLE: 1.15, EXACT: 0.15}


def measure(rounds: int, calls: int) -> list[report.Row]:
    """Return the ratios of all rounds."""
    routes = Routes([(RouteRule(rule), rule) for rule in _RULES], None)
    adapter = Map([Rule(rule, endpoint=rule) for rule in _RULES]).bind("")
    paths = {VARIABLE: "/v1/thing37/5", EXACT: "/v1/exact37"}
    found_ratios: dict[str, list[float]] = {label: [] for label in paths}
    for turn in range(rounds + 1):
        gc.collect()
        matched = _seconds(adapter.match, paths[VARIABLE], calls)
        for label, path in paths.items():
            environ = {"REQUEST_METHOD": "GET", "PATH_INFO": path}
            taken = _seconds(routes.find, environ, calls)
            if turn:  # the first round warms up
                found_ratios[label].append(taken / matched)
    return [
        report.Row(label, "x", ratios, _TARGETS[label])
        for label, ratios in found_ratios.items()
    ]


def _seconds(call: Callable[[Any], object], argument: object, calls: int) -> float:
    began = time.thread_time()
    for _ in range(calls):
        call(argument)
    return time.thread_time() - began


def main() -> None:
    parser = report.arguments(__doc__, rounds=15, calls=2_000)
    args = parser.parse_args()
    report.show("Routes", measure(args.rounds, args.calls), args.json)


if __name__ == "__main__":
    main()

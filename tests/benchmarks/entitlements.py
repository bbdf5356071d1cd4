"""Cost of the decision on a request's entitlements.

    python -m tests.benchmarks.entitlements [--rounds 25] [--calls 2000]

Every round times all kinds of decision one after the other, so that a busy machine
slows all of them. A figure is the median over the rounds, with the smallest and the
largest value. A ratio is to a cachetools.TTLCache behind a lock, in the same round.
The last two rows are whole requests with a cached answer, while OpenMeter answers
and while it hangs.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import platform
import statistics
import sys
import threading
import timeit
from typing import TYPE_CHECKING, Any

import requests
from cachetools import TTLCache

from openmeter_wsgi import OpenMeterMiddleware, Policy
from openmeter_wsgi.request import record_of
from openmeter_wsgi.sandbox import Sandbox
from tests.benchmarks.paths import serve, trivial_app

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Maximum time to find a cached answer: in µs, and divided by that of the TTLCache.
MOST_MICROSECONDS, MOST_RATIO = 0.6, 0.4
FEATURES = ("api_requests", "exports", "searches")
FRESH = "find the cached answer"
TTL_CACHE = "`TTLCache` behind a lock"


@contextlib.contextmanager
def granting() -> Iterator[Sandbox]:
    """Run a sandbox in which 'acme' has access to all features."""
    meter = {"slug": "api_requests", "eventType": "api_requests",
             "aggregation": "SUM", "valueProperty": "$.total"}  # fmt: skip
    with Sandbox() as sandbox:
        made = requests.post(f"{sandbox.url}/api/v1/meters", json=meter, timeout=10)
        made.raise_for_status()
        sandbox.grant("acme", FEATURES[0], 1_000_000_000)
        for feature in FEATURES[1:]:
            sandbox.grant("acme", feature, config={"on": True})
        yield sandbox


def middleware(sandbox: Sandbox, **options: Any) -> OpenMeterMiddleware:
    usual: dict[str, Any] = {
        "api_url": sandbox.url,
        "on_missing_subject": "acme",
        "required_entitlements": FEATURES[:1],
        "meters": {"api_requests": 1},
        "allow_ttl": 3_600.0,
        "flush_interval": 3_600.0,
        "batch_size": 100_000,
        "shutdown_timeout": 0.0,
    }
    return OpenMeterMiddleware(trivial_app, Policy(**{**usual, **options}))


#: The timed statement of each row. The environ is empty, as it is not the subject.
STATEMENTS = {
    TTL_CACHE: "with lock: cache.get('acme')",
    FRESH: "fresh('acme')",
    "find the subject and the answer, and count the decision": "admit({})",
    "the same, and count down the quota until the request is settled": (
        "environ = {}; admit_counted(environ); settle(record(environ), static, 'acme')"
    ),
    "find the cached answers of three features": "decide('acme', FEATURES, 'closed')",
}


@contextlib.contextmanager
def timers(sandbox: Sandbox) -> Iterator[dict[str, timeit.Timer]]:
    """Yield the timer of each row."""
    apps = [middleware(sandbox), middleware(sandbox, entitlement_meters=FEATURES[:1])]
    plain, counted = (app.process() for app in apps)
    cache: TTLCache[str, bool] = TTLCache(10_000, 60.0)
    cache["acme"] = True
    names = {
        "FEATURES": FEATURES,
        "cache": cache,
        "lock": threading.Lock(),
        "fresh": plain.entitlements.fresh_decisions(FEATURES[0]),
        "decide": plain.entitlements.decide,
        "admit": plain.billing.gate.admit,
        "admit_counted": counted.billing.gate.admit,
        "settle": counted.billing.gate.settle_reservations,
        "record": record_of,
        "static": counted.billing.gate.policy.static_meters,
    }
    assert plain.billing.gate.admit({}).allowed
    assert counted.billing.gate.admit({}).allowed
    assert plain.entitlements.decide("acme", FEATURES, "closed").allowed
    # Local variables of the timed loop, as in a function.
    setup = "; ".join(f"{name} = names['{name}']" for name in names)
    try:
        yield {
            name: timeit.Timer(statement, setup, globals={"names": names})
            for name, statement in STATEMENTS.items()
        }
    finally:
        for app in apps:
            app.close(60)


def measure(sandbox: Sandbox, rounds: int, calls: int) -> dict[str, list[float]]:
    """Return the µs of one call for each row, by round."""
    times: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    with timers(sandbox) as row_timers:
        for turn in range(rounds + 1):
            gc.collect()
            for name, timer in row_timers.items():
                taken = timer.timeit(calls) / calls * 1e6
                if turn:  # the first round warms up
                    times[name].append(taken)
    return times


def measure_outage(rounds: int, calls: int) -> dict[str, list[float]]:
    """Return the µs of requests while OpenMeter answers and while it hangs."""
    with granting() as answering, granting() as hanging:
        # A cached answer is used beyond its TTL while it is asked for again.
        short: dict[str, Any] = {"allow_ttl": 1.0, "entitlement_timeout": 0.9}
        apps = {
            "a request, OpenMeter answers": middleware(answering, **short),
            "a request, OpenMeter hangs": middleware(hanging, **short),
        }
        for app in apps.values():
            serve(app, 100)
        hanging.faults.entitlements.set(hang=600)
        times: dict[str, list[float]] = {name: [] for name in apps}
        for _ in range(rounds):
            for name, app in apps.items():
                times[name] += [serve(app, 1) * 1e6 for _ in range(calls)]
        hanging.faults.clear()
        for app in apps.values():
            app.close(60)
        return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--calls", type=int, default=2_000)
    args = parser.parse_args()
    # The log would say that OpenMeter hangs.
    logging.getLogger("openmeter_wsgi").addHandler(logging.NullHandler())
    with granting() as sandbox:
        times = measure(sandbox, args.rounds, args.calls)
    ratios = {
        name: [a / b for a, b in zip(values, times[TTL_CACHE], strict=True)]
        for name, values in times.items()
    }
    outage = measure_outage(args.rounds, args.calls)
    print(f"{platform.python_implementation()} {platform.python_version()}, ", end="")
    print(f"{args.rounds} rounds of {args.calls} calls\n")
    print("| decision | median, µs | median, ÷ `TTLCache` |")
    print("|---|---|---|")
    for name, values in times.items():
        print(f"| {name} | {_spread(values)} | {_spread(ratios[name])} |")
    for name, values in outage.items():
        p99 = statistics.quantiles(values, n=100)[98]
        print(f"| {name} | {statistics.median(values):.1f} (p99 {p99:.1f}) | |")
    hit, ratio = (statistics.median(values[FRESH]) for values in (times, ratios))
    most = f"{MOST_MICROSECONDS} µs, {MOST_RATIO} of a `TTLCache`"
    print(f"\n{FRESH}: {hit:.2f} µs, {ratio:.2f} of a `TTLCache` (at most {most})")
    if hit > MOST_MICROSECONDS or ratio > MOST_RATIO:
        sys.exit(1)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()

"""What a decision costs, as far as a busy machine can say it: in relation."""

import statistics

from benchmarks import entitlements


def test_a_known_decision_costs_less_than_half_of_a_ttl_cache():
    with entitlements.granting() as sandbox:
        times = entitlements.measure(sandbox, rounds=9, calls=500)

    found, cached = (times[way] for way in (entitlements.FRESH, entitlements.TTL_CACHE))
    ratios = [one / other for one, other in zip(found, cached, strict=True)]
    assert statistics.median(ratios) <= entitlements.MOST_RATIO


def test_requests_are_timed_while_openmeter_answers_and_while_it_hangs():
    times = entitlements.measure_outage(rounds=2, calls=50)

    assert [len(of) for of in times.values()] == [100, 100]

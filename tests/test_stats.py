"""Counts of several processes together, and those of one process."""

import msgspec

from entitling import ask, middleware
from metrics_app import answer
from openmeter_wsgi import meter
from openmeter_wsgi.stats import BOUNDS, Counts, Durations, RunningDurations

EMPTY = Counts().stats(
    waiting=0, waiting_in_spool=0, waiting_bytes=0, oldest_at=None, not_metered={}
)


def changed(**figures):
    return msgspec.structs.replace(EMPTY, **figures)


def test_counts_of_processes_add_up():
    one = changed(
        settled=5,
        not_metered_by_policy={"default": {"status": 1}},
        dropped={"queue_full": 2, "late": 1},
        attempt_seconds=Durations((1, *[0] * len(BOUNDS)), 0.5),
        oldest_at=7.0,
    )
    two = changed(
        settled=2,
        not_metered_by_policy={"default": {"status": 2, "options": 1}, "/a": {"x": 1}},
        dropped={"queue_full": 1},
        attempt_seconds=Durations((2, *[0] * len(BOUNDS)), 0.25),
        oldest_at=3.0,
    )

    total = one + two

    assert total.settled == 7
    assert total.not_metered_by_policy == {
        "default": {"status": 3, "options": 1},
        "/a": {"x": 1},
    }
    assert total.dropped == {"queue_full": 3, "late": 1}
    assert total.lost == 3
    assert total.attempt_seconds == Durations((3, *[0] * len(BOUNDS)), 0.75)
    assert total.oldest_at == 3.0
    assert (one + EMPTY).oldest_at == 7.0


def test_what_waits_in_a_spool_is_counted_once():
    one = changed(events=8, waiting=12, waiting_in_spool=10)
    two = changed(events=5, waiting=11, waiting_in_spool=10)

    total = one + two

    assert (total.waiting, total.waiting_in_spool) == (13, 10)
    assert total.unaccounted == 0


def test_an_event_of_which_nothing_is_known_is_unaccounted():
    stats = changed(
        events=10, delivered=4, waiting=2, dead_lettered=1, dropped={"too_large": 1}
    )

    assert stats.unaccounted == 2


def test_durations_are_counted_by_their_class_and_fetched_once():
    running = RunningDurations()
    running.add(7)
    assert running.fetch_recent() == []
    running.add(0.005)
    running.add(9_999)

    assert running.fetch_recent() == [0.005, 9_999]
    assert running.fetch_recent() == []
    counts = running.snapshot().counts
    assert counts[0] == counts[BOUNDS.index(10.0)] == counts[-1] == 1
    assert sum(counts) == 3


def test_what_two_policies_of_one_name_did_not_meter_is_told_together(openmeter):
    def view(request):
        return request

    metered = meter(meters={"views": 1})(view)

    def app(environ, start_response):
        metered(environ)
        return answer({**environ, "PATH_INFO": "/missing"}, start_response)

    # Under each route the view has a policy of its own, and both have its name.
    guarded = middleware(
        openmeter,
        app,
        required_entitlements=[],
        routes={"/a": {"subject_path": "a"}, "/b": {"subject_path": "b"}},
    )
    for path in ("/a", "/b", "/b"):
        ask(guarded, PATH_INFO=path)
    stats = guarded.stats()

    (name,) = stats.not_metered_by_policy
    assert "view" in name
    assert stats.not_metered == {"status": 3}
    assert stats.settled == stats.metered + sum(stats.not_metered.values())

"""What the benchmarks say holds, as far as a busy machine can say it."""

import statistics
from xml.etree import ElementTree

from benchmarks import (
    delivery,
    entitlements,
    growing,
    latency,
    memory,
    pacing,
    plot,
    report,
    start,
)

SVG = "{http://www.w3.org/2000/svg}"


def test_a_known_decision_costs_less_than_half_of_a_ttl_cache():
    with entitlements.granting() as sandbox:
        times = entitlements.measure(sandbox, rounds=9, calls=500)

    found, cached = (times[way] for way in (entitlements.FRESH, entitlements.TTL_CACHE))
    ratios = [one / other for one, other in zip(found, cached, strict=True)]
    assert statistics.median(ratios) <= entitlements.MOST_RATIO


def test_requests_are_timed_while_openmeter_answers_and_while_it_hangs():
    times = entitlements.measure_outage(rounds=2, calls=50)

    assert [len(of) for of in times.values()] == [100, 100]


def test_the_import_starts_no_thread_and_opens_no_file(tmp_path):
    found = start.imported(str(tmp_path))

    assert found.threads == 0
    assert found.descriptors == 0
    assert found.added > 0


def test_a_waiting_event_costs_no_more_memory_than_it_may():
    assert 250 <= memory.held(50_000) / 50_000 <= memory.MOST_BYTES


def test_delivery_is_measured_from_memory_and_from_a_spool():
    # Longer than the spool gathers: else nothing of it would be delivered meanwhile.
    rows = {row.what: row for row in delivery.measure(1, 2.0, 3_000)}

    assert len(rows) == 9
    assert all(row.median > 0 for row in rows.values())


def test_workers_append_to_one_spool(tmp_path):
    assert growing.workers(3, str(tmp_path / "spool"))["append, spool"] > 0


def test_every_request_at_a_pace_is_answered_while_openmeter_is_away(tmp_path):
    variables = {"BENCH_LOOPS": "10", "TMPDIR": str(tmp_path)}
    with latency.serving(("away", True, True), variables, "") as port:
        assert len(pacing.ask(port, 100, 0.5)) == 50


def test_a_plot_has_a_point_for_each_figure_and_names_its_series():
    drawn = plot.plot(
        {"a < b": {1: 10.0, 1_000: 30.0}, "c": {1: 5.0}}, across="n", upwards="ns"
    )

    document = ElementTree.fromstring(drawn)
    texts = [each.text for each in document.iter(f"{SVG}text")]
    assert len(list(document.iter(f"{SVG}circle"))) == 3
    assert {"a < b", "c", "1,000", "n", "ns"} <= set(texts)


def test_a_figure_says_whether_its_target_is_met():
    assert report.Row("a", "ms", [1.0, 2.0, 9.0], 2.0).met
    assert not report.Row("a", "ms", [1.0, 3.0, 9.0], 2.0).met
    assert not report.Row("a", "1/s", [1.0], 2.0, at_least=True).met
    assert report.Row("a", "ms", [1.0]).met is None

"""Tests of the benchmarks, which do not depend on the speed of the machine."""

import contextlib
import sys
from xml.etree import ElementTree

import pytest

from tests.benchmarks import (
    delivery,
    entitlements,
    growing,
    latency,
    memory,
    pacing,
    paths,
    peers,
    plot,
    report,
    request_cost,
    routing,
    sink,
    socket_cost,
    start,
    waiting,
)

SVG = "{http://www.w3.org/2000/svg}"


def test_a_known_decision_is_timed_beside_a_ttl_cache():
    with entitlements.granting() as sandbox:
        times = entitlements.measure(sandbox, rounds=2, calls=50)

    assert {entitlements.FRESH, entitlements.TTL_CACHE} < times.keys()
    assert [len(of) for of in times.values()] == [2] * len(entitlements.STATEMENTS)


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
    # Longer than the spool collects events, so that some are delivered in this time.
    rows = {row.what: row for row in delivery.measure(1, 2.0, 3_000)}

    assert len(rows) == 9
    assert all(row.median > 0 for row in rows.values())


def test_a_backlog_that_is_gone_at_once_is_followed_by_others():
    with sink.running_sink() as url:
        middleware = waiting.middleware(url)

        assert delivery.percent_of_throughput(middleware, 0) > 0

        assert middleware.stats().waiting == 0
        middleware.close(60)


def test_a_stream_over_a_socket_is_timed_beside_a_bare_one():
    [row] = socket_cost.measure(rounds=2, chunks=20)

    assert len(row.measured) == 2
    assert row.median > 0


def test_both_kinds_of_routes_are_timed_beside_werkzeugs_matcher():
    rows = routing.measure(rounds=2, calls=100)

    assert [len(row.measured) for row in rows] == [2, 2]
    assert all(row.median > 0 for row in rows)


def test_a_peer_is_timed_in_a_process_of_its_own_and_a_missing_one_says_why(tmp_path):
    installed = dict.fromkeys([each.name for each in peers.PEERS], sys.executable)
    moesif = peers.PEERS[1].name
    installed[moesif] = peers.UnavailableError("no such release")
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(sink.running_sink())
        compared = request_cost.Compared(peers.FLASK, url, installed, stack)
        found = request_cost.measure(
            paths.flask_app(), url, str(tmp_path), rounds=2, requests=50,
            compared=compared,
        )  # fmt: skip

    lines = list(request_cost.rows(peers.FLASK, found, compared.missing))
    # This interpreter has the SDK of OpenMeter, but neither of the other two.
    assert [len(of.added) for of in found.values()] == [2] * (len(found))
    assert {peers.THIS_PACKAGE.name, peers.PEERS[-1].name} <= found.keys()
    assert f"| Flask | {moesif} | not measured: no such release | | |" in lines
    assert sum("ModuleNotFoundError: No module named" in line for line in lines) == 2


def test_a_peer_that_cannot_be_installed_says_why(tmp_path):
    peer = peers.Peer("nobody", ("not a requirement",))

    with pytest.raises(peers.UnavailableError, match=r"(?i)requirement"):
        peers.interpreter(peer, tmp_path)

    assert not (tmp_path / "nobody" / "installed.txt").exists()


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

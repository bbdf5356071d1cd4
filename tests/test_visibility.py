"""The mark *visible until*: only events that OpenMeter lists move it."""

import dataclasses
import itertools
import threading
from functools import partial
from urllib.parse import quote

import msgspec
import pytest

from entitling import (
    Entitled,
    ask,
    close_all,
    document,
    metered,
    middleware,
    sandbox_with_meter,
    wait_for,
)
from ledger_contract import START, Clock
from openmeter_server import Answer, problem
from openmeter_wsgi import OpenMeterMiddleware
from openmeter_wsgi.delivery.client import OpenMeterClient
from openmeter_wsgi.entitlements import service, visibility_probes
from openmeter_wsgi.quota.visibility_mark import MAX_PROBES, FixedLag, Probes, sample
from openmeter_wsgi.spool.delivery import SpoolDelivery
from openmeter_wsgi.stats import Counts
from test_entitlements import ok

pytestmark = pytest.mark.usefixtures("patient_ledger")


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def probes(clock):
    return Probes(600.0, clock)


def test_without_any_batch_all_that_was_delivered_is_visible(probes):
    probes.close_group(START)

    assert probes.visible_until == START


def test_the_mark_stands_still_until_every_probe_is_listed(probes):
    probes.close_group(START)
    probes.add(["a", "b"])
    probes.close_group(START + 1)
    probes.add(["c"])
    probes.close_group(START + 2)

    assert probes.visible_until == START
    probes.note_listed(["a", "c"])
    assert probes.visible_until == START
    assert probes.oldest_unlisted(10) == ["b"]
    probes.note_listed(["b"])
    assert probes.visible_until == START + 2
    assert probes.oldest_unlisted(10) == []


def test_a_batch_is_covered_by_the_next_mark_and_not_by_the_last(probes):
    probes.close_group(START)
    probes.add(["a"])

    probes.note_listed(["a"])  # before its group has a mark
    assert probes.visible_until == START

    probes.close_group(START + 1)
    probes.note_listed(["a"])
    assert probes.visible_until == START + 1


def test_of_large_batches_a_few_ids_are_looked_for_spread_over_them(probes):
    ids = [f"id-{n}" for n in range(500)]
    for _ in range(20):
        probes.add(ids)
    probes.close_group(START)

    due = probes.oldest_unlisted(1_000)
    assert len(due) == MAX_PROBES
    assert {"id-0", "id-499"} <= {*sample(ids)}
    assert len(sample(ids)) == MAX_PROBES


def test_the_oldest_probes_are_looked_for_first(probes):
    for n in range(50):
        probes.add([f"{n}-{m}" for m in range(MAX_PROBES)])
        probes.close_group(START + n)

    assert [one.partition("-")[0] for one in probes.oldest_unlisted(16)] == [
        "0"
    ] * 8 + ["1"] * 8


def test_a_probe_that_is_never_listed_counts_as_visible_after_a_while(
    probes, clock, caplog
):
    probes.close_group(START)
    probes.add(["lost"])
    probes.close_group(START + 1)
    clock.now += 300
    probes.add(["late"])
    probes.close_group(START + 301)
    clock.now += 299
    assert probes.oldest_unlisted(10) == ["lost", "late"]

    clock.now += 2
    assert probes.oldest_unlisted(10) == ["late"]

    assert probes.visible_until == START + 1
    assert "lost" in caplog.text
    assert len(caplog.records) == 1
    assert probes.lag == 301


def test_the_next_sender_goes_on_where_the_last_one_ended(probes, clock):
    probes.add(["a"])
    probes.close_group(START)
    probes.add(["b"])
    written = msgspec.json.encode(probes.state())

    other = Probes(600.0, clock)
    other.restore(msgspec.json.decode(written, type=type(probes.state())))
    other.add(["c"])
    other.close_group(START + 5)

    assert other.oldest_unlisted(10) == ["a", "b", "c"]
    other.note_listed(["a", "c"])
    assert other.visible_until == START
    other.note_listed(["b"])
    assert other.visible_until == START + 5


def test_a_fixed_lag_is_told_by_the_clock(clock):
    mark = FixedLag(clock, 5.0, clock)

    told = []
    for _ in range(10):
        told.append(mark.until())
        clock.now += 1

    assert told == [0.0] * 5 + [START + n for n in range(5)]


# -- With a server


FEATURE = "api_requests"


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr(visibility_probes, "INTERVAL", 0.05)
    monkeypatch.setattr("openmeter_wsgi.quota.ledger._MAINTENANCE_INTERVAL", 0.05)


@pytest.fixture
def sandbox():
    with sandbox_with_meter(FEATURE) as sandbox:
        yield sandbox


OPTIONS = {
    "meters": {FEATURE: 1}, "required_entitlements": [FEATURE],
    "entitlement_meters": [FEATURE], "entitlement_timeout": 30, "shutdown_timeout": 5,
    "flush_interval": 0.05, "allow_ttl": 0.2, "deny_ttl": 0.2, "question_rate": 1_000,
}  # fmt: skip


@pytest.fixture
def make(hurried, tmp_path):
    made = []

    def make(url, where, **options):
        spool = str(tmp_path / "spool") if where == "spool" else None
        usual = {**OPTIONS, "spool_dir": spool, "api_url": url}
        made.append(OpenMeterMiddleware(ok, **{**usual, **options}))
        return made[-1]

    yield make
    close_all(made)


def serve(app, requests):
    return sum(ask(app).status == "200 OK" for _ in range(requests))


def refused(app, times=30):
    """See that nothing is to be had, over many answers of OpenMeter."""
    for _ in range(times):
        assert ask(app).status.startswith("429")
        threading.Event().wait(0.02)


@pytest.mark.parametrize("where", ["memory", "spool"])
def test_usage_that_is_not_visible_yet_is_not_granted_twice(sandbox, make, where):
    sandbox.store.visible_after = 3_600
    sandbox.grant("acme", FEATURE, 10)
    app = make(sandbox.url, where)

    assert serve(app, 20) == 10
    assert app.flush(40)
    asked = sandbox.asked(kind="value_v2")
    wait_for(lambda: ask(app) and sandbox.asked(kind="value_v2") > asked + 3)
    refused(app)

    assert sandbox.value("acme", FEATURE)["balance"] == 10  # as OpenMeter has it
    sandbox.store.visible_after = 0
    sandbox.grant("acme", FEATURE, 5)
    passed = itertools.count(1)
    wait_for(lambda: ask(app).status == "200 OK" and next(passed) == 5)
    refused(app, 5)


@pytest.mark.parametrize("where", ["memory", "spool"])
def test_a_mark_follows_the_list(sandbox, make, where):
    sandbox.grant("acme", FEATURE, 1_000)
    app = make(sandbox.url, where)
    mark = app.process().entitlements._visibility
    ask(app)

    before = mark.until()
    wait_for(lambda: ask(app) and mark.until() > before + 1)
    sandbox.store.visible_after = 3_600
    assert ask(app).status == "200 OK"
    assert app.flush(40)
    wait_for(lambda: mark.lag > 1)
    stopped = mark.until()
    wait_for(lambda: mark.lag > 1.5)
    assert mark.until() == stopped

    sandbox.store.visible_after = 0
    wait_for(lambda: mark.until() > stopped)


def test_a_process_that_does_not_send_reads_the_mark_of_the_one_that_does(
    sandbox, make
):
    sandbox.store.visible_after = 3_600
    sandbox.grant("acme", FEATURE, 10)
    apps = [make(sandbox.url, "spool") for _ in range(2)]
    assert sum(serve(app, 20) for app in apps) == 10
    sending = [app.process().transport.is_sender for app in apps]
    assert sorted(sending) == [False, True]

    for app in apps:
        assert app.flush(40)
        refused(app)

    sandbox.store.visible_after = 0
    sandbox.grant("acme", FEATURE, 4)
    (other,) = (app for app, sends in zip(apps, sending, strict=True) if not sends)
    passed = itertools.count(1)
    wait_for(lambda: ask(other).status == "200 OK" and next(passed) == 4)
    refused(other, 5)


def test_a_shipped_spool_has_a_mark(sandbox, make, tmp_path):
    sandbox.store.visible_after = 3_600
    sandbox.grant("acme", FEATURE, 10)
    app = make(sandbox.url, "spool", delivery="ship")
    assert serve(app, 10) == 10
    policy = app.process().billing.policy
    policy = dataclasses.replace(policy, delivery="thread")
    mark = service.visibility_of(policy)
    client = partial(
        OpenMeterClient, url=sandbox.url, flavor="v1", key=policy.key, timeout=30
    )
    shipping = SpoolDelivery(policy, client, Counts(), listener=mark)
    service.follow_delivery(policy, mark, shipping, None)
    shipping.start()
    wait_for(lambda: app.process().entitlements._visibility.lag > 1)
    refused(app, 5)

    sandbox.store.visible_after = 0
    sandbox.grant("acme", FEATURE, 5)

    passed = itertools.count(1)
    wait_for(lambda: ask(app).status == "200 OK" and next(passed) == 5)
    shipping.close(10)
    mark.close()


def test_a_lost_event_closes_no_quota_for_ever(sandbox, make, caplog):
    sandbox.grant("acme", FEATURE, 5)
    app = make(sandbox.url, "memory", max_visibility_lag=1.0)
    sandbox.faults.ingest.set(forget=True)
    assert serve(app, 10) == 5
    assert app.flush(40)
    sandbox.faults.clear()
    refused(app, 5)

    wait_for(lambda: ask(app).status == "200 OK")

    assert "does not list it" in caplog.text


@pytest.mark.parametrize(
    ("where", "status"),
    [("memory", 404), ("memory", 501), ("spool", 401), ("spool", 403)],
)
def test_where_nothing_may_be_listed_a_fixed_lag_holds(
    openmeter, hurried, caplog, where, status, tmp_path
):
    entitled = Entitled(openmeter)
    entitled.values["acme"] = {FEATURE: metered(5)}
    openmeter.rule = lambda request: (
        problem(status, "no role")
        if request.target.startswith("/api/v2/events")
        else entitled(request)
    )
    spool = str(tmp_path / "spool") if where == "spool" else None
    app = middleware(
        openmeter, ok, **{**OPTIONS, "spool_dir": spool, "visibility_lag": 0.5}
    )
    assert serve(app, 10) == 5

    wait_for(lambda: ask(app).status == "200 OK")  # it is granted anew, to be exact

    warned = [r for r in caplog.records if "does not list events" in r.getMessage()]
    assert [r.levelname for r in warned] == ["WARNING"]
    assert f"status {status}: no role" in warned[0].getMessage()
    close_all([app])


def test_an_answer_that_is_too_large_is_asked_for_in_parts(
    openmeter, hurried, monkeypatch
):
    entitled = Entitled(openmeter)
    entitled.values["acme"] = {FEATURE: metered(1_000)}
    asked = []

    def rule(request):
        if not request.target.startswith("/api/v2/events"):
            return entitled(request)
        ids = [one for one in openmeter.ids if quote(one, safe="") in request.target]
        asked.append(len(ids))
        if len(ids) > 2:
            return Answer(200, b"[" * 2_000_000)
        return document({"items": [{"event": {"id": one}} for one in ids]})

    openmeter.rule = rule
    app = middleware(openmeter, ok, **OPTIONS)
    mark = app.process().entitlements._visibility
    assert serve(app, 8) == 8
    assert app.flush(40)
    delivered = app.process().transport.delivered_until()

    wait_for(lambda: mark.until() > delivered)

    assert max(asked) > 2
    close_all([app])

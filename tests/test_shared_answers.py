"""A process that starts asks nothing that another one has asked."""

import time

import pytest

from entitling import (
    NO,
    YES,
    ask,
    close_all,
    document,
    metered,
    middleware,
    wait_for,
)
from openmeter_server import problem
from test_entitlements import body, header, in_an_hour, ok

pytestmark = pytest.mark.usefixtures("patient_ledger")


@pytest.fixture
def make(openmeter, entitled, tmp_path):
    """A function that makes applications which share a spool like several processes."""
    made = []

    def make(**options):
        shared = {"spool_dir": str(tmp_path / "spool"), "deny_ttl": 3_600}
        made.append(middleware(openmeter, ok, **{**shared, **options}))
        return made[-1]

    yield make
    openmeter.heal()
    close_all(made)


def wait_until_shared(app, entitled, customer="acme", feature="searches"):
    """Wait until the answer is in the store."""
    shared = app.process().entitlements._shared
    wait_for(lambda: shared.get(customer, [feature]) != [None])


@pytest.mark.parametrize(
    ("value", "status"),
    [(YES, "200"), (NO, "403"), (metered(40), "200"), (metered(0), "429")],
    ids=["yes", "no", "metered", "spent"],
)
def test_a_second_process_asks_nothing(make, entitled, value, status):
    entitled.values["acme"] = {"searches": value}
    entitled.terms["acme", "searches"] = in_an_hour()
    first = make(usage_headers=True)
    assert ask(first).status.startswith(status)
    wait_until_shared(first, entitled)
    wait_for(lambda: "balance" not in value or entitled.asked_terms)
    wait_for(lambda: not first.process().entitlements._lookup._pending)
    asked, asked_terms = entitled.questions, entitled.asked_terms.copy()

    responses = [ask(make(usage_headers=True)) for _ in range(3)]

    assert {response.status[:3] for response in responses} == {status}
    assert (entitled.questions, entitled.asked_terms) == (asked, asked_terms)
    if "balance" in value:
        resets = [int(header(r, "RateLimit-Reset")) for r in responses]
        assert min(resets) > 3_500


def test_an_answer_ages_from_the_moment_it_was_asked(make, entitled):
    entitled.values["acme"] = {"searches": YES}
    first = make()
    ask(first)
    wait_until_shared(first, entitled)
    known = first.process().entitlements.cached_answer("acme", "searches")

    second = make()
    ask(second)

    taken_over = second.process().entitlements.cached_answer("acme", "searches")
    assert taken_over.asked_at == pytest.approx(known.asked_at, abs=0.1)


def test_a_shared_denial_that_has_aged_is_asked_for_anew(make, entitled):
    entitled.values["acme"] = {"searches": NO}
    first = make(deny_ttl=0.05)
    ask(first)
    wait_until_shared(first, entitled)
    entitled.values["acme"] = {"searches": YES}
    aged = time.monotonic() + 0.06
    wait_for(lambda: time.monotonic() > aged)

    assert ask(make(deny_ttl=0.05)).status == "200 OK"


def test_during_an_outage_a_new_process_knows_what_others_knew(make, entitled):
    entitled.values = {"good": {"searches": YES}, "bad": {"searches": NO}}
    first = make()
    for name in ("good", "bad"):
        ask(first, name)
        wait_until_shared(first, entitled, name)
    entitled.instead = problem(500)

    second = make(fail_mode="closed")

    assert ask(second, "good").status == "200 OK"
    assert ask(second, "bad").status == "403 Forbidden"
    assert ask(second, "new").status.startswith("503")


def test_what_is_invalidated_is_forgotten_in_the_store_too(make, entitled):
    entitled.values["acme"] = {"searches": NO}
    first = make()
    ask(first)
    wait_until_shared(first, entitled)
    entitled.values["acme"] = {"searches": YES}

    first.invalidate("acme")

    assert ask(first).status == "200 OK"
    assert ask(make()).status == "200 OK"


def test_who_is_no_customer_takes_no_room_in_the_store(make, entitled):
    first = make()
    assert body(ask(first, "nobody"))["reason"] == "unknown_customer"
    wait_for(lambda: not first.process().entitlements._lookup._pending)

    assert first.process().entitlements._shared.get("nobody", ["searches"]) == [None]


def test_the_customer_of_a_subject_is_shared_with_its_answer(make, entitled, openmeter):
    entitled.values["corp"] = {"searches": metered(10)}
    corp = {"id": "corp", "key": "corp", "name": "c",
            "usageAttribution": {"subjectKeys": ["alice", "bob"]}}  # fmt: skip
    page = {"items": [corp], "page": 1, "pageSize": 100, "totalCount": 1}
    openmeter.rule = lambda request: (
        document(page) if "?subject=" in request.target else entitled(request)
    )
    counted = {"entitlement_meters": ["searches"], "meters": {"searches": 1}}
    first = make(**counted)
    assert [ask(first, "alice").status for _ in range(6)] == ["200 OK"] * 6
    wait_until_shared(first, entitled, "alice")

    second = make(**counted)

    statuses = [ask(second, "alice").status[:3] for _ in range(6)]
    assert statuses == ["200"] * 4 + ["429"] * 2


def test_a_document_of_another_version_is_no_answer(make, entitled):
    entitled.values["acme"] = {"searches": YES}
    first = make()
    ask(first)
    wait_until_shared(first, entitled)
    store = first.process().entitlements._shared._store
    store.share("acme\0searches", b'{"answer":3}', time.time() + 1)

    assert ask(make()).status == "200 OK"
    assert entitled.questions == 2

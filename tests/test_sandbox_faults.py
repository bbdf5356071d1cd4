"""Faults on purpose, for ingest and for questions about entitlements apart."""

import math
import threading
import time

import pytest
import requests

from openmeter_wsgi.sandbox import Sandbox
from spooling import PATIENCE, until
from test_sandbox_support import Api, event

QUESTIONS = [
    "/api/v1/subjects/acme/entitlements/sso/value",
    "/api/v1/customers/acme/entitlements/sso/value",
    "/api/v2/customers/acme/entitlements/sso/value",
    "/api/v1/customers/acme/access",
    "/api/v2/customers/acme/entitlements/sso",
    "/api/v2/customers/acme/entitlements",
]
GROUPS = ("ingest", "entitlements")
RIGHT = {
    "failRate": 0.0, "latency": 0.0, "hang": 0.0, "outage": False, "retryAfter": None,
}  # fmt: skip


@pytest.fixture
def sandbox():
    with Sandbox() as sandbox:
        sandbox.grant("acme", "sso")
        yield sandbox


@pytest.fixture
def api(sandbox):
    with Api(sandbox.url) as api:
        api.post("/api/v1/subjects", json=[{"key": "acme"}])
        yield api


def statuses(api, number=1):
    """What ingest and a question are answered with."""
    ingested = api.ingest(event(number)).status_code
    return ingested, {api.get(question).status_code for question in QUESTIONS}


@pytest.mark.parametrize(
    ("group", "expected"),
    [("ingest", (503, {200})), ("entitlements", (204, {503})), (None, (503, {503}))],
)
def test_an_outage_is_of_ingest_or_of_questions_or_of_both(
    sandbox, api, group, expected
):
    faults = getattr(sandbox.faults, group) if group else sandbox.faults

    faults.set(outage=True)
    during = statuses(api)
    faults.clear()

    assert during == expected
    assert statuses(api, 2) == (204, {200})


def test_an_outage_takes_nothing_and_is_counted(sandbox, api):
    sandbox.faults.ingest.set(outage=True)

    problem = api.ingest(event()).json()

    assert problem["status"] == 503
    assert api.events() == []
    counts = api.overview()["counts"]
    assert (counts["failed"], counts["refused"]) == (1, 0)


def test_a_limit_says_when_to_come_back(sandbox, api):
    sandbox.faults.set(retry_after=2.5)

    answers = [api.ingest(event()), *(api.get(question) for question in QUESTIONS)]

    assert {answer.status_code for answer in answers} == {429}
    assert {answer.headers["Retry-After"] for answer in answers} == {"3"}
    assert api.overview()["refusals"] == []


def test_creating_entitlements_and_the_page_have_no_faults(sandbox, api):
    sandbox.faults.set(outage=True, fail_rate=1.0)
    api.post("/api/v1/features", json={"key": "more", "name": "More"})

    answer = api.post(
        "/api/v2/customers/acme/entitlements",
        json={"type": "boolean", "featureKey": "more"},
    )

    assert answer.status_code == 201
    assert api.get("/").status_code == api.get("/sandbox/api/overview").status_code


def test_questions_can_be_made_to_fail(sandbox, api):
    sandbox.faults.entitlements.set(fail_rate=1.0)

    assert statuses(api) == (204, {500})


@pytest.mark.parametrize("group", GROUPS)
def test_answers_are_late_in_one_group_and_not_in_the_other(sandbox, api, group):
    faults = getattr(sandbox.faults, group)
    ask = {
        "ingest": lambda: api.ingest(event()),
        "entitlements": lambda: api.get(QUESTIONS[1]),
    }
    ask_late = ask.pop(group)
    (ask_other,) = ask.values()

    faults.set(latency=0.5)
    start = time.monotonic()
    assert ask_late().ok
    assert time.monotonic() - start >= 0.5

    faults.set(latency=60)  # longer than the client waits
    assert ask_other().ok


def test_a_question_hangs_until_it_is_released(sandbox, api):
    sandbox.faults.entitlements.set(hang=60)
    answers = []

    def ask():
        with Api(sandbox.url) as own:
            answers.append(own.get(QUESTIONS[1]).json())

    asking = threading.Thread(target=ask)
    asking.start()
    assert sandbox.wait_asked(kind="value", timeout=PATIENCE)
    assert api.ingest(event()).status_code == 204
    hung = list(answers)
    while asking.is_alive():
        sandbox.faults.release()
        asking.join(0.05)

    assert (hung, answers) == ([], [{"hasAccess": True}])


def test_events_that_hang_were_taken_all_the_same(sandbox, api):
    sandbox.faults.ingest.set(hang=60)

    with pytest.raises(requests.Timeout):
        api.request(
            "POST", "/api/v1/events", json=event(), timeout=0.3,
            headers={"Content-Type": "application/cloudevents+json"},
        )  # fmt: skip

    until(lambda: len(api.events()) == 1)  # the client may be gone before it is read


def test_what_hangs_is_answered_after_its_time(sandbox, api):
    sandbox.faults.entitlements.set(hang=0.2)

    start = time.monotonic()
    answer = api.get(QUESTIONS[2])

    assert answer.status_code == 200
    assert time.monotonic() - start >= 0.2


def test_closing_lets_nothing_hang():
    sandbox = Sandbox()
    sandbox.faults.set(hang=600)
    asking = threading.Thread(target=lambda: Api(sandbox.url).get(QUESTIONS[3]))
    asking.start()
    assert sandbox.wait_asked(timeout=PATIENCE)

    sandbox.close()
    asking.join(PATIENCE)

    assert not asking.is_alive()


def test_the_page_sets_what_it_names_and_leaves_the_rest(api):
    first = {"ingest": {"latency": 0.01}, "entitlements": {"outage": True}}
    api.put("/sandbox/api/faults", json=first)

    answer = api.put("/sandbox/api/faults", json={"entitlements": {"failRate": 0.25}})

    expected = {
        "ingest": RIGHT | {"latency": 0.01},
        "entitlements": RIGHT | {"outage": True, "failRate": 0.25},
    }
    assert answer.json() == api.overview()["faults"] == expected


@pytest.mark.parametrize(
    "document",
    [
        *[{group: fault} for group in GROUPS for fault in (
            {"failRate": 2}, {"failRate": -1}, {"failRate": "1"}, {"failRate": True},
            {"latency": 61}, {"latency": None}, {"hang": 601}, {"outage": 1},
            {"retryAfter": -1}, {"x": 1}, [],
        )],
        {"ingest": {"latency": 1}, "entitlements": {"latency": -1}},
        {"latency": 1}, {"elsewhere": {}}, [],
    ],
    ids=str,
)  # fmt: skip
def test_senseless_faults_are_refused_and_change_nothing(api, document):
    assert api.put("/sandbox/api/faults", json=document).status_code == 400
    assert api.overview()["faults"] == dict.fromkeys(GROUPS, RIGHT)


@pytest.mark.parametrize(
    "setting",
    [{"fail_rate": 1.5}, {"latency": -1}, {"hang": math.inf}, {"outage": "no"},
     {"retry_after": -1}],
    ids=str,
)  # fmt: skip
def test_senseless_faults_in_python_are_errors(sandbox, setting):
    with pytest.raises(ValueError, match="expected"):
        sandbox.faults.set(**setting)

    assert sandbox.faults.document() == dict.fromkeys(GROUPS, RIGHT)

"""Faults on purpose, for ingest and for questions about entitlements apart."""

import http.client
import math
import socket
import threading
import time
from urllib.parse import urlsplit

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
COMMON = {
    "failRate": 0.0, "latency": 0.0, "hang": 0.0, "byteDelay": 0.0, "outage": False,
    "retryAfter": None, "denied": None,
}  # fmt: skip
RIGHT = {
    "ingest": COMMON | {"refusedType": None, "refusedSubject": None,
                        "forget": False, "claim": False},
    "entitlements": COMMON,
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
    """Return the status of an ingest and those of the questions."""
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


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_is_refused(sandbox, api, status):
    sandbox.faults.set(denied=status)

    assert statuses(api) == (status, {status})
    assert api.events() == []


@pytest.mark.parametrize(
    "setting", [{"refused_type": "bad"}, {"refused_subject": "bad"}], ids=str
)
def test_a_type_or_a_subject_refuses_the_request_that_has_it(sandbox, api, setting):
    sandbox.faults.ingest.set(**setting)
    (name,) = (key.removeprefix("refused_") for key in setting)
    culprit = event(2, **{name: "bad"})

    refused = api.ingest([event(1), culprit, event(3)])
    taken = api.ingest([event(1), event(3)])

    assert (refused.status_code, taken.status_code) == (400, 204)
    assert f"the {name} 'bad' is refused" in refused.json()["detail"]
    assert len(api.events()) == 2
    listed = api.get("/sandbox/api/arrivals?outcome=refused").json()["arrivals"]
    assert [one["position"] for one in listed] == [3, 2, 1]


def test_events_are_answered_with_204_and_forgotten(sandbox, api):
    sandbox.faults.ingest.set(forget=True)
    forgotten = api.ingest([event(1), event(2)]).status_code
    sandbox.faults.clear()
    again = api.ingest(event(1)).status_code

    assert (forgotten, again) == (204, 204)
    assert [listed["event"]["id"] for listed in api.events()] == ["event-1"]
    arrivals = api.get("/sandbox/api/arrivals?outcome=dropped").json()["arrivals"]
    assert {one["reason"] for one in arrivals} == {
        "answered 204 and forgotten, on purpose"
    }


def test_ids_are_claimed_by_a_failure_and_then_never_counted(sandbox, api):
    sandbox.faults.ingest.set(claim=True)
    failed = api.ingest(event(1)).status_code
    sandbox.faults.clear()
    again = api.ingest(event(1)).status_code
    other = api.ingest(event(2)).status_code

    assert (failed, again, other) == (500, 204, 204)
    assert [listed["event"]["id"] for listed in api.events()] == ["event-2"]
    assert api.overview()["counts"]["duplicates"] == 1


@pytest.mark.parametrize("group", GROUPS)
def test_an_answer_comes_byte_by_byte(sandbox, api, group):
    getattr(sandbox.faults, group).set(byte_delay=5)
    requests_of = {
        "ingest": b"POST /api/v1/events HTTP/1.1\r\nContent-Length: 0\r\n",
        "entitlements": f"GET {QUESTIONS[1]} HTTP/1.1\r\n".encode(),
    }
    host = urlsplit(sandbox.url).netloc

    with socket.create_connection(host.split(":"), timeout=PATIENCE) as client:
        client.sendall(requests_of[group] + f"Host: {host}\r\n\r\n".encode())
        first = client.recv(4096, socket.MSG_PEEK)
        sandbox.faults.stop()  # the rest comes at once
        answer = http.client.HTTPResponse(client)
        answer.begin()
        content = answer.read()

    assert first == b"H"
    assert (answer.status, len(content) > 0) == (
        {"ingest": 400, "entitlements": 200}[group], True,
    )  # fmt: skip


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
        "ingest": RIGHT["ingest"] | {"latency": 0.01},
        "entitlements": COMMON | {"outage": True, "failRate": 0.25},
    }
    assert answer.json() == api.overview()["faults"] == expected


@pytest.mark.parametrize(
    "document",
    [
        *[{group: fault} for group in GROUPS for fault in (
            {"failRate": 2}, {"failRate": -1}, {"failRate": "1"}, {"failRate": True},
            {"latency": 61}, {"latency": None}, {"hang": 601}, {"outage": 1},
            {"retryAfter": -1}, {"x": 1}, [], {"byteDelay": 6}, {"denied": 402},
            {"denied": True},
        )],
        {"ingest": {"forget": 1}}, {"ingest": {"refusedType": ""}},
        {"entitlements": {"claim": True}},
        {"ingest": {"latency": 1}, "entitlements": {"latency": -1}},
        {"latency": 1}, {"elsewhere": {}}, [],
    ],
    ids=str,
)  # fmt: skip
def test_senseless_faults_are_refused_and_change_nothing(api, document):
    assert api.put("/sandbox/api/faults", json=document).status_code == 400
    assert api.overview()["faults"] == RIGHT


@pytest.mark.parametrize(
    "setting",
    [{"fail_rate": 1.5}, {"latency": -1}, {"hang": math.inf}, {"outage": "no"},
     {"retry_after": -1}, {"forget": True}, {"denied": 500}],
    ids=str,
)  # fmt: skip
def test_senseless_faults_in_python_are_errors(sandbox, setting):
    with pytest.raises(ValueError, match="expected"):
        sandbox.faults.set(**setting)

    assert sandbox.faults.document() == RIGHT

import pytest

from entitling import NO, YES, document, metered
from openmeter_server import HANG, PAGE, Answer, problem, redirect
from openmeter_wsgi.entitlements.client import (
    NO_ACCESS,
    UNKNOWN_CUSTOMER,
    ClientV1,
    Terms,
)
from openmeter_wsgi.errors import Misconfigured, Unavailable
from openmeter_wsgi.options import ApiKey
from recorded import customer

KEY = ApiKey.from_options("secret-key", None)


@pytest.fixture
def connect(openmeter):
    made = []

    def connect(*, key=KEY, timeout=40.0):
        client = ClientV1(url=openmeter.url, key=key, timeout=timeout)
        made.append(client)
        return client

    yield connect
    for client in made:
        client.close()


def test_the_value_is_asked_for_by_version_2(openmeter, connect):
    openmeter.script.append(document(YES))

    answers = connect().answers("acme", ["searches"])

    assert answers["searches"].has_access
    path = "/api/v2/customers/acme/entitlements/searches/value"
    assert openmeter.requests[0].target == path
    assert openmeter.requests[0].headers["Authorization"] == "Bearer secret-key"


def test_a_metered_value_says_how_much_is_left(entitled, connect):
    entitled.values["acme"] = {"searches": metered(40)}

    answer = connect().answers("acme", ["searches"])["searches"]

    assert (answer.balance, answer.usage, answer.overage) == (40, 60, 0)
    assert answer.total_available_grant_amount == 100


def test_several_features_cost_one_question(openmeter, entitled, connect):
    entitled.values["acme"] = {"searches": YES, "exports": metered(0)}

    answers = connect().answers("acme", ["searches", "exports", "unheard_of"])

    assert [r.target for r in openmeter.requests] == ["/api/v1/customers/acme/access"]
    assert answers["searches"].has_access
    assert answers["exports"].balance == 0
    assert answers["unheard_of"] == NO_ACCESS


@pytest.mark.parametrize(
    "subject", ["..x/y", "...", "a/b", "a%2Fb", "ä b?c#d", "a..b", "%"]
)
def test_a_key_never_leaves_its_place_in_the_path(entitled, connect, subject):
    entitled.values[subject] = {"searches": YES}

    answers = connect().answers(subject, ["searches"])

    assert entitled.asked == {(subject, "searches"): 1}
    assert answers["searches"].has_access


@pytest.mark.parametrize(
    "subject",
    ["", ".", "..", "../../x", "x/../acme", "x/", "/x", "x//y", "a\0b", "x" * 257],
)
def test_nobody_is_asked_for_a_key_that_openmeter_cannot_have(
    entitled, connect, subject
):
    client = connect()

    assert client.answers(subject, ["searches"])["searches"] == UNKNOWN_CUSTOMER
    assert entitled.questions == 0


def test_a_customer_that_openmeter_does_not_know(entitled, connect):
    client = connect()

    assert client.answers("who", ["searches"]) == {"searches": UNKNOWN_CUSTOMER}
    assert set(client.answers("who", ["a", "b"]).values()) == {UNKNOWN_CUSTOMER}


def test_a_deleted_customer_is_unknown(openmeter, connect):
    openmeter.script.append(problem(412, "customer is deleted"))

    assert connect().answers("01J", ["searches"])["searches"] == UNKNOWN_CUSTOMER


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (problem(404), Misconfigured),  # the path itself is wrong
        (problem(400, "bad key"), Misconfigured),
        (problem(401), Misconfigured),
        (problem(403), Misconfigured),
        (redirect(301, "/elsewhere"), Misconfigured),
        (PAGE, Misconfigured),
        (document([]), Misconfigured),
        (Answer(200, b'{"x": ' + b"[" * 100_000), Misconfigured),
        (document({"hasAccess": "yes"}), Misconfigured),
        (problem(500), Unavailable),
        (problem(503), Unavailable),
        (Answer(429, headers={"Retry-After": "7"}), Unavailable),
    ],
)
def test_what_is_no_answer_is_no_denial(openmeter, connect, answer, expected):
    openmeter.script += [answer, answer]

    with pytest.raises(expected) as caught:
        connect().answers("acme", ["searches"])

    if answer.status == 429:
        assert caught.value.retry_after == 7


def test_openmeter_leaves_has_access_out_of_a_denial(openmeter, connect):
    openmeter.script += [document({}), document({"balance": 0, "usage": 7})]

    nothing = connect().answers("acme", ["searches"])["searches"]
    used_up = connect().answers("acme", ["searches"])["searches"]

    assert nothing == NO_ACCESS
    assert (used_up.has_access, used_up.usage) == (False, 7)


def test_an_answer_of_several_entitlements_says_which_cannot_be_read(
    openmeter, connect
):
    openmeter.script.append(document({"entitlements": {"a": [], "b": {}, "c": YES}}))

    answers = connect().answers("acme", ["a", "b"])

    assert isinstance(answers["a"], Misconfigured)
    assert answers["b"] == NO_ACCESS
    assert answers.keys() == {"a", "b"}


@pytest.mark.parametrize("body", [b'"\xff"', b"[" * 100_000, b'{"detail": "\xff"}'])
def test_a_refusal_that_cannot_be_read_is_one_all_the_same(openmeter, connect, body):
    openmeter.script += [Answer(400, body)]

    with pytest.raises(Misconfigured) as caught:
        connect().answers("acme", ["searches"])

    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("listed", "total", "expected"),
    [
        ([], 0, (None, True)),
        ([customer("other", "acme2"), customer("right", "acme")], 9, ("right", True)),
        ([customer("other", "ACME")], 1, (None, True)),
        ([customer("other", "ACME")], 101, (None, False)),
        ([customer(None, "acme", id_="01J")], 1, ("01J", True)),
        ([customer("x/../y", "acme", id_="01J")], 1, ("01J", True)),
        ([{"id": "01J", "key": "acme"}], 1, (None, True)),
    ],
)
def test_the_customer_of_a_subject_is_found_in_the_list(
    openmeter, connect, listed, total, expected
):
    page = {"items": listed, "page": 1, "pageSize": 100, "totalCount": total}
    openmeter.script.append(document(page))

    assert connect().lookup("acme", 1)[:2] == expected
    assert openmeter.requests[0].target == (
        "/api/v1/customers?subject=acme&page=1&pageSize=100"
    )


def test_a_server_that_hangs_is_not_waited_for(openmeter, connect):
    openmeter.script.append(HANG)

    with pytest.raises(Unavailable):
        connect(timeout=0.2).answers("acme", ["searches"])


def test_the_key_is_read_again_after_a_401(openmeter, connect):
    keys = iter(["old", "new"])
    openmeter.script += [problem(401), document(NO)]

    connect(key=ApiKey.from_options(lambda: next(keys), None)).answers("a", ["f"])

    sent = [request.headers["Authorization"] for request in openmeter.requests]
    assert sent == ["Bearer old", "Bearer new"]


def test_the_terms_say_when_the_period_ends(entitled, connect):
    entitled.values["acme"] = {}
    entitled.terms["acme", "searches"] = {
        "type": "metered",
        "isSoftLimit": True,
        "currentUsagePeriod": {
            "from": "2026-01-01T00:00:00Z", "to": "2026-02-01T00:00:00Z",
        },
    }  # fmt: skip

    assert connect().terms("acme", "searches") == Terms(
        True, 1_769_904_000.0, 1_767_225_600.0
    )


def test_an_entitlement_without_terms_has_none(entitled, connect):
    entitled.values["acme"] = {}

    assert connect().terms("acme", "searches") == Terms()

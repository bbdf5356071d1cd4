"""A ticket takes meters out of a request's bill, and is settled once, or refused."""

from __future__ import annotations

import base64
import json
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing import bill, environ, handled, serve
from openmeter_wsgi import (
    ConfigError,
    MeterValueError,
    OpenMeterMiddleware,
    Policy,
    TicketError,
    Usage,
    add_meters,
    bytes_sent,
    defer,
    set_idempotency_key,
    set_meters,
    set_subject,
)
from openmeter_wsgi.deferred_usage import read_ticket
from openmeter_wsgi.testing import OpenMeter
from servers import TIMEOUT

if TYPE_CHECKING:
    from collections.abc import Callable

    from openmeter_server import OpenMeterServer

SECRET, OTHER = "a-secret-of-the-tests", "another-secret-of-tests"
URL = "http://127.0.0.1:1"


def deferred(
    *arguments: Any,
    before: Callable[[Any], object] = lambda request: None,
    **options: Any,
) -> str:
    """Return the ticket of one request."""
    tickets: list[str] = []

    def handler(request: Any) -> None:
        before(request)
        tickets.append(defer(request, *arguments))

    options = {"ticket_secret": SECRET, "on_missing_subject": "acme", **options}
    app = OpenMeterMiddleware(handled(handler), api_url=URL, dry_run=True, **options)
    serve(app, environ())
    return tickets[0]


def settled(openmeter: OpenMeterServer, *tickets: str, **options: Any) -> list[Any]:
    """Settle one video with each ticket and return the events that OpenMeter gets."""
    usage = Usage(api_url=openmeter.url, ticket_secret=SECRET, **options)
    for ticket in tickets:
        usage.settle(ticket, {"videos": 1})
    assert usage.flush(TIMEOUT)
    usage.close()
    return [event for event in openmeter.taken if event["type"] == "videos"]


# -- The bill of the request


@pytest.mark.parametrize(
    ("meters", "billed"),
    [
        (None, []),
        ("videos", ["calls", "frames"]),
        (["videos", "frames"], ["calls"]),
        (["others"], ["calls", "frames", "videos"]),
        (["videos", "calls", "frames"], []),
    ],
)
def test_the_request_bills_the_meters_that_are_not_deferred(
    openmeter: OpenMeterServer, meters: Any, billed: list[str]
) -> None:
    def handler(request: Any) -> None:
        defer(request, meters)
        # Before or after: it makes no difference.
        add_meters(request, [{"videos": 2}, {"type": "frames", "data": {"n": 3}}])

    events = bill(
        openmeter, handler, meters={"calls": 1, "videos": 1}, ticket_secret=SECRET
    )

    assert sorted(event["type"] for event in events) == billed


def test_a_request_that_bills_nothing_else_is_counted_as_deferred() -> None:
    for types, measured in ((None, {"sent": bytes_sent()}), (["calls"], {})):
        app = OpenMeterMiddleware(
            handled(lambda request, types=types: defer(request, types)),
            meters={"calls": 1, **measured}, ticket_secret=SECRET, dry_run=True,
            api_url=URL, on_missing_subject="acme",
        )  # fmt: skip
        serve(app, environ())
        assert app.stats().not_metered == {"deferred": 1}


@pytest.mark.parametrize("status", ["200 OK", "202 Accepted", "500 Oh", "raises"])
def test_the_deferred_meters_are_no_part_of_any_response(
    openmeter: OpenMeterServer, status: str
) -> None:
    tickets = []

    def app(request: Any, start_response: Any) -> list[bytes]:
        set_meters(request, {"videos": 5})
        tickets.append(defer(request, "videos"))
        if status == "raises":
            raise RuntimeError
        start_response(status, [])
        return [b"ok"]

    middleware = OpenMeterMiddleware(
        app, api_url=openmeter.url, meters={"calls": 1}, ticket_secret=SECRET,
        on_missing_subject="acme",
    )  # fmt: skip
    if status == "raises":
        with pytest.raises(RuntimeError):
            serve(middleware, environ())
    else:
        serve(middleware, environ())
    middleware.close(TIMEOUT)

    assert "videos" not in {event["type"] for event in openmeter.taken}
    (event,) = settled(openmeter, tickets[0])
    assert event["data"] == {"total": 1}


# -- The bill of a ticket


def test_a_ticket_bills_its_subject_at_its_source_under_fixed_ids(
    openmeter: OpenMeterServer,
) -> None:
    ticket = deferred(
        before=lambda request: set_subject(request, "globex"), event_source="web"
    )
    usage = Usage(api_url=openmeter.url, ticket_secret=SECRET, event_source="worker")
    for _ in range(2):
        usage.settle(ticket, [{"videos": 1, "frames": 9}, {"type": "videos"}])
    usage.close()

    ids = [event["id"] for event in openmeter.taken]
    assert {(event["subject"], event["source"]) for event in openmeter.taken} == {
        ("globex", "web")
    }
    assert len(set(ids[:3])) == 3
    assert ids[3:] == ids[:3]
    assert openmeter.taken[0]["time"] > "2026-06"  # now, and not when it was deferred


def test_a_ticket_of_some_types_settles_no_other(openmeter: OpenMeterServer) -> None:
    ticket = deferred("videos")
    usage = Usage(api_url=openmeter.url, ticket_secret=SECRET)

    with pytest.raises(MeterValueError, match=r"'frames': expected a type .* 'videos'"):
        usage.settle(ticket, {"videos": 1, "frames": 1})
    with pytest.raises(MeterValueError, match="expected a number"):
        usage.settle(ticket, {"videos": -1})
    assert usage.stats().events == 0


def test_each_ticket_of_a_request_has_ids_of_its_own_also_under_one_key(
    openmeter: OpenMeterServer,
) -> None:
    def two(request: Any) -> None:
        set_idempotency_key(request, "k")
        tickets.append([defer(request, "videos"), defer(request, "videos")])

    tickets: list[list[str]] = []
    for _ in range(2):
        bill(openmeter, two, ticket_secret=SECRET)
    first, second = (settled(openmeter, *each) for each in tickets)

    ids = [event["id"] for event in second]
    assert len(set(ids)) == 2
    assert ids[:2] == ids[2:] == [event["id"] for event in first]


def test_without_a_subject_it_bills_what_names_its_own(
    openmeter: OpenMeterServer, caplog: pytest.LogCaptureFixture
) -> None:
    ticket = deferred(on_missing_subject="skip")
    usage = Usage(api_url=openmeter.url, ticket_secret=SECRET)
    usage.settle(ticket, [{"videos": 1}, {"type": "videos", "subject": "globex"}])
    usage.close()

    assert [event["subject"] for event in openmeter.taken] == ["globex"]
    assert usage.stats().dropped == {"no_subject": 1}
    assert "a ticket of 'default' is not billed" in caplog.text


# -- Refused


TICKET = deferred("videos")


@given(st.data())
def test_a_ticket_that_was_altered_is_refused(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(TICKET) - 1))
    text = st.text(max_size=2)
    altered = (
        TICKET[:at] + data.draw(text) + TICKET[at + data.draw(st.integers(0, 1)) :]
    )
    policy = Policy(api_url=URL, ticket_secret=SECRET)

    if altered == TICKET:
        assert read_ticket(altered, policy).subject == "acme"
    else:
        with pytest.raises(TicketError, match=r"^ticket: expected"):
            read_ticket(altered, policy)


def test_every_single_character_counts() -> None:
    policy = Policy(api_url=URL, ticket_secret=SECRET)
    for at in range(len(TICKET)):
        for other in "Aa0_-.=\n":
            if other != TICKET[at]:
                with pytest.raises(TicketError):
                    read_ticket(TICKET[:at] + other + TICKET[at + 1 :], policy)


@pytest.mark.parametrize("text", ["", None, 5, b"a", ".", "a.b", "\udcff", "a\0"])
def test_what_is_no_ticket_is_refused(text: Any) -> None:
    with pytest.raises(TicketError, match=r"^ticket: expected"):
        read_ticket(text, Policy(api_url=URL, ticket_secret=SECRET))


def test_two_secrets_are_accepted_while_one_replaces_the_other() -> None:
    def reads(ticket: str, secret: Any) -> bool:
        try:
            read_ticket(ticket, Policy(api_url=URL, ticket_secret=secret))
        except TicketError:
            return False
        return True

    new = deferred(ticket_secret=f"{OTHER} {SECRET}")
    assert [reads(new, secret) for secret in (OTHER, SECRET)] == [True, False]
    assert reads(TICKET, [OTHER, SECRET])
    assert not reads(TICKET, OTHER)


def test_a_ticket_expires_after_the_resend_window() -> None:
    with OpenMeter() as openmeter:
        tickets: list[str] = []
        app = OpenMeterMiddleware(
            handled(lambda request: tickets.append(defer(request))),
            ticket_secret=SECRET, resend_window=60.0, on_missing_subject="acme",
        )  # fmt: skip
        serve(app, environ())
        usage = Usage(ticket_secret=SECRET)
        openmeter.now += timedelta(seconds=59)
        usage.settle(tickets[0], {"videos": 1})
        openmeter.assert_metered("videos", subject="acme", total=1)
        openmeter.now += timedelta(seconds=61)
        with pytest.raises(TicketError, match=r"expired 60 s ago, resend_window"):
            usage.settle(tickets[0], {"videos": 1})


def test_anybody_can_read_a_ticket() -> None:
    payload = TICKET.partition(".")[0]
    content = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))

    assert (content["subject"], content["types"]) == ("acme", ["videos"])
    assert SECRET not in str(content)


# -- Mistakes


@pytest.mark.parametrize("types", [[], [""], [1], 5, "", [None]])
def test_types_that_are_none_are_refused(types: Any) -> None:
    with pytest.raises(MeterValueError, match=r"^meters: expected meter types such as"):
        deferred(types)


@pytest.mark.parametrize(
    ("secret", "problem"),
    [
        ("short", "at least 16 characters"), ("", "at least 16"), ([], "at least 16"),
        ([SECRET, "short"], "at least 16"), (5, "at least 16"), ([5], "at least 16"),
        ([SECRET, OTHER, SECRET], "a new and an old one, got 3"),
    ],
)  # fmt: skip
def test_a_secret_that_cannot_be_one_is_refused_and_not_shown(
    secret: Any, problem: str
) -> None:
    with pytest.raises(ConfigError, match=f"ticket_secret: .*{problem}") as refused:
        Policy(api_url=URL, ticket_secret=secret)
    assert "short" not in str(refused.value)


def test_without_a_secret_or_its_library_it_says_so(
    openmeter: OpenMeterServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="ticket_secret: expected a secret"):
        deferred(ticket_secret=None)
    with pytest.raises(ConfigError, match="ticket_secret: expected a secret"):
        Usage(api_url=openmeter.url).settle(TICKET, {"videos": 1})
    assert SECRET not in repr(Policy(api_url=URL, ticket_secret=SECRET))
    monkeypatch.setitem(sys.modules, "itsdangerous", None)
    with pytest.raises(ConfigError, match=r"pip install 'openmeter_wsgi\[jobs\]'"):
        Policy(api_url=URL, ticket_secret=SECRET)


def test_outside_a_metered_request_there_is_no_ticket(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert defer(environ(), "videos") == ""
    assert "defer: called outside a metered request" in caplog.text

"""The bill of a response: no price can be evaded, and every request is counted."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import flask
import pytest
from gunicorn.workers.base_async import ALREADY_HANDLED
from hypothesis import given, settings
from hypothesis import strategies as st

from openmeter_wsgi import (
    MeterValueError,
    OpenMeterMiddleware,
    Policy,
    add_meters,
    computed,
    llm_usage,
    meter,
    set_idempotency_key,
    set_meters,
    set_subject,
    set_user,
)
from openmeter_wsgi.events import RequestIds
from openmeter_wsgi.flask import OpenMeter as Extension
from openmeter_wsgi.process import Process
from openmeter_wsgi.request import COMPLETED, FINISHED, SUBJECT, USER, new_record
from openmeter_wsgi.testing import OpenMeter
from servers import Consumer, make_environ

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Environ = dict[str, Any]


@pytest.fixture
def openmeter() -> Iterator[OpenMeter]:
    with OpenMeter() as stand_in:
        yield stand_in


def metered(app: Any, **options: Any) -> OpenMeterMiddleware:
    return OpenMeterMiddleware(app, **{"meters": {"requests": 1}, **options})


def serve(app: Any, environ: Environ | None = None, **entries: Any) -> Consumer:
    return Consumer().serve(app, environ or make_environ(**entries))


def hello(environ: Environ, start_response: Any) -> list[bytes]:
    start_response("200 OK", [])
    return [b"hello"]


def usage(openmeter: OpenMeter) -> list[tuple[str, Any]]:
    return [(event.type, event.data) for event in openmeter.events]


# -- The fast path and the general one


@st.composite
def policies(draw: st.DrawFn) -> dict[str, Any]:
    names = st.sampled_from(["a", "b", "c:1", "ü", '"'])
    number = st.integers(0, 9) | st.sampled_from([0.5, 2**60])
    documents = st.fixed_dictionaries(
        {"type": names, "data": st.dictionaries(names, number, max_size=2)}
    )
    return {
        "meters": draw(
            st.none() | st.dictionaries(names, number, min_size=1, max_size=3)
        ),
        "meter": draw(st.none() | st.lists(documents, min_size=1, max_size=3)),
        "meter_on_status_codes": draw(st.sampled_from(["200", "200-299", "404"])),
        "on_missing_subject": draw(st.sampled_from(["skip", "nobody", "n" * 300])),
        "subject": draw(st.sampled_from([None, "header:X-Who"])),
        "meter_options": draw(st.booleans()),
        "on_abort": draw(st.sampled_from(["all", "measured", "none"])),
    }


requests = st.fixed_dictionaries(
    {"REQUEST_METHOD": st.sampled_from(["GET", "HEAD", "OPTIONS", "options"])},
    optional={
        "REMOTE_USER": st.sampled_from(["", "remote", "é"]),
        "HTTP_X_WHO": st.sampled_from(["", "who", "a,b", "x" * 300]),
    },
)
callers = st.none() | st.dictionaries(
    st.sampled_from([SUBJECT, USER]),
    st.sampled_from(["acme", "", None, 7, {"sub": "user"}, 10**5000]),
)


def billed(
    policy: Policy, environ: Environ, status: str | None, caller: Any, *, fast: bool
) -> tuple[list[Any] | None, dict[str, int], int]:
    """Return the events, the reasons for none, and how many requests were metered."""
    process = Process(policy, ids=RequestIds("r"))
    record = new_record()
    record.billing, record.status, record.state = process.billing, status, FINISHED
    record.caller = caller
    environ = {**environ, "openmeter_wsgi.request": record}
    events = None
    if fast:
        if process.billing.fast_path is None:
            return None, {}, 0
        events = process.billing.fast_path.events(environ, record)
    if events is None:
        events = process.billing.events(environ, record, COMPLETED)
    decoded = [json.loads(event) for event in events]
    for event in decoded:
        del event["time"]
    stats = process.stats()
    return decoded, stats.not_metered, stats.metered


@settings(max_examples=300, deadline=None)
@given(
    options=policies(),
    environ=requests,
    status=st.sampled_from(["200 OK", "204 No Content", "404 X", "200", "", None]),
    caller=callers,
)
def test_both_ways_make_the_same_events(
    options: dict[str, Any], environ: Environ, status: str | None, caller: Any
) -> None:
    policy = Policy(dry_run=True, **options)

    fast = billed(policy, environ, status, caller, fast=True)

    if fast[0] is not None:
        assert fast == billed(policy, environ, status, caller, fast=False)


# -- What the application and the server see


@pytest.mark.parametrize("exc_info", [None, (ValueError, ValueError(), None)])
@pytest.mark.parametrize("is_framework", [False, True])
def test_exc_info_may_be_named(
    openmeter: OpenMeter, exc_info: Any, is_framework: bool
) -> None:
    def app(environ: Environ, start_response: Any) -> list[bytes]:
        start_response("200 OK", [], exc_info=exc_info)
        return [b"ok"]

    wrapped: Any = metered(app)
    if is_framework:
        within = flask.Flask("example")
        within.wsgi_app = app  # type: ignore[method-assign, assignment]
        Extension(within, meters={"requests": 1}, subject=lambda _: "acme")
        wrapped = within.wsgi_app

    consumer = serve(wrapped)

    assert consumer.raised is None
    assert consumer.start_calls == [("200 OK", 2 if exc_info is None else 3)]
    assert usage(openmeter) == [("requests", {"total": 1})]


@pytest.mark.parametrize(
    "options", [{}, {"meters": {"t": llm_usage("total_tokens")}}], ids=["flat", "llm"]
)
def test_what_a_server_knows_by_identity_comes_back_untouched(
    options: dict[str, Any],
) -> None:
    app = metered(lambda *_: ALREADY_HANDLED, dry_run=True, **options)

    response = app(make_environ(), Consumer().start_response)

    assert response is ALREADY_HANDLED
    stats = app.stats()
    assert (stats.settled, stats.not_metered) == (1, {"handed_over": 1})


class Once:
    """An iterator that counts how often it is asked for one."""

    def __init__(self, *chunks: bytes) -> None:
        self.chunks = iter(chunks)
        self.asked = 0

    def __iter__(self) -> Once:
        self.asked += 1
        return self

    def __next__(self) -> bytes:
        return next(self.chunks)


@pytest.mark.parametrize(
    "options", [{}, {"meters": {"t": llm_usage("total_tokens")}}], ids=["flat", "llm"]
)
def test_an_iterable_is_asked_for_its_iterator_once(options: dict[str, Any]) -> None:
    body = Once(b"", b"a", b"b", b"c")

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [])
        return body

    assert serve(metered(app, dry_run=True, **options)).body == [b"", b"a", b"b", b"c"]
    assert body.asked == 1


# -- Outcome and subject


class HangsUp(Consumer):
    def write(self, data: bytes) -> None:
        super().write(data)
        raise BrokenPipeError("the client is gone")


@pytest.mark.parametrize("is_caught", [False, True])
def test_a_client_that_hangs_up_during_write_has_aborted(
    openmeter: OpenMeter, is_caught: bool
) -> None:
    def app(environ: Environ, start_response: Any) -> list[bytes]:
        write = start_response("200 OK", [])
        try:
            write(b"data")
        except BrokenPipeError:
            if not is_caught:
                raise
        return []

    HangsUp().serve(metered(app, on_failure="none"), make_environ())

    assert usage(openmeter) == [("requests", {"total": 1})]
    openmeter.clear()
    HangsUp().serve(metered(app, on_abort="none"), make_environ())
    openmeter.assert_not_metered(reason="aborted")


def test_a_write_that_the_application_calls_in_a_wrong_way_is_a_failure(
    openmeter: OpenMeter,
) -> None:
    class Strict(Consumer):
        def write(self, data: bytes) -> None:
            if not isinstance(data, bytes):
                raise TypeError("expected bytes")

    def app(environ: Environ, start_response: Any) -> list[bytes]:
        start_response("200 OK", [])("text")
        return []

    Strict().serve(metered(app, on_failure="none", on_abort="all"), make_environ())

    openmeter.assert_not_metered()


def test_a_subject_that_is_set_on_a_copy_of_the_environ_is_billed(
    openmeter: OpenMeter,
) -> None:
    def app(environ: Environ, start_response: Any) -> list[bytes]:
        copy = {**environ}
        set_subject(copy, "globex")
        return hello(copy, start_response)

    environ = make_environ()
    del environ["REMOTE_USER"]
    serve(metered(app), environ)

    assert [event.subject for event in openmeter.events] == ["globex"]


def test_a_subject_that_is_set_outside_of_the_middleware_is_billed(
    openmeter: OpenMeter,
) -> None:
    environ = make_environ()
    set_subject(environ, "outer")

    serve(metered(hello), environ)
    serve(metered(hello), environ)

    assert [event.subject for event in openmeter.events] == ["outer", "outer"]


def test_a_wrong_path_in_flask_is_named_with_the_object_and_the_count(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = flask.Flask("example")

    @app.get("/")
    def view() -> str:
        flask.g.customer = "acme"
        return "x"

    extension = Extension(app, meters={"a": 1}, subject="g.custmer", dry_run=True)
    for _ in range(2):
        app.test_client().get("/").close()

    [said] = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert said.getMessage() == (
        "openmeter_wsgi: subject at 'g.custmer': g has no 'custmer'; "
        "1 requests without subject are not billed; the last one: GET /"
    )
    assert extension is not None


def test_a_wrong_path_to_a_user_is_named_with_the_object(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def app(environ: Environ, start_response: Any) -> list[bytes]:
        set_user(environ, {"sub": "acme", "org": {"id": 7}})
        return hello(environ, start_response)

    environ = make_environ()
    del environ["REMOTE_USER"]
    serve(metered(app, subject_path="org.key", dry_run=True), environ)

    [said] = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert said.getMessage().startswith(
        "openmeter_wsgi: subject at 'org.key': a dict has no 'key'"
    )


# -- Prices


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"meter": {"type": "x", "data": {"n": 1}}}, [("x", {"n": 1})]),
        ({"meters": {"y": 2}}, [("y", {"total": 2})]),
        ({"meters": {}}, []),
        ({"meter": []}, []),
        ({"on_abort": "none"}, [("requests", {"total": 1}), ("doc", {})]),
    ],
)
@pytest.mark.parametrize("where", ["view", "route"])
def test_meters_of_a_view_or_route_stand_in_place_of_all_others(
    openmeter: OpenMeter,
    where: str,
    options: dict[str, Any],
    expected: list[tuple[str, Any]],
) -> None:
    common: dict[str, Any] = {"meter": {"type": "doc", "data": {}}}
    if where == "route":
        serve(metered(hello, routes={"/r": options}, **common), PATH_INFO="/r")
    else:
        serve(metered(meter(**options)(hello), **common))

    assert usage(openmeter) == expected


def test_one_key_of_two_customers_makes_two_ids(openmeter: OpenMeter) -> None:
    def app(environ: Environ, start_response: Any) -> list[bytes]:
        set_idempotency_key(environ, "1")
        who = environ["HTTP_X_WHO"]
        set_meters(environ, {"type": "a", "data": {}, "subject": who})
        return hello(environ, start_response)

    wrapped = metered(app, on_missing_subject="skip")
    for who in ("acme", "globex", "acme"):
        environ = make_environ(HTTP_X_WHO=who)
        del environ["REMOTE_USER"]
        serve(wrapped, environ)

    first, second, again = (event.id for event in openmeter.events)
    assert first != second
    assert first == again


@pytest.mark.parametrize(
    "meters",
    [
        {"a": 10**5000},
        {"type": "a", "data": {"n": 10**5000}},
        {"type": "a", "data": 10**5000},
        {"type": "a", "time": 10**5000},
        {"type": "a", "id": 10**5000},
        {"type": "a", "subject": 10**5000},
        {"type": "a", "source": 10**5000},
        {"type": "a", "value": 10**5000},
        [10**5000],
        {10**5000: 1},
    ],
    ids=map(str, range(10)),
)
def test_a_number_of_thousands_of_digits_is_refused_as_any_other(meters: Any) -> None:
    with pytest.raises(MeterValueError):
        set_meters({}, meters)
    with pytest.raises(MeterValueError):
        add_meters({}, meters)


def test_a_computed_number_of_thousands_of_digits_is_counted(
    openmeter: OpenMeter,
) -> None:
    serve(metered(hello, meters={"a": computed(lambda _: 10**5000)}))

    openmeter.assert_not_metered(reason="no_value_invalid")


# -- What is no Exception, raised at the end


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["computed", "meter_when", "subject", "audit"])
def test_whatever_a_callable_raises_the_request_is_settled_first(
    where: str, error: BaseException
) -> None:
    def raising(_: object) -> Any:
        raise error

    options: dict[str, Any] = {
        "computed": {"meters": {"a": computed(raising), "b": 2}},
        "meter_when": {"meter_when": raising},
        "subject": {"subject": raising, "on_missing_subject": "skip"},
        "audit": {"audit": raising, "meters": None},
    }[where]
    app = metered(hello, dry_run=True, **options)
    environ = make_environ()
    if where == "subject":
        del environ["REMOTE_USER"]

    consumer = serve(app, environ)

    assert consumer.raised_by_close is error
    stats = app.stats()
    assert stats.settled == 1
    reasons = {
        "meter_when": {"meter_when": 1},
        "subject": {"no_subject": 1},
        "audit": {"no_usage": 1},
        "computed": {},
    }
    assert stats.not_metered == reasons[where]


# -- Ids

DRAW = """
import os, sys
from openmeter_wsgi.events import RequestIds
ids = RequestIds()
if not os.fork():
    print(ids.new(), flush=True)
    os._exit(0)
os.wait()
print(ids.new(), flush=True)
"""


def test_processes_of_one_image_draw_different_ids_with_their_first_request() -> None:
    done = subprocess.run(
        [sys.executable, "-c", DRAW],
        env={**os.environ},
        capture_output=True,
        text=True,
        check=True,
    )

    child, parent = done.stdout.split()
    assert child.partition("-")[0] != parent.partition("-")[0]


def test_the_same_random_bytes_make_different_ids(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A kernel that was resumed twice from one snapshot.
    monkeypatch.setattr("secrets.token_bytes", bytes)

    assert RequestIds().new() != RequestIds().new()

"""Endings of a response, and its bill."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import sys
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import pytest
from gunicorn.http.wsgi import FileWrapper as GunicornFileWrapper
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from waitress.buffers import ReadOnlyFileBasedBuffer

from apps import CHUNKS, TEXT, ClosesBadly
from openmeter_wsgi import OpenMeterMiddleware, add_meters, set_meters
from servers import Consumer, make_environ

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from wsgiref.types import StartResponse

    Environ = dict[str, Any]


class Billed(logging.Handler):
    """A middleware in dry run, and the events that it would have sent."""

    #: Whether usual responses take the fast path: see the fixture.
    has_fast_path = True

    def __init__(self, app: Any, **options: Any) -> None:
        super().__init__()
        self.events: list[dict[str, Any]] = []
        options = {"meters": {"requests": 1}, "dry_run": True, **options}
        self.middleware = OpenMeterMiddleware(app, **options)
        if not self.has_fast_path:
            self.middleware.process().billing.fast_path = None

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.endswith("dry run, would send %s"):
            self.events.append(json.loads(record.args[0]))  # type: ignore[index,arg-type]

    @property
    def amounts(self) -> dict[str, int]:
        return {event["type"]: event["data"]["total"] for event in self.events}

    @property
    def not_metered(self) -> dict[str, int]:
        return self.middleware.stats().not_metered

    def serve(
        self,
        *,
        stop_after: int | None = None,
        environ: Environ | None = None,
        method: str = "GET",
        **entries: Any,
    ) -> Consumer:
        environ = make_environ(method, **entries) if environ is None else environ
        return Consumer(stop_after=stop_after).serve(self.middleware, environ)


@pytest.fixture(params=["fast", "general"], autouse=True)
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each test hold with the fast path of billing and without it."""
    monkeypatch.setattr(Billed, "has_fast_path", request.param == "fast")


@contextlib.contextmanager
def recording(app: Any, **options: Any) -> Iterator[Billed]:
    """Record the events of a new middleware around *app*; its counts must agree."""
    billed = Billed(app, **options)
    logger = logging.getLogger("openmeter_wsgi.process")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(billed)
    try:
        yield billed
    finally:
        logger.removeHandler(billed)
        logger.setLevel(level)
    stats = billed.middleware.stats()
    requests = {event["id"].partition(":")[0] for event in billed.events}
    assert stats.settled == len(requests) + sum(stats.not_metered.values())
    assert stats.events == stats.dropped.get("dry_run", 0) == len(billed.events)


class Body:
    """An iterable that remembers how it was treated."""

    def __init__(
        self, *chunks: bytes, on_close: Callable[[], object] = lambda: None
    ) -> None:
        self.chunks = chunks
        self.on_close = on_close
        self.closed = 0

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.chunks)

    def close(self) -> None:
        self.closed += 1
        self.on_close()


class SizedBody(Body):
    def __len__(self) -> int:
        return len(self.chunks)


def answering(
    body: Iterable[bytes], status: str = "200 OK"
) -> Callable[..., Iterable[bytes]]:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response(status, list(TEXT))
        return body

    return app


def using_50(
    error: BaseException | None = None, *, chunks: tuple[bytes, ...] = (b"a", b"b")
) -> Callable[..., Iterator[bytes]]:
    """Use 50 beside the static 1, answer with *chunks*, then raise *error*."""

    def app(environ: Environ, start_response: StartResponse) -> Iterator[bytes]:
        add_meters(environ, {"requests": 50})
        start_response("200 OK", list(TEXT))
        yield from chunks
        if error is not None:
            raise error

    return app


# -- Once, at the end


def test_a_response_is_settled_when_the_server_closes_it() -> None:
    with recording(answering([b"body"])) as billed:
        consumer = Consumer()
        response = billed.middleware(make_environ(), consumer.start_response)
        assert list(response) == [b"body"]
        assert billed.middleware.stats().settled == 0

        response.close()  # type: ignore[attr-defined]

        assert billed.amounts == {"requests": 1}


def test_a_response_closed_again_and_dropped_is_settled_once() -> None:
    with recording(answering([b"body"])) as billed:
        response: Any = billed.middleware(make_environ(), Consumer().start_response)
        for _ in response:
            pass
        response.close()
        response.close()
        del response
        gc.collect()

        assert billed.middleware.stats().settled == 1
        assert len(billed.events) == 1


@pytest.mark.parametrize("body", [[b"body"], Body(b"body"), (b"body",)])
def test_a_close_that_is_kept_and_called_again_settles_once(body: Any) -> None:
    with recording(answering(body)) as billed:
        response: Any = billed.middleware(make_environ(), Consumer().start_response)
        close = response.close
        list(response)

        close()
        close()

        assert billed.middleware.stats().settled == 1
        assert len(billed.events) == 1


def test_a_later_response_is_settled_as_the_first_one() -> None:
    options = {"subject": "header:X-Key", "on_missing_subject": "skip"}
    with recording(answering([b"body"]), **options) as billed:
        for key in ["acme", "globex", "", "acme"]:
            billed.serve(HTTP_X_KEY=key, REMOTE_USER="")
        billed.serve(method="OPTIONS", HTTP_X_KEY="acme")

        subjects = [event["subject"] for event in billed.events]
        assert subjects == ["acme", "globex", "acme"]
        assert billed.not_metered == {"no_subject": 1, "options": 1}
        assert billed.middleware.stats().metered == 3


def test_a_response_that_nobody_closes_is_settled_when_it_is_dropped() -> None:
    with recording(answering([b"body"])) as billed:
        response: Any = billed.middleware(make_environ(), Consumer().start_response)
        assert list(response) == [b"body"]

        del response
        gc.collect()

        assert billed.amounts == {"requests": 1}


def test_a_file_that_nobody_closes_is_settled_when_it_is_dropped() -> None:
    with recording(wrapping(io.BytesIO(b"a file"))) as billed:
        environ = make_environ(**{"wsgi.file_wrapper": GunicornFileWrapper})
        billed.middleware(environ, Consumer().start_response)

        del environ
        gc.collect()

        assert billed.amounts == {"requests": 1}


def test_an_unstarted_stream_that_is_dropped_counts_as_aborted() -> None:
    with recording(using_50(), on_abort="none") as billed:
        response: Any = billed.middleware(make_environ(), Consumer().start_response)

        del response
        gc.collect()

        assert billed.not_metered == {"no_status": 1}


def test_a_settlement_that_is_interrupted_is_repeated_with_the_same_event() -> None:
    class Interrupting(logging.Handler):
        lines: ClassVar[list[str]] = []

        def emit(self, record: logging.LogRecord) -> None:
            self.lines.append(record.getMessage())
            raise KeyboardInterrupt

    handler = Interrupting()
    logger = logging.getLogger("openmeter_wsgi.process")
    with recording(answering([b"body"])) as billed:
        logger.addHandler(handler)
        response: Any = billed.middleware(make_environ(), Consumer().start_response)
        list(response)
        try:
            with pytest.raises(KeyboardInterrupt):
                response.close()
            response.close()
        finally:
            logger.removeHandler(handler)

        stats = billed.middleware.stats()
        assert (stats.settled, stats.dropped["dry_run"]) == (1, 2)
        # The log writes a line once that comes twice: it was the same event.
        assert len(handler.lines) == 1
        billed.events *= 2


# -- Outcomes and their bills


@pytest.mark.parametrize(
    ("option", "amounts"),
    [("all", {"requests": 51}), ("measured", {"requests": 50}), ("none", {})],
)
def test_a_broken_stream_bills_what_on_failure_says(
    option: str, amounts: dict[str, int]
) -> None:
    app = using_50(ValueError("broken"))
    with recording(app, on_failure=option) as billed:
        consumer = billed.serve()

        assert str(consumer.raised) == "broken"
        assert consumer.body == [b"a", b"b"]
        assert billed.amounts == amounts
        assert billed.not_metered == ({} if amounts else {"failed": 1})


@pytest.mark.parametrize(
    ("option", "amounts"),
    [("all", {"requests": 51}), ("measured", {"requests": 50}), ("none", {})],
)
def test_an_aborted_stream_bills_what_on_abort_says(
    option: str, amounts: dict[str, int]
) -> None:
    with recording(using_50(), on_abort=option) as billed:
        consumer = billed.serve(stop_after=1)

        assert consumer.body == [b"a"]
        assert billed.amounts == amounts
        assert billed.not_metered == ({} if amounts else {"aborted": 1})


def test_a_complete_response_bills_all_whatever_the_other_outcomes_bill() -> None:
    with recording(using_50(), on_failure="none", on_abort="none") as billed:
        billed.serve()

        assert billed.amounts == {"requests": 51}


def test_by_default_a_failure_bills_the_measured_and_an_abort_all() -> None:
    with recording(using_50(ValueError())) as billed:
        billed.serve()
        billed.serve(stop_after=1)

        assert [event["data"]["total"] for event in billed.events] == [50, 51]


@pytest.mark.parametrize(("flat", "amounts"), [(True, {}), (False, {"requests": 7})])
def test_usage_stated_as_flat_is_not_billed_as_measured(
    flat: bool, amounts: dict[str, int]
) -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterator[bytes]:
        set_meters(environ, {"requests": 7}, flat=flat)
        start_response("200 OK", list(TEXT))
        yield b"a"
        raise ValueError

    with recording(app) as billed:
        billed.serve()

        assert billed.amounts == amounts


def test_the_flat_price_alone_is_not_billed_for_a_broken_stream() -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", list(TEXT))
        yield b"a"
        raise ValueError

    with recording(app) as billed:
        billed.serve()

        assert billed.not_metered == {"failed": 1}


def test_a_stream_that_is_read_to_its_last_chunk_but_not_its_end_is_aborted() -> None:
    with recording(using_50(), on_abort="none") as billed:
        billed.serve(stop_after=2)

        assert billed.not_metered == {"aborted": 1}


# -- Exceptions


def test_a_raise_before_the_response_is_a_500() -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        add_meters(environ, {"requests": 50})
        raise ValueError("no response")

    with recording(app, meter_on_status_codes="500") as billed:
        consumer = billed.serve()

        assert str(consumer.raised) == "no response"
        assert billed.amounts == {"requests": 50}


@pytest.mark.parametrize("chunks", [(), (b"",), (b"", b"")])
def test_a_raise_before_the_first_full_chunk_is_a_500_whatever_was_started(
    chunks: tuple[bytes, ...],
) -> None:
    app = using_50(ValueError(), chunks=chunks)
    with recording(app) as billed:
        assert billed.serve().status == "200 OK"
        assert billed.not_metered == {"status": 1}

    with recording(app, meter_on_status_codes="500") as billed:
        assert billed.serve().status == "200 OK"
        assert billed.amounts == {"requests": 50}


def test_a_raise_after_the_first_full_chunk_keeps_the_status_that_was_sent() -> None:
    with recording(using_50(ValueError(), chunks=(b"", b"sent"))) as billed:
        billed.serve()

        assert billed.amounts == {"requests": 50}


@pytest.mark.parametrize(("data", "status"), [(b"sent", "200"), (b"", "500")])
def test_a_raise_after_write_has_the_status_that_write_sent(
    data: bytes, status: str
) -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        add_meters(environ, {"requests": 50})
        start_response("200 OK", list(TEXT))(data)
        raise ValueError

    with recording(app, meter_on_status_codes=status) as billed:
        consumer = billed.serve()

        assert consumer.body == [data]
        assert billed.amounts == {"requests": 50}


class GreenletExitLike(BaseException):
    """An exception like GreenletExit, which gevent raises in a greenlet to end it."""


@pytest.mark.parametrize(
    "error", [SystemExit(1), KeyboardInterrupt(), GreenletExitLike()]
)
@pytest.mark.parametrize("during", ["call", "stream"])
def test_what_is_no_exception_passes_through_and_settles(
    error: BaseException, during: str
) -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        add_meters(environ, {"requests": 50})
        start_response("200 OK", list(TEXT))(b"sent")
        if during == "call":
            raise error
        return stream()

    def stream() -> Iterator[bytes]:
        yield b"a"
        raise error

    with recording(app, on_abort="none") as billed:
        consumer = billed.serve()

        assert consumer.raised is error
        assert billed.amounts == {"requests": 50}


def test_the_exception_of_the_application_is_the_very_object_that_it_raised() -> None:
    error = ValueError("mine")
    with recording(using_50(error)) as billed:
        consumer = billed.serve()

        assert consumer.raised is error
        assert error.__cause__ is None
        assert error.__context__ is None


def test_an_iterable_that_cannot_be_iterated_is_a_failure() -> None:
    class Refusing(Body):
        def __iter__(self) -> Iterator[bytes]:
            raise ValueError("not today")

    body = Refusing()
    with recording(answering(body), meter_on_status_codes="500") as billed:
        consumer = billed.serve()

        assert str(consumer.raised) == "not today"
        assert body.closed == 1
        assert billed.not_metered == {"failed": 1}


# -- close()


def test_usage_survives_a_response_that_fails_to_close() -> None:
    with recording(answering(ClosesBadly()), on_failure="none") as billed:
        consumer = billed.serve()

        assert consumer.body == [b"the whole ", b"body"]
        assert consumer.raised is None
        assert str(consumer.raised_by_close) == "in close"
        assert billed.amounts == {"requests": 1}


@pytest.mark.parametrize("stop_after", [None, 0, 1])
@pytest.mark.parametrize("body_type", [Body, SizedBody])
def test_the_application_is_closed_once(
    stop_after: int | None, body_type: type[Body]
) -> None:
    body = body_type(b"a", b"b")
    with recording(answering(body)) as billed:
        billed.serve(stop_after=stop_after)
        gc.collect()

    assert body.closed == 1


def test_a_generator_is_closed_where_it_stands() -> None:
    seen: list[str] = []

    def app(environ: Environ, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", list(TEXT))
        try:
            yield b"a"
            yield b"b"
        except GeneratorExit:
            seen.append("closed")
            raise

    with recording(app) as billed:
        consumer = billed.serve(stop_after=1)

        assert seen == ["closed"]
        assert consumer.raised_by_close is None
        assert billed.amounts == {"requests": 1}


def test_usage_stated_in_a_close_hook_counts() -> None:
    environ = make_environ()
    body = Body(b"a", on_close=lambda: add_meters(environ, {"tokens": 12}))
    with recording(answering(body)) as billed:
        billed.serve(environ=environ)

        assert billed.amounts == {"requests": 1, "tokens": 12}


def test_usage_stated_in_a_close_hook_that_then_raises_counts() -> None:
    environ = make_environ()

    def on_close() -> None:
        add_meters(environ, {"tokens": 12})
        raise ValueError("in close")

    with recording(answering(Body(b"a", on_close=on_close))) as billed:
        billed.serve(environ=environ)

        assert billed.amounts == {"requests": 1, "tokens": 12}


def test_usage_stated_after_the_settlement_is_counted_as_late() -> None:
    environ = make_environ()
    with recording(answering([b"a"])) as billed:
        billed.serve(environ=environ)

        add_meters(environ, {"tokens": 12})
        set_meters(environ, {"tokens": 12})

        assert billed.amounts == {"requests": 1}
        assert billed.middleware.stats().dropped["late"] == 2


def test_a_response_closed_before_its_first_chunk_is_aborted() -> None:
    body = Body(b"a")
    with recording(answering(body), on_abort="none") as billed:
        billed.serve(stop_after=0)

        assert body.closed == 1
        assert billed.not_metered == {"aborted": 1}


@pytest.mark.parametrize(
    ("method", "status"),
    [
        ("HEAD", "200 OK"),
        ("GET", "204 No Content"),
        ("GET", "304 Not Modified"),
    ],
)
def test_a_response_without_body_is_complete_without_iteration(
    method: str, status: str
) -> None:
    app = answering(Body(), status)
    options: Any = {"on_abort": "none", "meter_on_status_codes": "200-399"}
    with recording(app, **options) as billed:
        billed.serve(method=method, stop_after=0)

        assert billed.amounts == {"requests": 1}


def test_a_head_response_of_which_something_was_taken_can_be_aborted() -> None:
    with recording(answering(Body(b"a", b"b")), on_abort="none") as billed:
        billed.serve(method="HEAD", stop_after=1)

        assert billed.not_metered == {"aborted": 1}


# -- start_response


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_response_closed_before_a_late_start_has_no_status_and_is_not_billed(
    method: str,
) -> None:
    with recording(using_50(), meter_on_status_codes="100-599") as billed:
        consumer = billed.serve(method=method, stop_after=0)

        assert consumer.start_calls == []
        assert billed.not_metered == {"no_status": 1}


def test_start_response_may_come_with_the_first_chunk() -> None:
    with recording(using_50()) as billed:
        consumer = billed.serve()

        assert consumer.status == "200 OK"
        assert billed.amounts == {"requests": 51}


def test_a_response_that_never_starts_is_not_billed() -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        return []

    with recording(app, meter_on_status_codes="100-599") as billed:
        consumer = billed.serve()

        assert consumer.exhausted
        assert billed.not_metered == {"no_status": 1}


def restarting(
    first: str, second: str, chunks: tuple[bytes, ...] = ()
) -> Callable[..., Iterator[bytes]]:
    def app(environ: Environ, start_response: StartResponse) -> Iterator[bytes]:
        start_response(first, list(TEXT))
        yield from chunks
        try:
            int("not a number")
        except ValueError:
            start_response(second, [("X-Error", "1")], sys.exc_info())
        yield b"changed"

    return app


@pytest.mark.parametrize(
    ("first", "second", "amounts"),
    [
        ("200 OK", "503 Service Unavailable", {}),
        ("503 Service Unavailable", "200 OK", {"requests": 1}),
    ],
)
def test_the_last_status_wins(first: str, second: str, amounts: dict[str, int]) -> None:
    with recording(restarting(first, second)) as billed:
        consumer = billed.serve()

        assert (consumer.status, consumer.headers) == (second, [("X-Error", "1")])
        assert billed.amounts == amounts


def test_a_status_that_the_server_refuses_is_not_taken() -> None:
    app = restarting("200 OK", "503 Service Unavailable", chunks=(b"sent",))
    with recording(app, on_failure="all") as billed:
        consumer = billed.serve()

        assert isinstance(consumer.raised, ValueError)
        assert consumer.status == "200 OK"
        assert billed.amounts == {"requests": 1}


def test_start_response_has_two_arguments_where_the_application_gives_two() -> None:
    with recording(answering([b"a"])) as billed:
        response: Any = billed.middleware(
            make_environ(), lambda status, headers: lambda data: None
        )
        list(response)
        response.close()

        assert billed.amounts == {"requests": 1}


def test_headers_are_passed_on_as_the_very_list_of_the_application() -> None:
    headers = list(TEXT)

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", headers)
        return []

    with recording(app) as billed:
        assert billed.serve().headers is headers


def test_write_passes_through() -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        write = start_response("200 OK", list(TEXT))
        write(b"written")
        write(b"")
        return [b"returned"]

    with recording(app) as billed:
        assert billed.serve().body == [b"written", b"", b"returned"]
        assert billed.amounts == {"requests": 1}


# -- Length


def _named(body: object) -> str:
    # Without the address of an object: tests that run apart have to agree on names.
    return type(body).__name__ if isinstance(body, SizedBody) else repr(body)


@pytest.mark.parametrize(
    "body", [[b"a"], (b"a", b"b"), [], SizedBody(b"a", b"b", b"c")], ids=_named
)
def test_a_sized_response_keeps_its_length(body: Any) -> None:
    with recording(answering(body)) as billed:
        consumer = billed.serve()

        assert consumer.length == len(body)
        assert consumer.body == list(body)
        assert billed.amounts == {"requests": 1}


@pytest.mark.parametrize("body", [Body(b"a"), iter([b"a"]), (c for c in [b"a"])])
def test_an_unsized_response_gets_no_length(body: Any) -> None:
    with recording(answering(body)) as billed:
        assert billed.serve().length is None


# -- Which requests


def test_options_is_not_metered() -> None:
    with recording(using_50()) as billed:
        billed.serve(method="OPTIONS")

        assert billed.not_metered == {"options": 1}


def test_only_the_chosen_status_codes_are_metered() -> None:
    with recording(answering([], "201 Created"), meter_on_status_codes="200") as billed:
        billed.serve()

        assert billed.not_metered == {"status": 1}


def test_wrapped_twice_the_outer_meters_and_the_inner_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Inner(OpenMeterMiddleware):
        """An error with its own name, as repeated log lines are suppressed by name."""

    inner = Inner(using_50(), meters={"inner": 1}, dry_run=True)
    with recording(inner) as billed:
        billed.serve()
        billed.serve()

        assert [event["data"]["total"] for event in billed.events] == [51, 51]
        assert inner.stats().settled == 0
    said = [r.getMessage() for r in caplog.records if "wrapped twice" in r.msg]
    assert said == [
        "openmeter_wsgi: Inner: the application is wrapped twice; only the outer "
        "middleware bills"
    ]


def test_an_environ_that_serves_two_requests_is_metered_twice() -> None:
    environ = make_environ()
    with recording(using_50()) as billed:
        billed.serve(environ=environ)
        billed.serve(environ=environ)

        assert [event["data"]["total"] for event in billed.events] == [51, 51]
        assert len({event["id"] for event in billed.events}) == 2


def test_the_body_of_the_request_is_not_touched() -> None:
    class Poisoned:
        def __getattribute__(self, name: str) -> Any:
            raise AssertionError(f"the input was touched: {name}")

    with recording(using_50()) as billed:
        consumer = billed.serve(**{"wsgi.input": Poisoned()})

        assert consumer.raised is None
        assert billed.amounts == {"requests": 51}


def test_a_metering_error_leaves_the_response_alone() -> None:
    """The environ is the application's: it may put anything there."""

    class Incomparable:
        def __eq__(self, other: object) -> bool:
            raise ValueError("not to be compared")

        __hash__ = None  # type: ignore[assignment]

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        environ["REQUEST_METHOD"] = Incomparable()
        start_response("200 OK", list(TEXT))
        return [b"a"]

    with recording(app) as billed:
        consumer = billed.serve()

        assert consumer.body == [b"a"]
        assert consumer.raised is consumer.raised_by_close is None
        assert billed.not_metered == {"error": 1}


# -- File wrappers


def wrapping(file: Any) -> Callable[..., Iterable[bytes]]:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", list(TEXT))
        wrapped: Iterable[bytes] = environ["wsgi.file_wrapper"](file)
        return wrapped

    return app


class CountingFile(io.BytesIO):
    closed_times = 0

    def close(self) -> None:
        self.closed_times += 1
        super().close()


@pytest.mark.parametrize("wrapper", [GunicornFileWrapper, ReadOnlyFileBasedBuffer])
def test_a_file_wrapper_that_is_a_class_stays_what_the_server_knows(
    wrapper: type[Any],
) -> None:
    file = CountingFile(b"a file")
    environ = make_environ(**{"wsgi.file_wrapper": wrapper})
    with recording(wrapping(file), on_abort="none") as billed:
        response: Any = billed.middleware(environ, Consumer().start_response)

        assert type(response) is wrapper
        assert b"".join(response) == b"a file"
        assert billed.events == []
        response.close()
        assert file.closed_times == 1
        assert billed.amounts == {"requests": 1}


def test_a_file_wrapper_that_is_a_function_keeps_the_identity_of_the_file() -> None:
    file = CountingFile(b"a file")
    environ = make_environ(**{"wsgi.file_wrapper": lambda file, *size: file})
    with recording(wrapping(file)) as billed:
        response: Any = billed.middleware(environ, Consumer().start_response)

        assert response is file
        assert billed.events == []
        response.close()
        assert file.closed_times == 1
        assert billed.amounts == {"requests": 1}


def test_a_file_that_takes_no_attribute_is_settled_when_it_is_returned() -> None:
    class Slotted:
        __slots__ = ()

        def close(self) -> None:
            """Close nothing."""

    file = Slotted()
    environ = make_environ(**{"wsgi.file_wrapper": lambda file, *size: file})
    with recording(wrapping(file)) as billed:
        response: Any = billed.middleware(environ, Consumer().start_response)

        assert response is file
        assert billed.amounts == {"requests": 1}
        response.close()
        gc.collect()
        assert len(billed.events) == 1


def test_a_file_whose_close_raises_is_billed_and_raises() -> None:
    class Broken(io.BytesIO):
        def close(self) -> None:
            super().close()
            raise ValueError("in close")

    file = Broken(b"a file")
    environ = make_environ(**{"wsgi.file_wrapper": lambda file, *size: file})
    with recording(wrapping(file)) as billed:
        consumer = billed.serve(environ=environ)

        assert str(consumer.raised_by_close) == "in close"
        assert billed.amounts == {"requests": 1}
    del file.close
    with pytest.raises(ValueError, match="in close"):
        file.close()


def test_a_wrapped_file_that_is_not_what_is_returned_is_an_ordinary_response() -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", list(TEXT))
        return Body(*environ["wsgi.file_wrapper"](io.BytesIO(b"a file")))

    environ = make_environ(**{"wsgi.file_wrapper": lambda file, *size: file})
    with recording(app, on_abort="none") as billed:
        consumer = billed.serve(environ=environ)

        assert consumer.body == [b"a file"]
        assert billed.amounts == {"requests": 1}


# -- Arbitrary applications


class Plan(NamedTuple):
    """The actions of a made-up application, in order."""

    before: list[tuple[str, Any]]
    kind: str
    during: list[tuple[str, Any]]
    close_raises: bool
    method: str
    stop_after: int | None


class Broken(Exception):
    """Raised by a made-up application."""


class BrokenBase(BaseException):
    """The same as a BaseException."""


class Application:
    """An application that follows its plan and records how it was called."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.closed = 0
        self.write: Callable[[bytes], object] = lambda data: None

    def __call__(
        self, environ: Environ, start_response: StartResponse
    ) -> Iterable[bytes]:
        add_meters(environ, {"requests": 50})
        for action, value in self.plan.before:
            self.act(start_response, action, value)
        if self.plan.kind == "list":
            return self.chunks()
        if self.plan.kind == "tuple":
            return tuple(self.chunks())
        stream = self.stream(start_response)
        if self.plan.kind == "generator":
            return stream
        body = SizedBody if self.plan.kind == "sized" else Body
        response = body(on_close=self.on_close)
        response.chunks = stream  # type: ignore[assignment]
        if self.plan.kind == "sized":
            type(response).__len__ = lambda _: 3  # type: ignore[attr-defined]
        return response

    def on_close(self) -> None:
        self.closed += 1
        if self.plan.close_raises:
            raise Broken("in close")

    def chunks(self) -> list[bytes]:
        return [value for action, value in self.plan.during if action == "chunk"]

    def stream(self, start_response: StartResponse) -> Iterator[bytes]:
        for action, value in self.plan.during:
            if action == "chunk":
                yield value
            else:
                self.act(start_response, action, value)

    def act(self, start_response: StartResponse, action: str, value: Any) -> None:
        if action == "start":
            self.write = start_response(value, [("X-Status", value)])
        elif action == "restart":
            try:
                int("not a number")
            except ValueError:
                start_response(value, [("X-Again", value)], sys.exc_info())
        elif action == "write":
            self.write(value)
        elif action == "raise":
            raise value("planned")


_DATA = st.sampled_from([b"", b"a", b"bc", b"\x00\xff"])
_STATUS = st.sampled_from(["200 OK", "204 No Content", "304 X", "404 X", "500 X"])
_ACTION = st.one_of(
    st.tuples(st.just("write"), _DATA),
    st.tuples(st.just("restart"), _STATUS),
    st.tuples(st.just("raise"), st.sampled_from([Broken, BrokenBase, SystemExit])),
)
_START = st.lists(st.tuples(st.just("start"), _STATUS), max_size=1)
_CHUNK = st.tuples(st.just("chunk"), _DATA)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    before = draw(_START) + draw(st.lists(_ACTION, max_size=2))
    late = [] if before else draw(_START)
    during = draw(st.lists(_CHUNK, max_size=1)) if late else []
    during = during + late + draw(st.lists(st.one_of(_CHUNK, _CHUNK, _ACTION)))
    return Plan(
        before=before,
        kind=draw(st.sampled_from(["list", "tuple", "generator", "body", "sized"])),
        during=during,
        close_raises=draw(st.booleans()),
        method=draw(st.sampled_from(["GET", "GET", "HEAD", "OPTIONS"])),
        stop_after=draw(st.none() | st.integers(0, 4)),
    )


def seen(consumer: Consumer) -> list[object]:
    """Return all that the consumer of a response can see of it."""
    raised = [consumer.raised, consumer.raised_by_close]
    return [
        consumer.status,
        consumer.headers,
        consumer.start_calls,
        consumer.body,
        consumer.length,
        consumer.exhausted,
        [(type(error), str(error)) for error in raised],
    ]


def expected_bill(bare: Consumer, plan: Plan, on_failure: str, on_abort: str) -> object:
    """Return the bill for the outcome that the server saw, or the reason for none."""
    broke = bare.raised is not None and not bare.by_server
    status = bare.status
    if broke and not bare.sent:
        status = "500"
    if status is None:
        return "no_status"
    if status[:3] not in {"200", "204", "500"}:
        return "status"
    if plan.method == "OPTIONS":
        return "options"
    bodiless = plan.method == "HEAD" or status[:3] == "204"
    if broke:
        amounts = {"all": 51, "measured": 50, "none": "failed"}
        return amounts[on_failure]
    if bare.exhausted or (bodiless and not bare.sent):
        return 51
    return {"all": 51, "measured": 50, "none": "aborted"}[on_abort]


_BILLED = st.sampled_from(["all", "measured", "none"])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plan=plans(), on_failure=_BILLED, on_abort=_BILLED)
def test_any_application_passes_unchanged_and_is_settled_once(
    plan: Plan, on_failure: str, on_abort: str
) -> None:
    bare_app, app = Application(plan), Application(plan)
    stop_after = plan.stop_after
    options: Any = {"meter_on_status_codes": "200,204,500"}
    options |= {"on_failure": on_failure, "on_abort": on_abort}

    bare = Consumer(stop_after=stop_after).serve(bare_app, make_environ(plan.method))
    with recording(app, **options) as billed:
        metered = Consumer(stop_after=stop_after).serve(
            billed.middleware, make_environ(plan.method)
        )
        gc.collect(0)

        assert seen(metered) == seen(bare)
        assert app.closed == bare_app.closed
        assert billed.middleware.stats().settled == 1
        bill = expected_bill(bare, plan, on_failure, on_abort)
        if isinstance(bill, str):
            assert (billed.events, billed.not_metered) == ([], {bill: 1})
        else:
            assert (billed.amounts, billed.not_metered) == ({"requests": bill}, {})


def test_chunks_arrive_as_they_were_made() -> None:
    with recording(answering(Body(*CHUNKS))) as billed:
        assert billed.serve().body == CHUNKS


@pytest.mark.parametrize("is_read", [True, False])
def test_a_server_that_says_no_method_is_served_and_billed(is_read: bool) -> None:
    app = OpenMeterMiddleware(
        hello, meters={"a": 1}, on_missing_subject="acme", dry_run=True,
    )  # fmt: skip
    request = make_environ()
    del request["REQUEST_METHOD"]

    response = app(request, lambda *_: print)
    chunks = list(response) if is_read else []
    response.close()

    assert chunks == ([b"hello"] if is_read else [])
    assert app.stats().metered == 1


def hello(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    start_response("200 OK", [])
    return [b"hello"]

"""The iterable that the server gets: passes chunks on, then settles the request.

The middleware returns a `Response` in place of the application's iterable. The request
is settled once: when the server closes the response, or when the response is
garbage-collected. To settle a request is to put its events, if any, into the queue.
This happens on the thread of the request. The exception is a `FileResponse` that is
never closed: it refers to its file and the file to it, so the garbage collector frees
both later, on any thread. The module `request` lists the states.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openmeter_wsgi.entitlements.denials import EntitlementDenied
from openmeter_wsgi.exchange import ResponseCapture
from openmeter_wsgi.request import (
    ABORTED,
    COMPLETED,
    DISCONNECTED,
    ENCODED,
    FAILED,
    FINISHED,
    OPEN,
    RAISED,
    SETTLED,
    STARTED,
    method_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from openmeter_wsgi.billing import Billing
    from openmeter_wsgi.exchange import Exchange
    from openmeter_wsgi.request import RequestRecord

FILE_WRAPPER = "wsgi.file_wrapper"
#: Status codes of responses that have no body (RFC 9110).
_WITHOUT_BODY = ("204", "304")


class Response:
    """The response that the server iterates and closes. Used by one thread.

    A class with `close`, because a generator that is closed before its first chunk runs
    no code. `__iter__` uses a loop, because `yield from` would close the application's
    iterable a second time.
    """

    __slots__ = ("environ", "events", "iterable", "request")

    # The middleware sets the attributes: an __init__ would cost a call per request.
    environ: dict[str, Any]
    request: RequestRecord
    #: The application's iterable; None once `Response.close` has called its `close`.
    iterable: Any
    #: The encoded events, set with the state ENCODED. A repeated `settle` reuses them.
    events: Sequence[bytes]

    def __iter__(self) -> Iterator[bytes]:
        request = self.request
        try:
            for chunk in self.iterable:
                # The server sends headers with the first non-empty chunk (PEP 3333).
                if chunk and request.state == OPEN:
                    request.state = STARTED
                yield chunk
                # The server asks for the next chunk, so it has taken this one.
                if request.capture is not None:
                    request.capture.read_chunk(chunk)
        except GeneratorExit:
            raise
        except EntitlementDenied as denied:
            yield from self._denied_answer(denied)
        except BaseException:
            # Includes SystemExit (gunicorn's timeout) and GreenletExit (gevent).
            request.mark_failed()
            raise
        if request.state < DISCONNECTED:
            request.state = FINISHED

    def _denied_answer(self, denied: EntitlementDenied) -> Iterator[bytes]:
        """Yield the denial, if the application raised it before sending anything."""
        if self.request.state != OPEN:
            self.request.mark_failed()
            raise denied  # a part of the response has been sent already
        yield from denied.answer(
            self.environ,
            self.request.start_response,
            is_started=self.request.status is not None,
        )

    def close(self) -> None:
        """Close the application's iterable, then settle, even if that raised."""
        iterable = self.iterable
        # Most applications return a list, which has no `close`.
        close = None if type(iterable) is list else getattr(iterable, "close", None)
        try:
            if close is not None:
                self.iterable = None  # so that it is closed only once
                close()
        finally:
            self.settle()

    def __del__(self) -> None:
        # Some test clients and servers never close the response.
        if self.request.state != SETTLED:
            self.settle()

    def settle(self) -> None:  # noqa: C901 - one function: a call costs each request
        """Put the events of this request into the queue, once.

        A signal handler may raise at any point, and `settle` is then called again. So
        the events are stored before they are put: events that are put twice have the
        same ids, and OpenMeter deduplicates them.
        """
        request = self.request
        state = request.state
        if state == SETTLED:
            return
        billing: Billing = request.billing  # type: ignore[assignment]
        process = billing.process
        events = None
        if state == FINISHED and billing.fast_path is not None:
            events = billing.fast_path.events(self.environ, request)
        # None: the fast path does not apply. (): the request is not billed. Even an
        # unbilled request must start the process, if it is the first one.
        if events is None or events or not process.is_started:
            # False in a child forked during the request: the parent settles it.
            if not process.guard.is_confirmed():
                return
            if not process.is_started:
                process.start(self.environ)
            if state != ENCODED:
                self.events = self._encode_events(billing) if events is None else events
                request.state = ENCODED
            for event in self.events:
                process.counts.events += 1
                process.transport.put(event)
        request.state = SETTLED
        # The server may keep the environ, and thereby this record: free its parts.
        request.server_start = request.server_write = request.capture = None
        if request.usage is not None:
            request.usage.raise_interruption()

    def _encode_events(self, billing: Billing) -> Sequence[bytes]:
        """Return the events of a response to which the fast path does not apply."""
        outcome = self._outcome()
        exchange: Exchange | None = None
        if billing.body_readers is not None:
            capture = self._capture(billing.body_readers)
            exchange = capture.exchange(self.request.status, outcome)
        return billing.events(self.environ, self.request, outcome, exchange)

    def _capture(self, readers: Iterable[str]) -> ResponseCapture:
        """Return the capture of this response, or one that has read no body."""
        capture = self.request.capture
        if capture is None:  # a signal handler interrupted `@meter` before it made one
            capture = ResponseCapture(self.environ, readers)
            capture.skip_body()
        return capture

    def _outcome(self) -> str:
        state, status = self.request.state, self.request.status
        if state == FINISHED:
            return COMPLETED
        if state == RAISED:
            return FAILED
        if state == OPEN and status is not None:
            is_head = method_of(self.environ) == "HEAD"
            if is_head or status[:3] in _WITHOUT_BODY:
                return COMPLETED  # such a response has no body to iterate
        return ABORTED


class SizedResponse(Response):
    """The response of an application that returned a sequence.

    It has the sequence's length: servers derive Content-Length from it (PEP 3333).
    """

    __slots__ = ()

    def __len__(self) -> int:
        return len(self.iterable)


class FileResponse(Response):
    """The response of an application that returned a ``wsgi.file_wrapper`` object.

    The server gets its own object back, because it uses ``sendfile`` only for that. The
    server does not report how the transfer ended, so the response counts as completed.
    Closing the file settles the request.
    """

    __slots__ = ("_close_file",)

    def attach_to_file(self) -> Iterable[bytes]:
        """Return the file, with its `close` replaced by that of this response."""
        file: Any = self.iterable
        self._close_file = getattr(file, "close", None)
        self.request.state = FINISHED
        if self.request.capture is not None:
            self.request.capture.skip_body()
        try:
            file.close = self.close
        except (AttributeError, TypeError):
            self.settle()  # the object takes no attribute
        wrapped: Iterable[bytes] = file
        return wrapped

    def close(self) -> None:
        """Close the file, then settle, even if that raised."""
        try:
            if self._close_file is not None:
                self._close_file()
        finally:
            self.settle()


class TrackingFileWrapper:
    """Calls the server's ``wsgi.file_wrapper`` and remembers the last wrapped file.

    Needed if the file wrapper is a function: uWSGI's returns the file itself, which is
    not recognizable by its type. The environ refers to this object, so it must not
    refer to the request.
    """

    __slots__ = ("_last_file", "_wrapper")

    def __init__(self, wrapper: Callable[..., object]) -> None:
        self._wrapper = wrapper
        self._last_file: object = None

    def __call__(self, file: object, *block_size: int) -> object:
        """Wrap *file* with the server's wrapper."""
        self._last_file = self._wrapper(file, *block_size)
        return self._last_file

    def is_last_file(self, iterable: object) -> bool:
        """Return True if *iterable* is the file that was wrapped last."""
        return iterable is not None and iterable is self._last_file


def track_wrapped_files(environ: dict[str, Any]) -> type | TrackingFileWrapper:
    """Return the server's file wrapper. Replace it in *environ* if it is a function."""
    wrapper: Any = environ[FILE_WRAPPER]
    if not isinstance(wrapper, type):
        wrapper = environ[FILE_WRAPPER] = TrackingFileWrapper(wrapper)
    recognizer: type | TrackingFileWrapper = wrapper
    return recognizer


def settle_when_closed(
    environ: dict[str, Any], request: RequestRecord, file: Any
) -> Iterable[bytes]:
    """Return *file*, changed so that closing it settles the request."""
    response = FileResponse()
    response.environ, response.request, response.iterable = environ, request, file
    return response.attach_to_file()


def settle_failed(environ: dict[str, Any], request: RequestRecord) -> None:
    """Settle a request whose application raised and returned no response."""
    request.mark_failed()
    response = Response()
    response.environ, response.request, response.iterable = environ, request, None
    response.settle()


def is_iterable(thing: object) -> bool:
    """Return True if *thing* can be iterated.

    gunicorn's ALREADY_HANDLED cannot. It is compared by identity, so it is not wrapped.
    """
    return hasattr(thing, "__iter__") or hasattr(thing, "__getitem__")


def is_wrapped_file(file_wrapper: type | TrackingFileWrapper, iterable: object) -> bool:
    """Return True if *iterable* is a file that the server's wrapper returned."""
    if isinstance(file_wrapper, TrackingFileWrapper):
        return file_wrapper.is_last_file(iterable)
    return isinstance(iterable, file_wrapper)

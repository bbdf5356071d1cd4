"""One response: passes the application's answer to the server, then settles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openmeter_wsgi.entitlements.handlers import EntitlementDenied
from openmeter_wsgi.exchange import ResponseCapture
from openmeter_wsgi.request import (
    ABORTED,
    BROKEN,
    COMPLETED,
    FAILED,
    FINISHED,
    FIXED,
    HUNG_UP,
    OPEN,
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
_WITHOUT_BODY = ("204", "304")


class Response:
    """The response that the server iterates and closes. It settles exactly once.

    It belongs to the thread of the request. A generator alone would lose a response
    that is closed before its first chunk; the application's own iterator cannot tell
    *failed* from *aborted*; `yield from` would close the application's iterable twice.
    """

    __slots__ = ("environ", "events", "iterable", "request")

    # Set by the middleware: an __init__ would be one more call in every request.
    environ: dict[str, Any]
    request: RequestRecord
    #: The iterable of the application, None once it is closed.
    iterable: Any
    #: The events of the request, set with the state FIXED: settling again puts these.
    events: Sequence[bytes]

    def __iter__(self) -> Iterator[bytes]:
        request = self.request
        try:
            for chunk in self.iterable:
                # Headers leave with the first chunk that is not empty (PEP 3333).
                if chunk and request.state == OPEN:
                    request.state = STARTED
                yield chunk
                # The server asks for more, so it has taken that chunk.
                if request.capture is not None:
                    request.capture.read_chunk(chunk)
        except GeneratorExit:
            raise
        except EntitlementDenied as denied:
            yield from self._answered(denied)
        except BaseException:
            # Also SystemExit (gunicorn's timeout) and GreenletExit (gevent's).
            request.fail()
            raise
        if request.state < HUNG_UP:
            request.state = FINISHED

    def _answered(self, denied: EntitlementDenied) -> Iterator[bytes]:
        """Answer for an application whose request is denied while it is iterated."""
        if self.request.state != OPEN:
            self.request.fail()
            raise denied  # too late: a part of the response has been sent
        yield from denied.answer(
            self.environ,
            self.request.start_response,
            is_started=self.request.status is not None,
        )

    def close(self) -> None:
        """Close the application's iterable, then settle, whatever that raised."""
        iterable = self.iterable
        # Most applications return a list, which has no `close`.
        close = None if type(iterable) is list else getattr(iterable, "close", None)
        try:
            if close is not None:
                self.iterable = None  # exactly once
                close()
        finally:
            self.settle()

    def __del__(self) -> None:
        # For test clients and servers that never close the response.
        if self.request.state != SETTLED:
            self.settle()

    def settle(self) -> None:  # noqa: C901 - one function, as the middleware
        """Put the events of this request into the queue, once. Closes nothing.

        The events are fixed first, then put, then noted as put: an exception from a
        signal may strike in between, and a repeated put has the same ids.
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
        # None: the fast path declined. (): not billed, so there is nothing left to do.
        if events is None or events or not process.is_begun:
            # A process forked during the request has a copy; the parent settles it.
            if not process.guard.is_current():
                return
            if not process.is_begun:
                process.begin(self.environ)
            if state != FIXED:
                self.events = self._made(billing) if events is None else events
                request.state = FIXED
            for event in self.events:
                process.counts.events += 1
                process.transport.put(event)
        request.state = SETTLED
        # The server keeps the environ, which holds the record: free its parts.
        request.server_start = request.server_write = request.capture = None
        if request.usage is not None:
            request.usage.raise_interruption()

    def _made(self, billing: Billing) -> Sequence[bytes]:
        """Return the events of a response that the fast path does not bill."""
        outcome = self._outcome()
        exchange: Exchange | None = None
        if billing.bodies is not None:
            capture = self._capture(billing.bodies)
            exchange = capture.exchange(self.request.status, outcome)
        return billing.events(self.environ, self.request, outcome, exchange)

    def _capture(self, bodies: Iterable[str]) -> ResponseCapture:
        capture = self.request.capture
        if capture is None:  # a view's own options came after the response had begun
            capture = ResponseCapture(self.environ, bodies)
            capture.skip_body()
        return capture

    def _outcome(self) -> str:
        state, status = self.request.state, self.request.status
        if state == FINISHED:
            return COMPLETED
        if state == BROKEN:
            return FAILED
        if state == OPEN and status is not None:
            is_head = method_of(self.environ) == "HEAD"
            if is_head or status[:3] in _WITHOUT_BODY:
                return COMPLETED  # such a response has no body to iterate
        return ABORTED


class SizedResponse(Response):
    """The response of an application that returned a sequence.

    It has the length of the sequence, from which servers derive Content-Length.
    """

    __slots__ = ()

    def __len__(self) -> int:
        return len(self.iterable)


class FileResponse(Response):
    """The response of an application that returned a file in the server's wrapper.

    The server gets its own object back, or the kernel would not send the file. Nobody
    tells how the sending ended, so it counts as completed. Closing the file settles.
    """

    __slots__ = ("_close_file",)

    def give_away(self) -> Iterable[bytes]:
        """Return the file; closing it closes this response."""
        file: Any = self.iterable
        self._close_file = getattr(file, "close", None)
        self.request.state = FINISHED
        if self.request.capture is not None:
            self.request.capture.skip_body()
        try:
            file.close = self.close
        except (AttributeError, TypeError):
            self.settle()  # the object takes no attribute, so settle now
        given: Iterable[bytes] = file
        return given

    def close(self) -> None:
        """Close the file as the server does, then settle, whatever that raised."""
        try:
            if self._close_file is not None:
                self._close_file()
        finally:
            self.settle()


class FileWrapper:
    """The server's ``wsgi.file_wrapper``; it remembers the file that it wrapped last.

    uWSGI's wrapper is a function that returns the file itself, which could as well be
    an iterable of the application. The environ holds this object, so it must not hold
    the request.
    """

    __slots__ = ("_made", "_wrapper")

    def __init__(self, wrapper: Callable[..., object]) -> None:
        self._wrapper = wrapper
        self._made: object = None

    def __call__(self, file: object, *block_size: int) -> object:
        """Wrap a file as the server does."""
        self._made = self._wrapper(file, *block_size)
        return self._made

    def has_made(self, iterable: object) -> bool:
        """Return True if *iterable* is the last wrapped file."""
        return iterable is not None and iterable is self._made


def remember_files(environ: dict[str, Any]) -> type | FileWrapper:
    """Return the server's file wrapper, in a `FileWrapper` unless it is a class."""
    files: Any = environ[FILE_WRAPPER]
    if not isinstance(files, type):
        files = environ[FILE_WRAPPER] = FileWrapper(files)
    found: type | FileWrapper = files
    return found


def give_file(
    environ: dict[str, Any], request: RequestRecord, file: Any
) -> Iterable[bytes]:
    """Return *file*, which settles the request when the server closes it."""
    response = FileResponse()
    response.environ, response.request, response.iterable = environ, request, file
    return response.give_away()


def fail(environ: dict[str, Any], request: RequestRecord) -> None:
    """Settle a request whose application raised and returned no response."""
    request.fail()
    response = Response()
    response.environ, response.request, response.iterable = environ, request, None
    response.settle()


def is_iterable(thing: object) -> bool:
    """Return True if *thing* can be a response.

    A server compares other objects, such as gunicorn's ALREADY_HANDLED, by identity.
    """
    return hasattr(thing, "__iter__") or hasattr(thing, "__getitem__")


def is_file(files: type | FileWrapper, iterable: object) -> bool:
    """Return True if *iterable* is a file that the server has wrapped."""
    if isinstance(files, FileWrapper):
        return files.has_made(iterable)
    return isinstance(iterable, files)

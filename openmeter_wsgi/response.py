"""One response: what stands between the server and the application's answer."""

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
    """What the server iterates and closes: passes everything through, settles once.

    It belongs to the thread of the request.

    Why an object with a generator: a generator alone would lose a response that is
    closed before its first chunk; returning the application's own iterator could not
    tell *failed* from *aborted*; `yield from` would close the application's iterable
    twice.
    """

    __slots__ = ("environ", "events", "iterable", "request")

    # Set by the middleware: an __init__ would cost each request another call.
    environ: dict[str, Any]
    request: RequestRecord
    #: What the application has returned, None once it is closed.
    iterable: Any
    #: What the request is billed, once that is fixed.
    events: Sequence[bytes]

    def __iter__(self) -> Iterator[bytes]:
        request = self.request
        try:
            for chunk in self.iterable:
                # Headers leave with the first chunk that is not empty (PEP 3333).
                if chunk and request.state == OPEN:
                    request.state = STARTED
                yield chunk
                # The server is back for more: it has taken that one.
                if request.capture is not None:
                    request.capture.passed(chunk)
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
        """Answer in place of an application that is denied while it is iterated."""
        if self.request.state != OPEN:
            self.request.fail()
            raise denied  # too late: something has been sent
        yield from denied.answer(
            self.environ,
            self.request.start_response,
            is_started=self.request.status is not None,
        )

    def close(self) -> None:
        """Close the application's iterable, then settle, whatever that raised."""
        iterable = self.iterable
        # A list, which most applications return, has nothing to close.
        close = None if type(iterable) is list else getattr(iterable, "close", None)
        try:
            if close is not None:
                self.iterable = None  # exactly once
                close()
        finally:
            self.settle()

    def __del__(self) -> None:
        # A test client or a server that never closed the response.
        if self.request.state != SETTLED:
            self.settle()

    def settle(self) -> None:  # noqa: C901 - in one piece, as the middleware
        """Put the events of this request into the queue, once, and close nothing.

        The events are fixed first, then put, then it is noted: an exception from a
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
        if events is None or events or not process.is_begun:
            # A process forked in the middle has a copy, which its parent settles.
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
        # The server's handler has the environ, and that has the record.
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
        if capture is None:  # nothing has seen the chunks: how many is not known
            capture = ResponseCapture(self.environ, bodies)
            capture.hand_over()
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
                return COMPLETED  # there was nothing to iterate
        return ABORTED


class SizedResponse(Response):
    """A response to a sequence: it has the length that the sequence has.

    A server derives Content-Length from that, and looks whether the type has one.
    """

    __slots__ = ()

    def __len__(self) -> int:
        return len(self.iterable)


class FileResponse(Response):
    """Settles when the server closes a file of its own wrapper.

    The file must stay the server's, or it is not sent by the kernel. How the sending
    ended is between kernel and client: it counts as completed.
    """

    __slots__ = ("_close_file",)

    def give_away(self) -> Iterable[bytes]:
        """Return the file, which from now on closes this response."""
        file: Any = self.iterable
        self._close_file = getattr(file, "close", None)
        self.request.state = FINISHED
        if self.request.capture is not None:
            self.request.capture.hand_over()
        try:
            file.close = self.close
        except (AttributeError, TypeError):
            self.settle()  # the object takes no attribute: now or never
        given: Iterable[bytes] = file
        return given

    def close(self) -> None:
        """Close the file as the server meant it, then settle, whatever that raised."""
        try:
            if self._close_file is not None:
                self._close_file()
        finally:
            self.settle()


class FileWrapper:
    """The server's ``wsgi.file_wrapper``, which knows what it has wrapped last.

    uWSGI's is a function that returns the file itself, which nothing else tells from
    an iterable of the application's own. The environ holds this, so it holds nothing
    of the request.
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
        """Say whether this is the last file that it wrapped."""
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
    """Return *file*, one of the server's wrapper, which settles when it is closed."""
    response = FileResponse()
    response.environ, response.request, response.iterable = environ, request, file
    return response.give_away()


def fail(environ: dict[str, Any], request: RequestRecord) -> None:
    """Settle a request whose application raised in place of returning a response."""
    request.fail()
    response = Response()
    response.environ, response.request, response.iterable = environ, request, None
    response.settle()


def is_iterable(thing: object) -> bool:
    """Say whether *thing* can be a response.

    What cannot, such as gunicorn's ALREADY_HANDLED, a server knows by its identity.
    """
    return hasattr(thing, "__iter__") or hasattr(thing, "__getitem__")


def is_file(files: type | FileWrapper, iterable: object) -> bool:
    """Say whether *iterable* is a file that the server has wrapped."""
    if isinstance(files, FileWrapper):
        return files.has_made(iterable)
    return isinstance(iterable, files)

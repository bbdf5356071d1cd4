"""One response, from start_response to close: how did it end?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openmeter_wsgi.environ import METERS
from openmeter_wsgi.observation import Observation
from openmeter_wsgi.outcome import ABORTED, COMPLETED, FAILED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from wsgiref.types import StartResponse, WSGIApplication

    from openmeter_wsgi.billing import Billing
    from openmeter_wsgi.metering import Metering
    from openmeter_wsgi.meters import RunTimeMeters

_FILE_WRAPPER = "wsgi.file_wrapper"
_ERROR_STATUS = "500"
_WITHOUT_BODY = ("204", "304")
#: The outcome of a response of which no byte of the body has been seen yet.
_UNSTARTED = "unstarted"
#: Stands for what the application has not returned yet. Not empty: a settlement is
#: its own `write`, and an application may ask whether it got one.
_UNKNOWN = (b"",)
#: Stands for what is closed already, and is nothing to close.
_CLOSED: list[bytes] = []
#: Stands for the events of a response that was settled.
_SETTLED: Sequence[bytes] = ("settled",)  # type: ignore[assignment]


class Settlement:
    """Stands between the server and one response, and settles it exactly once.

    It is the start_response of the application and the iterable of the server,
    and changes nothing that passes. It belongs to the thread of the request.

    Why it is built as it is: a generator alone would lose a response that is
    closed before its first chunk; returning the application's own iterator could
    not tell *failed* from *aborted*; `yield from` would close the application's
    iterable twice.
    """

    __slots__ = (
        "_billing", "_environ", "_events", "_iterable", "_metering", "_observation",
        "_outcome", "_server_start", "_server_write", "_stated", "_status",
    )  # fmt: skip

    # Set by `serve`: an __init__ would cost as much again as all of it.
    _metering: Metering
    _billing: Billing
    _environ: dict[str, Any]
    _server_start: StartResponse
    _server_write: Callable[[bytes], object]
    _stated: list[RunTimeMeters]
    _iterable: Iterable[bytes]
    _status: str | None
    _outcome: str
    #: None until they are made, `_SETTLED` once they are handed to delivery.
    _events: Sequence[bytes] | None
    _observation: Observation

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None, /
    ) -> Callable[[bytes], object]:
        """Pass on to the server, and remember the status that it accepted."""
        # Two arguments where two were meant: some test clients take no third.
        if exc_info is None:
            self._server_write = self._server_start(status, headers)
        else:
            self._server_write = self._server_start(status, headers, exc_info)
        self._status = status
        if self._stated and self._stated[0].is_governed:
            self._follow(self._stated[0], status, headers)
        # It is its own `write`: a bound method would cost each response something.
        return self

    def _follow(
        self, stated: RunTimeMeters, status: str, headers: list[tuple[str, str]]
    ) -> None:
        """Let that govern which the view has named, from the response on."""
        own: Any = stated.governed_by
        if own is None or own is self._billing:
            return
        self._billing = own
        if own.bodies is None:
            return
        if isinstance(self, ObservedSettlement):
            self._observation.look_at(own.bodies)
            return
        is_late = self._iterable is not _UNKNOWN
        observed: Any = self
        observed.__class__ = (
            _SizedObservedSettlement
            if is_late and isinstance(self, SizedSettlement)
            else ObservedSettlement
        )
        observed._observation = Observation(
            self._environ, own.bodies, stated.governed_since
        )
        observed._observation.begin(status, headers)
        if is_late:
            # It is being iterated by what does not look at the chunks.
            observed._observation.hand_over()

    def __call__(self, data: bytes) -> object:
        """Pass on what the application writes: the `write` of PEP 3333."""
        if data and self._outcome is _UNSTARTED:
            self._outcome = ABORTED
        return self._server_write(data)

    def wrap(self, iterable: Iterable[bytes]) -> Settlement:
        """Return what the server iterates in place of *iterable*."""
        if self._status is None and self._stated and self._stated[0].is_governed:
            self._follow(self._stated[0], "", [])  # before it starts in a generator
            if isinstance(self, ObservedSettlement):
                return self.wrap(iterable)
        self._iterable = iterable
        # A server derives Content-Length from the length of a sequence, and only the
        # type of an object says whether it has one.
        wanted = SizedSettlement if hasattr(iterable, "__len__") else Settlement
        if type(self) is not wanted:
            global _usual  # noqa: PLW0603 - a guess, which the next response mends
            _usual = self.__class__ = wanted
        return self

    def wrap_file(self, file: Any) -> Iterable[bytes]:
        """Settle when the server closes *file*, its own wrapper, and return it.

        It must stay the server's, or the file is not sent by the kernel. How the
        sending ended is between kernel and client: it counts as completed.
        """
        self._iterable = file
        self._outcome = COMPLETED
        close = getattr(file, "close", None)

        def close_and_settle() -> None:
            try:
                if close is not None:
                    close()
            finally:
                self.settle()

        try:
            file.close = close_and_settle
        except (AttributeError, TypeError):
            self.settle()  # the object takes no attribute: now or never
        iterable: Iterable[bytes] = file
        return iterable

    def fail(self) -> None:
        """The application raised: note it, with the status the client will see."""
        if self._outcome is _UNSTARTED:
            # Nothing has been sent, so the server can still say what happened.
            self._status = _ERROR_STATUS
        self._outcome = FAILED

    def __iter__(self) -> Iterator[bytes]:
        try:
            chunks = iter(self._iterable)
            # Headers leave with the first chunk that is not empty (PEP 3333).
            for chunk in chunks:
                if chunk:
                    self._outcome = ABORTED  # unless it goes on from here
                    yield chunk
                    break
                yield chunk
            for chunk in chunks:
                yield chunk
        except GeneratorExit:
            raise
        except BaseException:
            # Also SystemExit (gunicorn's timeout) and GreenletExit (gevent's).
            self.fail()
            raise
        self._outcome = COMPLETED

    def close(self) -> None:
        """Close the application's iterable, then settle, whatever that raised.

        The events are fixed first, then put, then it is noted: an exception from a
        signal may strike in between, and a repeated put has the same ids. A process
        forked in the middle has a copy of this, which is its parent's to settle.
        """
        if type(self._iterable) is not list:  # which has nothing to close
            self._close_application()
            return
        events = self._events
        metering = self._metering
        if events is _SETTLED or not metering.is_own[0]:
            return
        if events is None:
            if not metering.queue.started:
                metering.queue.start()
            if self._outcome is COMPLETED and not self._stated:
                events = self._billing.usual_events(self._environ, self._status)
            if events is None:
                events = self._made()
            self._events = events
        counts = metering.counts
        for event in events:
            counts.events += 1
            metering.put(event)
        self._events = _SETTLED
        self._environ[METERS] = metering

    def _close_application(self) -> None:
        close = getattr(self._iterable, "close", None)
        try:
            if close is not None:
                self._iterable = _CLOSED  # exactly once
                close()
        finally:
            self.settle()

    def settle(self) -> None:
        """Put the events of this request into the queue, once, and close nothing."""
        self._iterable = _CLOSED
        self.close()

    def _made(self) -> Sequence[bytes]:
        """Return the events that this response comes to."""
        stated = self._stated
        return self._billing.events(
            self._environ, stated[0] if stated else None, self._status, self._ended()
        )

    def _ended(self) -> str:
        if self._outcome is not _UNSTARTED:
            return self._outcome
        bodiless = self._status is not None and self._status[:3] in _WITHOUT_BODY
        if bodiless or (self._status and self._environ["REQUEST_METHOD"] == "HEAD"):
            return COMPLETED  # there was nothing to iterate
        return ABORTED

    def __del__(self) -> None:
        # A test client or a server that never closed the response.
        if self._events is not _SETTLED:
            self.settle()


class SizedSettlement(Settlement):
    """A settlement of a sequence: it has the length that the sequence has."""

    __slots__ = ()

    def __len__(self) -> int:
        return len(self._iterable)  # type: ignore[arg-type]


class ObservedSettlement(Settlement):
    """A settlement that sees the chunks, for measures to know of them in the end."""

    __slots__ = ()

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None, /
    ) -> Callable[[bytes], object]:
        """Pass on to the server, and look at what the response will be."""
        write = super().start_response(status, headers, exc_info)
        self._observation.begin(status, headers)
        return write

    def __call__(self, data: bytes) -> object:
        """Pass on what the application writes, and look at it."""
        written = super().__call__(data)
        self._observation.passed(data)
        return written

    def wrap(self, iterable: Iterable[bytes]) -> Settlement:
        """Return what the server iterates in place of *iterable*."""
        self._iterable = iterable
        if hasattr(iterable, "__len__"):
            self.__class__ = _SizedObservedSettlement
        return self

    def wrap_file(self, file: Any) -> Iterable[bytes]:
        """Settle when the server closes *file*; nobody here sees its bytes."""
        self._observation.hand_over()
        return super().wrap_file(file)

    def __iter__(self) -> Iterator[bytes]:
        # A chunk counts when the server is back for more: it has taken that one. At
        # once, as some servers close the response before they let go of this.
        observation = self._observation
        try:
            chunks = iter(self._iterable)
            yield from self._until_begun(chunks)
            if observation.feeds:
                for chunk in chunks:
                    yield chunk
                    observation.passed(chunk)
            for chunk in chunks:
                yield chunk
                observation.taken += len(chunk)
        except GeneratorExit:
            raise
        except BaseException:
            self.fail()
            raise
        self._outcome = COMPLETED

    def _until_begun(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """Pass on chunks until one is not empty: headers leave with that (PEP 3333)."""
        for chunk in chunks:
            if chunk:
                self._outcome = ABORTED  # unless it goes on from here
            yield chunk
            self._observation.passed(chunk)
            if chunk:
                return

    def _made(self) -> Sequence[bytes]:
        stated = self._stated
        outcome = self._ended()
        return self._billing.events(
            self._environ,
            stated[0] if stated else None,
            self._status,
            outcome,
            self._observation.exchange(self._status, outcome),
        )


class _SizedObservedSettlement(ObservedSettlement):
    """A settlement of a sequence that sees its chunks."""

    __slots__ = ()

    def __len__(self) -> int:
        return len(self._iterable)  # type: ignore[arg-type]


#: What settled the last response.
_usual: type[Settlement] = Settlement


def serve(
    app: WSGIApplication,
    metering: Metering,
    billing: Billing,
    environ: dict[str, Any],
    start_response: StartResponse,
    stated: list[RunTimeMeters],
) -> Iterable[bytes]:
    """Serve a request, and settle it at its end under the policy of *billing*."""
    # Like the last response most are: to change a class costs more than to guess it.
    if billing.bodies is None:
        settlement = _usual()
    else:
        settlement = ObservedSettlement()
        settlement._observation = Observation(environ, billing.bodies)
    settlement._metering = metering
    settlement._billing = billing
    settlement._environ = environ
    settlement._server_start = start_response
    settlement._stated = stated
    settlement._iterable = _UNKNOWN
    settlement._status = None
    settlement._outcome = _UNSTARTED
    settlement._events = None
    files = environ.get(_FILE_WRAPPER)
    if files is not None and not isinstance(files, type):
        files = environ[_FILE_WRAPPER] = _WrappedFiles(files)
    try:
        iterable = app(environ, settlement.start_response)
    except BaseException:
        settlement.fail()
        settlement.settle()
        raise
    if type(iterable) is list and type(settlement) is SizedSettlement:
        settlement._iterable = iterable
        return settlement
    if files is not None and isinstance(iterable, files):  # type: ignore[arg-type]
        return settlement.wrap_file(iterable)
    return settlement.wrap(iterable)


class _WrappedFiles:
    """A server's file wrapper that is a function, remembering what it made.

    uWSGI's returns the file itself, which nothing else tells from an iterable of
    the application's own. Held by the environ, so it holds nothing of the request.
    """

    __slots__ = ("_made", "_wrapper")

    def __init__(self, wrapper: Callable[..., object]) -> None:
        self._wrapper = wrapper
        self._made: object = None

    def __call__(self, file: object, *block_size: int) -> object:
        self._made = self._wrapper(file, *block_size)
        return self._made

    def __instancecheck__(self, iterable: object) -> bool:
        """Let isinstance() ask this as it asks a wrapper that is a class."""
        return iterable is not None and iterable is self._made

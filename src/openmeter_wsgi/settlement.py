"""One response, from start_response to close: how did it end?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openmeter_wsgi.environ import METERS
from openmeter_wsgi.observation import Observation
from openmeter_wsgi.outcome import ABORTED, COMPLETED, FAILED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from wsgiref.types import StartResponse

    from openmeter_wsgi.billing import Billing
    from openmeter_wsgi.metering import Metering
    from openmeter_wsgi.meters import RunTimeMeters

_ERROR_STATUS = "500"
_WITHOUT_BODY = ("204", "304")
#: The outcome of a response of which no byte of the body has been seen yet.
UNSTARTED = "unstarted"
#: Stands for what the application has not returned yet. Not empty: a settlement is
#: its own `write`, and an application may ask whether it got one.
UNKNOWN = (b"",)
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
        "billing", "environ", "events", "iterable", "metering", "observation",
        "outcome", "server_start", "server_write", "stated", "status",
    )  # fmt: skip

    # Set by `serving.serve`: an __init__ would cost as much again as all of it.
    metering: Metering
    billing: Billing
    environ: dict[str, Any]
    server_start: StartResponse
    server_write: Callable[[bytes], object]
    stated: list[RunTimeMeters]
    iterable: Iterable[bytes]
    status: str | None
    outcome: str
    #: None until they are made, `_SETTLED` once they are handed to delivery.
    events: Sequence[bytes] | None
    observation: Observation

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None, /
    ) -> Callable[[bytes], object]:
        """Pass on to the server, and remember the status that it accepted."""
        # Two arguments where two were meant: some test clients take no third.
        if exc_info is None:
            self.server_write = self.server_start(status, headers)
        else:
            self.server_write = self.server_start(status, headers, exc_info)
        self.status = status
        if self.stated and self.stated[0].is_governed:
            self._follow(self.stated[0], status, headers)
        # It is its own `write`: a bound method would cost each response something.
        return self

    def _follow(
        self, stated: RunTimeMeters, status: str, headers: list[tuple[str, str]]
    ) -> None:
        """Let that govern which the view has named, from the response on."""
        own: Any = stated.governed_by
        if own is None or own is self.billing:
            return
        self.billing = own
        if own.bodies is None:
            return
        if isinstance(self, ObservedSettlement):
            self.observation.look_at(own.bodies)
            return
        is_late = self.iterable is not UNKNOWN
        observed: Any = self
        observed.__class__ = (
            _SizedObservedSettlement
            if is_late and isinstance(self, SizedSettlement)
            else ObservedSettlement
        )
        observed.observation = Observation(
            self.environ, own.bodies, stated.governed_since
        )
        observed.observation.begin(status, headers)
        if is_late:
            # It is being iterated by what does not look at the chunks.
            observed.observation.hand_over()

    def __call__(self, data: bytes) -> object:
        """Pass on what the application writes: the `write` of PEP 3333."""
        if data and self.outcome is UNSTARTED:
            self.outcome = ABORTED
        return self.server_write(data)

    def wrap(self, iterable: Iterable[bytes]) -> Settlement:
        """Return what the server iterates in place of *iterable*."""
        if self.status is None and self.stated and self.stated[0].is_governed:
            self._follow(self.stated[0], "", [])  # before it starts in a generator
            if isinstance(self, ObservedSettlement):
                return self.wrap(iterable)
        self.iterable = iterable
        # A server derives Content-Length from the length of a sequence, and only the
        # type of an object says whether it has one.
        wanted = SizedSettlement if hasattr(iterable, "__len__") else Settlement
        if type(self) is not wanted:
            self.__class__ = wanted
        return self

    def wrap_file(self, file: Any) -> Iterable[bytes]:
        """Settle when the server closes *file*, its own wrapper, and return it.

        It must stay the server's, or the file is not sent by the kernel. How the
        sending ended is between kernel and client: it counts as completed.
        """
        self.iterable = file
        self.outcome = COMPLETED
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
        if self.outcome is UNSTARTED:
            # Nothing has been sent, so the server can still say what happened.
            self.status = _ERROR_STATUS
        self.outcome = FAILED

    def __iter__(self) -> Iterator[bytes]:
        try:
            chunks = iter(self.iterable)
            # Headers leave with the first chunk that is not empty (PEP 3333).
            for chunk in chunks:
                if chunk:
                    self.outcome = ABORTED  # unless it goes on from here
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
        self.outcome = COMPLETED

    def close(self) -> None:
        """Close the application's iterable, then settle, whatever that raised.

        The events are fixed first, then put, then it is noted: an exception from a
        signal may strike in between, and a repeated put has the same ids. A process
        forked in the middle has a copy of this, which is its parent's to settle.
        """
        if type(self.iterable) is not list:  # which has nothing to close
            self._close_application()
            return
        events = self.events
        metering = self.metering
        if events is _SETTLED or not metering.is_own[0]:
            return
        if events is None:
            if not metering.queue.started:
                metering.queue.start()
            if self.outcome is COMPLETED and not self.stated:
                events = self.billing.usual_events(self.environ, self.status)
            if events is None:
                events = self._made()
            self.events = events
        counts = metering.counts
        for event in events:
            counts.events += 1
            metering.put(event)
        self.events = _SETTLED
        self.environ[METERS] = metering

    def _close_application(self) -> None:
        close = getattr(self.iterable, "close", None)
        try:
            if close is not None:
                self.iterable = _CLOSED  # exactly once
                close()
        finally:
            self.settle()

    def settle(self) -> None:
        """Put the events of this request into the queue, once, and close nothing."""
        self.iterable = _CLOSED
        self.close()

    def _made(self) -> Sequence[bytes]:
        """Return the events that this response comes to."""
        stated = self.stated
        return self.billing.events(
            self.environ, stated[0] if stated else None, self.status, self._ended()
        )

    def _ended(self) -> str:
        if self.outcome is not UNSTARTED:
            return self.outcome
        bodiless = self.status is not None and self.status[:3] in _WITHOUT_BODY
        if bodiless or (self.status and self.environ.get("REQUEST_METHOD") == "HEAD"):
            return COMPLETED  # there was nothing to iterate
        return ABORTED

    def __del__(self) -> None:
        # A test client or a server that never closed the response.
        if self.events is not _SETTLED:
            self.settle()


class SizedSettlement(Settlement):
    """A settlement of a sequence: it has the length that the sequence has."""

    __slots__ = ()

    def __len__(self) -> int:
        return len(self.iterable)  # type: ignore[arg-type]


class ObservedSettlement(Settlement):
    """A settlement that sees the chunks, for measures to know of them in the end."""

    __slots__ = ()

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None, /
    ) -> Callable[[bytes], object]:
        """Pass on to the server, and look at what the response will be."""
        write = super().start_response(status, headers, exc_info)
        self.observation.begin(status, headers)
        return write

    def __call__(self, data: bytes) -> object:
        """Pass on what the application writes, and look at it."""
        written = super().__call__(data)
        self.observation.passed(data)
        return written

    def wrap(self, iterable: Iterable[bytes]) -> Settlement:
        """Return what the server iterates in place of *iterable*."""
        self.iterable = iterable
        if hasattr(iterable, "__len__"):
            self.__class__ = _SizedObservedSettlement
        return self

    def wrap_file(self, file: Any) -> Iterable[bytes]:
        """Settle when the server closes *file*; nobody here sees its bytes."""
        self.observation.hand_over()
        return super().wrap_file(file)

    def __iter__(self) -> Iterator[bytes]:
        # A chunk counts when the server is back for more: it has taken that one. At
        # once, as some servers close the response before they let go of this.
        observation = self.observation
        try:
            chunks = iter(self.iterable)
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
        self.outcome = COMPLETED

    def _until_begun(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """Pass on chunks until one is not empty: headers leave with that (PEP 3333)."""
        for chunk in chunks:
            if chunk:
                self.outcome = ABORTED  # unless it goes on from here
            yield chunk
            self.observation.passed(chunk)
            if chunk:
                return

    def _made(self) -> Sequence[bytes]:
        stated = self.stated
        outcome = self._ended()
        return self.billing.events(
            self.environ,
            stated[0] if stated else None,
            self.status,
            outcome,
            self.observation.exchange(self.status, outcome),
        )


class _SizedObservedSettlement(ObservedSettlement):
    """A settlement of a sequence that sees its chunks."""

    __slots__ = ()

    def __len__(self) -> int:
        return len(self.iterable)  # type: ignore[arg-type]

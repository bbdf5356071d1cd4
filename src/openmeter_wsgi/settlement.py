"""One response, from start_response to close: how did it end?"""

from __future__ import annotations

import os
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
_NOT_YET: tuple[bytes, ...] = ()


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
        "_outcome", "_server_start", "_server_write", "_settled", "_started", "_stated",
        "_status",
    )  # fmt: skip

    def __init__(
        self,
        metering: Metering,
        billing: Billing,
        environ: dict[str, Any],
        start_response: StartResponse,
        stated: list[RunTimeMeters],
    ) -> None:
        self._metering = metering
        self._billing = billing
        self._environ = environ
        self._server_start = start_response
        self._stated = stated
        self._iterable: Iterable[bytes] = _NOT_YET
        self._status: str | None = None
        self._started = False
        self._outcome = ABORTED
        self._events: Sequence[bytes] | None = None
        self._settled = False

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
        return self._write

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
        observed: Any = self
        observed.__class__ = (
            _SizedObservedSettlement
            if isinstance(self, _SizedSettlement)
            else ObservedSettlement
        )
        observed.observe(stated.governed_since)
        observed._observation.begin(status, headers)
        if self._iterable is not _NOT_YET:
            # It is being iterated by what does not look at the chunks.
            observed._observation.hand_over()

    def _write(self, data: bytes) -> object:
        if data:
            self._started = True
        return self._server_write(data)

    def wrap(self, iterable: Iterable[bytes]) -> Settlement:
        """Return what the server iterates in place of *iterable*."""
        if self._status is None and self._stated and self._stated[0].is_governed:
            self._follow(self._stated[0], "", [])  # before it starts in a generator
            if isinstance(self, ObservedSettlement):
                return self.wrap(iterable)
        self._iterable = iterable
        if hasattr(iterable, "__len__"):
            # A server derives Content-Length from the length of a sequence, and
            # only the type of an object says whether it has one.
            self.__class__ = _SizedSettlement
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
        self._outcome = FAILED
        if not self._started:
            # Nothing has been sent, so the server can still say what happened.
            self._status = _ERROR_STATUS

    def __iter__(self) -> Iterator[bytes]:
        try:
            chunks = iter(self._iterable)
            # Headers leave with the first chunk that is not empty (PEP 3333).
            for chunk in chunks:
                if chunk:
                    self._started = True
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
        """Close the application's iterable, then settle, whatever that raised."""
        iterable, self._iterable = self._iterable, ()
        try:
            if (close := getattr(iterable, "close", None)) is not None:
                close()
        finally:
            self.settle()

    def settle(self) -> None:
        """Put the events of this request into the queue, once.

        The events are fixed first, then put, then it is noted: an exception from a
        signal may strike in between, and a repeated put has the same ids. A process
        forked in the middle has a copy of this, which is its parent's to settle.
        """
        environ = self._environ
        metering = self._metering
        if self._settled or metering.pid != os.getpid():
            return
        if self._events is None:
            if not metering.queue.started:
                metering.queue.start()
            self._events = self._made()
        if self._events:
            metering.put(self._events)
        self._settled = True
        environ[METERS] = metering

    def _made(self) -> Sequence[bytes]:
        """Return the events that this response comes to."""
        stated = self._stated
        return self._billing.events(
            self._environ, stated[0] if stated else None, self._status, self._ended()
        )

    def _ended(self) -> str:
        if self._outcome is ABORTED and self._status and not self._started:
            bodiless = self._status[:3] in _WITHOUT_BODY
            if bodiless or self._environ.get("REQUEST_METHOD") == "HEAD":
                return COMPLETED  # there was nothing to iterate
        return self._outcome

    def __del__(self) -> None:
        # A test client or a server that never closed the response.
        if not self._settled:
            self.settle()


class _SizedSettlement(Settlement):
    """A settlement of a sequence: it has the length that the sequence has."""

    __slots__ = ()

    def __len__(self) -> int:
        return len(self._iterable)  # type: ignore[arg-type]


class ObservedSettlement(Settlement):
    """A settlement that sees the chunks, for measures to know of them in the end."""

    __slots__ = ()

    def observe(self, started_at: float | None = None) -> None:
        """Look at the response from here on."""
        self._observation = Observation(
            self._environ, self._billing.bodies or (), started_at
        )

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None, /
    ) -> Callable[[bytes], object]:
        """Pass on to the server, and look at what the response will be."""
        write = super().start_response(status, headers, exc_info)
        self._observation.begin(status, headers)
        return write

    def _write(self, data: bytes) -> object:
        written = super()._write(data)
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
                self._started = True
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


def settlement_of(
    metering: Metering,
    billing: Billing,
    environ: dict[str, Any],
    start_response: StartResponse,
    stated: list[RunTimeMeters],
) -> Settlement:
    """Return the settlement of one request, as much of one as its policy needs."""
    if billing.bodies is None:
        return Settlement(metering, billing, environ, start_response, stated)
    observed = ObservedSettlement(metering, billing, environ, start_response, stated)
    observed.observe()
    return observed

"""One response, from start_response to close: how did it end?"""

from __future__ import annotations

from logging import DEBUG
from typing import TYPE_CHECKING, Any

from openmeter_wsgi.entitlements.handlers import EntitlementDenied
from openmeter_wsgi.environ import ENDED, MADE, STATED, method_of
from openmeter_wsgi.observation import Observation
from openmeter_wsgi.outcome import ABORTED, COMPLETED, FAILED
from openmeter_wsgi.unbilled import LEVELS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from wsgiref.types import StartResponse

    from openmeter_wsgi.billing import Billing
    from openmeter_wsgi.meters import RunTimeMeters

_ERROR_STATUS = "500"
_WITHOUT_BODY = ("204", "304")

#: The progress of a response is an iterator: the one of a list that is its body, or one
#: of these. Nothing is left of it if the response has come to its end.
UNSTARTED: Any = iter(("before the first byte",))
STARTED: Any = iter(("after the first byte",))
BROKEN: Any = iter(("the application raised",))
FINISHED: Any = iter(())
#: Stands for what is closed already, and is nothing to close.
_CLOSED: list[bytes] = []


class _Response:
    """What all that stands between the server and one response has and knows."""

    __slots__ = (
        "billing", "cell", "environ", "events", "iterable", "observation", "progress",
        "server_start", "server_write", "status",
    )  # fmt: skip

    # Set by `serving.Serving`: an __init__ would cost as much again as all of it.
    billing: Billing
    #: What the environ has at `METERS`.
    cell: list[Any]
    environ: dict[str, Any]
    server_start: StartResponse
    server_write: Callable[[bytes], object]
    #: Not there until the application has said it.
    status: str | None
    progress: Any
    #: Not there until they are made.
    events: bytes | Sequence[bytes]
    #: Not there until the application has returned it.
    iterable: Iterable[bytes]
    observation: Observation

    def __call__(self, data: bytes) -> object:
        """Pass on what the application writes: the `write` of PEP 3333."""
        return self.server_write(data)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.iterable)


class Settled(_Response):
    """What a settlement becomes: nothing is left to do, not even by a finaliser."""

    __slots__ = ()

    def close(self) -> None:
        """Do nothing: it is closed."""

    # What a server has kept of it while it was a settlement may come to these.
    settle = _settle_with_care = close


class Settlement(_Response):
    """Stands between the server and one response, and settles it exactly once.

    It is the start_response of the application and the iterable of the server,
    and changes nothing that passes. It belongs to the thread of the request.

    Why it is built as it is: a generator alone would lose a response that is
    closed before its first chunk; returning the application's own iterator could
    not tell *failed* from *aborted*; `yield from` would close the application's
    iterable twice.
    """

    __slots__ = ()

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None, /
    ) -> Callable[[bytes], object]:
        """Pass on to the server, and remember the status that it accepted."""
        # In two steps: what is called at once as an attribute is looked up as a method.
        start = self.server_start
        # Two arguments where two were meant: some test clients take no third.
        if exc_info is None:
            self.server_write = start(status, headers)
        else:
            self.server_write = start(status, headers, exc_info)
        self.status = status
        if self.cell[STATED] is not None:
            self._follow(self.cell[STATED], status, headers)
        # It is its own `write`: a bound method would cost each response something.
        return self

    def _follow(
        self, stated: RunTimeMeters, status: str, headers: list[tuple[str, str]]
    ) -> None:
        """Let that govern which the view has named, from the response on."""
        if stated in {MADE, ENDED} or not stated.is_governed:
            return
        own: Any = stated.governed_by
        if own is None or own is self.billing:
            return
        self.billing = own
        if own.bodies is None:
            return
        if isinstance(self, ObservedSettlement):
            self.observation.look_at(own.bodies)
            return
        is_late = hasattr(self, "iterable")
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
        if data and self.progress is UNSTARTED:
            self.progress = STARTED
        return self.server_write(data)

    def wrap(self, iterable: Iterable[bytes]) -> Settlement:
        """Return what the server iterates in place of *iterable*."""
        if self.cell[STATED] is not None and not hasattr(self, "status"):
            self._follow(self.cell[STATED], "", [])  # before it starts in a generator
            if isinstance(self, ObservedSettlement):
                return self.wrap(iterable)
        self.iterable = iterable
        # A server derives Content-Length from the length of a sequence, and only the
        # type of an object says whether it has one.
        wanted = SizedSettlement if hasattr(iterable, "__len__") else Settlement
        if type(iterable) is list:
            wanted = ListSettlement
        if type(self) is not wanted:
            self.__class__ = wanted
        return self

    def wrap_file(self, file: Any) -> Iterable[bytes]:
        """Settle when the server closes *file*, its own wrapper, and return it.

        It must stay the server's, or the file is not sent by the kernel. How the
        sending ended is between kernel and client: it counts as completed.
        """
        self.iterable = file
        self.progress = FINISHED
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
        if self.progress is UNSTARTED:
            # Nothing has been sent, so the server can still say what happened.
            self.status = _ERROR_STATUS
        self.progress = BROKEN

    def __iter__(self) -> Iterator[bytes]:
        try:
            chunks = iter(self.iterable)
            # Headers leave with the first chunk that is not empty (PEP 3333).
            for chunk in chunks:
                if chunk:
                    self.progress = STARTED  # unless it goes on from here
                    yield chunk
                    break
                yield chunk
            for chunk in chunks:
                yield chunk
        except GeneratorExit:
            raise
        except EntitlementDenied as denied:
            yield from self._answered(denied)
        except BaseException:
            # Also SystemExit (gunicorn's timeout) and GreenletExit (gevent's).
            self.fail()
            raise
        self.progress = FINISHED

    def _answered(self, denied: EntitlementDenied) -> Iterator[bytes]:
        """Answer in place of an application that is denied while it is iterated."""
        if self.progress is not UNSTARTED:
            self.fail()
            raise denied  # too late: something has been sent
        yield from denied.answer(
            self.environ, self.start_response, is_started=hasattr(self, "status")
        )

    def close(self) -> None:
        """Close the application's iterable, then settle, whatever that raised."""
        close = getattr(self.iterable, "close", None)
        try:
            if close is not None:
                self.iterable = _CLOSED  # exactly once
                close()
        finally:
            self.settle()

    def settle(self) -> None:
        """Put the events of this request into the queue, once, and close nothing.

        The events are fixed first, then put, then it is noted: an exception from a
        signal may strike in between, and a repeated put has the same ids.
        """
        progress = self.progress
        cell = self.cell
        if cell[STATED] is not None or progress.__length_hint__():
            self._settle_with_care()
            return
        # Of a list nothing may be left although the server did not come back for more.
        # Only from its end an iterator does not go back to the beginning.
        progress.__setstate__(0)
        if left := progress.__length_hint__():
            progress.__setstate__(left)
            self._settle_with_care()
            return
        events = None
        try:
            way = self.billing.ways[self.status]  # type: ignore[index]
            if (make := way.make) is None:
                is_special = LEVELS[DEBUG]
            else:
                events = make(self.environ)
                is_special = events is None
        except Exception:  # noqa: BLE001 - what it is comes to light on the long way
            self._settle_with_care()
            return
        if is_special:
            self._settle_with_care()
            return
        way.count += 1
        if events is not None:
            self.events = events
            cell[STATED] = MADE
            put = way.put
            put(events)
        cell[STATED] = ENDED
        self.__class__ = Settled  # type: ignore[assignment]

    def _settle_with_care(self) -> None:
        """Settle what is not as usual; what was settled already stays so.

        A process forked in the middle has a copy of this, which is its parent's.
        """
        process = self.billing.process
        if self.cell[STATED] is ENDED or not process.is_own[0]:
            return
        if not hasattr(self, "status"):
            self.status = None
        if self.cell[STATED] is not MADE:
            if not process.queue.started:
                process.queue.start()
            self.events = self._made()
            self.cell[STATED] = MADE
        events = self.events
        for event in [events] if isinstance(events, bytes) else events:
            process.counts.events += 1
            process.put(event)
        self.cell[STATED] = ENDED
        self.__class__ = Settled  # type: ignore[assignment]

    def _made(self) -> Sequence[bytes]:
        """Return the events that this response comes to."""
        return self.billing.events(
            self.environ, self.cell[STATED], self.status, self._outcome()
        )

    def _outcome(self) -> str:
        reached = self._reached()
        if reached is FINISHED:
            return COMPLETED
        if reached is BROKEN:
            return FAILED
        if reached is STARTED:
            return ABORTED
        bodiless = self.status is not None and self.status[:3] in _WITHOUT_BODY
        if bodiless or (self.status and method_of(self.environ) == "HEAD"):
            return COMPLETED  # there was nothing to iterate
        return ABORTED

    def _reached(self) -> object:
        """Return how far the response has come: one of the four from UNSTARTED on."""
        return self.progress

    def __del__(self) -> None:
        # A test client or a server that never closed the response.
        self.settle()


class SizedSettlement(Settlement):
    """A settlement of a sequence: it has the length that the sequence has."""

    __slots__ = ()

    def __len__(self) -> int:
        return len(self.iterable)  # type: ignore[arg-type]


class ListSettlement(SizedSettlement):
    """A settlement of a list: it cannot fail, and has nothing to close.

    So no generator has to stand in between: the list's own iterator knows whether the
    server came back for more after the last chunk.
    """

    __slots__ = ()

    def __iter__(self) -> Iterator[bytes]:
        chunks = self.progress = iter(self.iterable)
        return chunks

    def _reached(self) -> object:
        if type(self.progress) is type(UNSTARTED):
            return self.progress
        # How an iterator is pickled says where it stands, and after its end nowhere.
        _, (chunks, *_), *index = self.progress.__reduce__()
        if not index:
            return FINISHED
        return STARTED if any(chunks[: index[0]]) else UNSTARTED

    close = Settlement.settle


class ObservedSettlement(Settlement):
    """A settlement that sees the chunks, for measures to know of them in the end."""

    __slots__ = ()

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None, /
    ) -> Callable[[bytes], object]:
        """Pass on to the server, and look at what the response will be."""
        write = Settlement.start_response(self, status, headers, exc_info)
        self.observation.begin(status, headers)
        return write

    def __call__(self, data: bytes) -> object:
        """Pass on what the application writes, and look at it."""
        written = Settlement.__call__(self, data)
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
        except EntitlementDenied as denied:
            yield from self._answered(denied)
        except BaseException:
            self.fail()
            raise
        self.progress = FINISHED

    def _until_begun(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """Pass on chunks until one is not empty: headers leave with that (PEP 3333)."""
        for chunk in chunks:
            if chunk:
                self.progress = STARTED  # unless it goes on from here
            yield chunk
            self.observation.passed(chunk)
            if chunk:
                return

    def _made(self) -> Sequence[bytes]:
        outcome = self._outcome()
        return self.billing.events(
            self.environ,
            self.cell[STATED],
            self.status,
            outcome,
            self.observation.exchange(self.status, outcome),
        )


class _SizedObservedSettlement(ObservedSettlement):
    """A settlement of a sequence that sees its chunks."""

    __slots__ = ()

    def __len__(self) -> int:
        return len(self.iterable)  # type: ignore[arg-type]

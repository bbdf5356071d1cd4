"""A stand-in for the metering of a process: events and grants kept in memory."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import datetime  # noqa: TC003 - decoded into
import itertools
import threading
import weakref
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any

import msgspec

from openmeter_wsgi import audit
from openmeter_wsgi.delivery.queue import Backlog
from openmeter_wsgi.entitlements.cache import Lifetimes
from openmeter_wsgi.entitlements.client import (
    NO_ACCESS,
    UNKNOWN_CUSTOMER,
    Answer,
    Terms,
)
from openmeter_wsgi.entitlements.questions import Breaker
from openmeter_wsgi.entitlements.service import EntitlementService
from openmeter_wsgi.errors import Unavailable
from openmeter_wsgi.events import RequestIds
from openmeter_wsgi.process import Process
from openmeter_wsgi.quota.ledger import Ledger, LocalQuota
from openmeter_wsgi.quota.sqlite import SqliteStore
from openmeter_wsgi.stats import Counts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from openmeter_wsgi.entitlements.decision import Reason
    from openmeter_wsgi.entitlements.lookup import AskOpenMeter
    from openmeter_wsgi.entitlements.questions import Question
    from openmeter_wsgi.policy import Policy
    from openmeter_wsgi.stats import Problem


#: A stream that has so many chunks may have no end: it is closed in the middle.
_MAX_CHUNKS = 10_000


class OpenResponses:
    """The responses that are not closed yet, the oldest first."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._open: weakref.WeakValueDictionary[int, Response] = (
            weakref.WeakValueDictionary()
        )

    def watch(self, settled: Iterable[bytes]) -> Response:
        """Return the response that a test client gets in place of *settled*."""
        kind = _SizedResponse if hasattr(settled, "__len__") else Response
        response = kind(settled)
        self._open[next(self._numbers)] = response
        return response

    def finish(self) -> None:
        """Take each response of this thread to its end; what is read stays readable."""
        mine = threading.get_ident()
        for _, response in sorted(self._open.items()):
            if response.thread == mine:  # others have a server that closes theirs
                response.finish()


class Response:
    """A response that its client reads now, later, or never.

    What nobody closes counts as read to its end: so a server would have done.
    """

    def __init__(self, settled: Any) -> None:
        self.thread: int = threading.get_ident()
        self._settled = settled
        self._chunks: Iterator[bytes] | None = None
        self._read_ahead: deque[bytes] = deque()
        self._error: BaseException | None = None
        self._closed = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._read_ahead:
            return self._read_ahead.popleft()
        error, self._error = self._error, None
        if error is not None:
            raise error
        return next(self._rest())

    def close(self) -> None:
        """End it where it is."""
        self._closed = True
        self._settled.close()

    def finish(self) -> None:
        """Read the rest of it for a later reader, and close it."""
        if self._closed:
            return
        try:
            try:
                self._read_ahead.extend(islice(self._rest(), _MAX_CHUNKS))
            finally:
                self.close()
        except Exception as error:  # noqa: BLE001 - the application's: its reader gets it
            self._error = error

    def _rest(self) -> Iterator[bytes]:
        if self._chunks is None:
            self._chunks = iter(self._settled)
        return self._chunks

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.finish()


class _SizedResponse(Response):
    def __init__(self, settled: Any) -> None:
        super().__init__(settled)
        self._length = len(settled)

    def __len__(self) -> int:
        return self._length


LIMIT_REACHED = Answer(
    has_access=False,
    balance=0.0,
    usage=0.0,
    overage=0.0,
    total_available_grant_amount=0,
)
_DENIALS: dict[Reason, Answer] = {
    "no_access": NO_ACCESS,
    "limit_reached": LIMIT_REACHED,
    "unknown_customer": UNKNOWN_CUSTOMER,
}


class Grants:
    """The access of customers to features, as a test has granted it."""

    def __init__(self) -> None:
        self.is_away = False
        #: Features that were asked for and never spoken of, by customer.
        self.never_granted: dict[tuple[str, str], None] = {}
        self._said: dict[tuple[str, str | None], Answer] = {}

    def grant(
        self, feature: str, subject: str | None, balance: float | None, config: Any
    ) -> None:
        """Give access, to everybody where no subject is named."""
        if balance is not None and balance <= 0:
            self._said[feature, subject] = LIMIT_REACHED
        else:
            self._said[feature, subject] = Answer(
                has_access=True,
                balance=balance,
                usage=None if balance is None else 0.0,
                total_available_grant_amount=balance,
                config=None if config is None else msgspec.json.encode(config).decode(),
            )

    def deny(self, feature: str, subject: str | None, reason: Reason) -> None:
        """Take access away.

        :raises ValueError: if OpenMeter has no such reason.
        """
        if reason not in _DENIALS:
            raise ValueError(
                f"reason: expected one of {', '.join(_DENIALS)}, got {reason!r}"
            )
        self._said[feature, subject] = _DENIALS[reason]

    def answer(self, customer: str, feature: str) -> Answer:
        """Return the answer that OpenMeter would give."""
        for key in ((feature, customer), (feature, None)):
            if (said := self._said.get(key)) is not None:
                return said
        self.never_granted[customer, feature] = None
        return NO_ACCESS


class GrantsClient:
    """Answers as a `QuestionClient` does, without a network."""

    clock_ahead: float = 0.0

    def __init__(self, grants: Grants) -> None:
        self._grants = grants

    def answers(self, customer: str, features: Sequence[str]) -> dict[str, Answer]:
        """Return the granted access to *features*.

        :raises Unavailable: in an outage.
        """
        self._check()
        return {feature: self._grants.answer(customer, feature) for feature in features}

    def is_addressable(self, customer: str) -> bool:  # noqa: ARG002
        """Return True: there are no others."""
        return True

    def can_look_up(self, subject: str) -> bool:  # noqa: ARG002
        """Return False: in a test each subject is a customer."""
        return False

    def terms(self, customer: str, feature: str) -> Terms:  # noqa: ARG002
        """Return the terms of an entitlement: a hard limit without a period."""
        self._check()
        return Terms()

    def close(self) -> None:
        """Do nothing: there is no connection."""

    def _check(self) -> None:
        if self._grants.is_away:
            raise Unavailable("an outage that the test has called for")


class DirectLookup:
    """Asks in the thread of the request, as often as it is told to."""

    def __init__(self, client: GrantsClient, ask_openmeter: AskOpenMeter) -> None:
        self.breaker: Breaker = Breaker()
        self._client = client
        self._ask_openmeter = ask_openmeter

    def ask(self, question: Question, *, is_known: bool = False) -> None:  # noqa: ARG002
        """Ask; without an answer what was known before goes on to hold."""
        try:
            self._ask_openmeter(
                self._client,  # type: ignore[arg-type]
                question,
                _nobody_waits,
                self.wait_for_token,
            )
        except Unavailable:
            return

    def refresh(self, question: Question, *, since: float = 0.0) -> None:  # noqa: ARG002
        """Ask at once."""
        self.ask(question)

    @property
    def is_busy(self) -> bool:
        """Whether requests wait in line: none does."""
        return False

    def wait_for_token(self) -> bool:
        """Ask as much as you like: nobody is at the other end."""
        return True

    def close(self) -> None:
        """Do nothing: there is no connection."""


def _nobody_waits() -> None:
    pass


class Event(msgspec.Struct, frozen=True):
    """One event as OpenMeter would have got it."""

    type: str
    subject: str
    #: A number that is no float travels as text, as it would to OpenMeter.
    data: dict[str, Any]
    id: str
    source: str
    time: datetime.datetime


class Unmetered(msgspec.Struct, frozen=True):
    """A request that became no event, and why."""

    reason: str
    method: str
    path: str
    status: str | None
    #: ``default``, or the rule of a route.
    policy: str


class Collected:
    """The settled requests of all middlewares of a test. Any thread."""

    def __init__(self) -> None:
        self.grants: Grants = Grants()
        self.responses: OpenResponses = OpenResponses()
        self.events: list[Event] = []
        self.unmetered: list[Unmetered] = []
        self._counts: list[Counts] = []
        self._stores: list[SqliteStore] = []
        #: Of all requests of the test: request-1, request-2, …
        self._ids = RequestIds("request")

    def process(self, policy: Policy) -> Process:
        """Return the `Process` that bills the requests of one middleware."""
        counts = Counts()
        self._counts.append(counts)
        # Also of a dry run: a test wants to see the events.
        transport = Collector(self.events, counts)
        return Process(
            _observed(policy, self._tell),
            counts=counts,
            transport=transport,
            ids=self._ids,
            entitlements=self._entitlements(policy, transport),
            wrap=self.responses.watch,
        )

    def end(self) -> None:
        """Finish open responses, and release everything."""
        self.responses.finish()
        for store in self._stores:
            store.close()

    def _tell(self, record: Mapping[str, Any]) -> None:
        self.unmetered.append(msgspec.convert(record, Unmetered))

    def _entitlements(self, policy: Policy, transport: Collector) -> EntitlementService:
        """Return entitlements that ask the test, and each time anew."""
        client = GrantsClient(self.grants)
        store = SqliteStore()
        self._stores.append(store)
        ledger = Ledger(store, visible_until=transport.delivered_until)
        return EntitlementService(
            new_lookup=lambda ask_openmeter, _: DirectLookup(client, ask_openmeter),
            countdown=LocalQuota(ledger, policy.entitlement_meters, with_thread=False),
            lifetimes=Lifetimes(0, 0, policy.max_stale),
            close_store=store.close,
            shows_periods=False,
        )

    @property
    def dropped(self) -> dict[str, int]:
        """Meters that were lost, by reason."""
        found: dict[str, int] = {}
        for counts in self._counts:
            for reason, n in counts.dropped.items():
                if n:
                    found[reason] = found.get(reason, 0) + n
        return found


class Collector:
    """A transport that hands events to a test. Nothing ever waits in it."""

    started = is_sender = True
    directory = None
    in_spool: Backlog = Backlog()
    in_memory: Backlog = Backlog()
    problems: tuple[Problem, ...] = ()

    def __init__(self, events: list[Event], counts: Counts) -> None:
        self._events = events
        self._counts = counts

    def start(self, environ: Mapping[str, Any]) -> None:
        """Do nothing: there is no thread."""

    def put(self, event: bytes) -> None:
        """Take one event."""
        self._events.append(msgspec.json.decode(event, type=Event))
        self._counts.delivered += 1

    def at_exit(self, call: Callable[[], None]) -> None:
        """Have *call* made when the process ends."""
        atexit.register(call)

    def release(self) -> None:
        """Do nothing: there is no thread."""

    def delivered_until(self) -> float:
        """Return the beginning: a quota counts down all that the test has used."""
        return 0.0

    def flush(self, timeout: float | None = None) -> bool:  # noqa: ARG002
        """Say that nothing waits."""
        return True

    def close(self, timeout: float | None = None) -> None:
        """Do nothing: nothing waits."""


def _observed(policy: Policy, tell: Callable[[Mapping[str, Any]], object]) -> Policy:
    """Return *policy* without disk and network, with *tell* as a further audit."""
    routes = policy.routes and {
        rule: {**own, "audit": _both(own["audit"], tell)}
        if own and "audit" in own
        else own
        for rule, own in policy.routes.items()
    }
    return dataclasses.replace(
        policy,
        audit=_both(policy.audit, tell),
        routes=routes,
        spool_dir=None,
        redis_url=None,
        delivery="thread",
    )


def _both(
    own: Any, tell: Callable[[Mapping[str, Any]], object]
) -> Callable[[dict[str, Any]], object]:
    if own is None:
        return tell

    def tell_both(record: dict[str, Any]) -> None:
        tell(record)
        audit.call_audit(own, record)

    return tell_both

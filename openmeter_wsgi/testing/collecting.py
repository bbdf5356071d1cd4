"""The parts of a test in place of delivery and OpenMeter: events and grants in memory.

`Collected.process` makes the `Process` of a middleware with these parts: a `Collector`
in place of the queue, and a `GrantsClient` in place of requests for entitlements.
`OpenResponses` finishes responses that a test client does not close.
"""

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

from openmeter_wsgi import not_metered
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


#: Maximum number of chunks read of a stream, which may have no end.
_MAX_CHUNKS = 10_000


class OpenResponses:
    """The responses that are not closed yet."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._open: weakref.WeakValueDictionary[int, Response] = (
            weakref.WeakValueDictionary()
        )

    def watch(self, original: Iterable[bytes]) -> Response:
        """Return the response that a test client gets in place of *original*."""
        kind = _SizedResponse if hasattr(original, "__len__") else Response
        response = kind(original)
        self._open[next(self._numbers)] = response
        return response

    def finish(self) -> None:
        """Finish each response of this thread, the oldest first; it stays readable."""
        this_thread = threading.get_ident()
        for _, response in sorted(self._open.items()):
            if response.thread == this_thread:  # a server closes those of others
                response.finish()


class Response:
    """The response to a test client, which may read it later, or never.

    A response that is not closed is read to its end, as a server does.
    """

    def __init__(self, original: Any) -> None:
        self.thread: int = threading.get_ident()
        self._original = original
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
        """Close the response at its current position."""
        self._closed = True
        self._original.close()

    def finish(self) -> None:
        """Read the rest for a later reader, and close the response."""
        if self._closed:
            return
        try:
            try:
                self._read_ahead.extend(islice(self._rest(), _MAX_CHUNKS))
            finally:
                self.close()
        except Exception as error:  # noqa: BLE001 - raised to the reader
            self._error = error

    def _rest(self) -> Iterator[bytes]:
        if self._chunks is None:
            self._chunks = iter(self._original)
        return self._chunks

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.finish()


class _SizedResponse(Response):
    def __init__(self, original: Any) -> None:
        super().__init__(original)
        self._length = len(original)

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
    """The access of customers to features, as granted by a test."""

    def __init__(self) -> None:
        self.is_unavailable = False
        #: Ordered set of the customers and features queried without a grant.
        self.never_granted: dict[tuple[str, str], None] = {}
        self._answers: dict[tuple[str, str | None], Answer] = {}

    def grant(
        self, feature: str, subject: str | None, balance: float | None, config: Any
    ) -> None:
        """Give access to *subject*, or to everybody."""
        if balance is not None and balance <= 0:
            self._answers[feature, subject] = LIMIT_REACHED
        else:
            self._answers[feature, subject] = Answer(
                has_access=True,
                balance=balance,
                usage=None if balance is None else 0.0,
                total_available_grant_amount=balance,
                config=None if config is None else msgspec.json.encode(config).decode(),
            )

    def deny(self, feature: str, subject: str | None, reason: Reason) -> None:
        """Deny access.

        :raises ValueError: if OpenMeter does not have *reason*.
        """
        if reason not in _DENIALS:
            raise ValueError(
                f"reason: expected one of {', '.join(_DENIALS)}, got {reason!r}"
            )
        self._answers[feature, subject] = _DENIALS[reason]

    def answer(self, customer: str, feature: str) -> Answer:
        """Return the answer that OpenMeter would give."""
        for key in ((feature, customer), (feature, None)):
            if (answer := self._answers.get(key)) is not None:
                return answer
        self.never_granted[customer, feature] = None
        return NO_ACCESS


class GrantsClient:
    """A client of entitlements that answers from `Grants`, without a network."""

    clock_ahead: float = 0.0

    def __init__(self, grants: Grants) -> None:
        self._grants = grants

    def answers(self, customer: str, features: Sequence[str]) -> dict[str, Answer]:
        """Return the granted access to *features*.

        :raises Unavailable: in an outage.
        """
        self._raise_in_outage()
        return {feature: self._grants.answer(customer, feature) for feature in features}

    def is_addressable(self, customer: str) -> bool:  # noqa: ARG002
        """Return True: in a test every text is the key of a customer."""
        return True

    def can_look_up(self, subject: str) -> bool:  # noqa: ARG002
        """Return False: in a test every subject is a customer."""
        return False

    def terms(self, customer: str, feature: str) -> Terms:  # noqa: ARG002
        """Return the terms of an entitlement: a hard limit without a period."""
        self._raise_in_outage()
        return Terms()

    def close(self) -> None:
        """Do nothing: there is no connection."""

    def _raise_in_outage(self) -> None:
        if self._grants.is_unavailable:
            raise Unavailable("an outage, simulated by the test")


class DirectLookup:
    """Asks on the thread of the request, at once and without a limit."""

    def __init__(self, client: GrantsClient, ask_openmeter: AskOpenMeter) -> None:
        self.breaker: Breaker = Breaker()
        self._client = client
        self._ask_openmeter = ask_openmeter

    def ask(self, question: Question, *, is_known: bool = False) -> None:  # noqa: ARG002
        """Ask; in an outage the last known answer stays valid."""
        try:
            self._ask_openmeter(
                self._client,  # type: ignore[arg-type]
                question,
                _do_nothing,
                self.wait_for_token,
            )
        except Unavailable:
            return

    def refresh(self, question: Question, *, since: float = 0.0) -> None:  # noqa: ARG002
        """Ask at once."""
        self.ask(question)

    @property
    def is_busy(self) -> bool:
        """False: no request waits in line."""
        return False

    def wait_for_token(self) -> bool:
        """Return True: the number of questions is not limited."""
        return True

    def close(self) -> None:
        """Do nothing: there is no connection."""


def _do_nothing() -> None:
    pass


class Event(msgspec.Struct, frozen=True):
    """An event as it would be sent to OpenMeter."""

    type: str
    subject: str
    #: Numbers that a float cannot hold exactly are text, as sent to OpenMeter.
    data: dict[str, Any]
    id: str
    source: str
    time: datetime.datetime


class Unmetered(msgspec.Struct, frozen=True):
    """A request without events, and the reason."""

    reason: str
    method: str
    path: str
    status: str | None
    #: ``default``, or the rule of a route.
    policy: str


class Collected:
    """The events and unmetered requests of all middlewares in a test. Any thread."""

    def __init__(self) -> None:
        self.grants: Grants = Grants()
        self.responses: OpenResponses = OpenResponses()
        self.events: list[Event] = []
        self.unmetered: list[Unmetered] = []
        self._counts: list[Counts] = []
        self._stores: list[SqliteStore] = []
        #: Ids of the requests of a test: request-1, request-2, …
        self._ids = RequestIds("request")

    def process(self, policy: Policy) -> Process:
        """Return the `Process` that bills the requests of one middleware."""
        counts = Counts()
        self._counts.append(counts)
        # Also for a dry run, so that a test sees the events.
        transport = Collector(self.events, counts)
        return Process(
            _adapted(policy, self._add_unmetered),
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

    def _add_unmetered(self, record: Mapping[str, Any]) -> None:
        self.unmetered.append(msgspec.convert(record, Unmetered))

    def _entitlements(self, policy: Policy, transport: Collector) -> EntitlementService:
        """Return entitlements that query the grants, without a cache."""
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
        """Number of lost meters by reason."""
        dropped: dict[str, int] = {}
        for counts in self._counts:
            for reason, n in counts.dropped.items():
                if n:
                    dropped[reason] = dropped.get(reason, 0) + n
        return dropped


class Collector:
    """A transport that collects events for a test at once."""

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
        """Collect one event."""
        self._events.append(msgspec.json.decode(event, type=Event))
        self._counts.delivered += 1

    def at_exit(self, call: Callable[[], None]) -> None:
        """Call *call* when the process exits."""
        atexit.register(call)

    def release(self) -> None:
        """Do nothing: there is no thread."""

    def delivered_until(self) -> float:
        """Return 0: the balances of the grants include no usage."""
        return 0.0

    def flush(self, timeout: float | None = None) -> bool:  # noqa: ARG002
        """Return True: nothing waits."""
        return True

    def close(self, timeout: float | None = None) -> None:
        """Do nothing: nothing waits."""


def _adapted(
    policy: Policy, add_unmetered: Callable[[Mapping[str, Any]], object]
) -> Policy:
    """Return *policy* without disk and network, with another audit callback."""
    routes = policy.routes and {
        rule: {**own, "audit": _both(own["audit"], add_unmetered)}
        if own and "audit" in own
        else own
        for rule, own in policy.routes.items()
    }
    return dataclasses.replace(
        policy,
        audit=_both(policy.audit, add_unmetered),
        routes=routes,
        spool_dir=None,
        redis_url=None,
        delivery="thread",
    )


def _both(
    own: Any, add_unmetered: Callable[[Mapping[str, Any]], object]
) -> Callable[[dict[str, Any]], object]:
    """Return an audit callback that calls the policy's *own* one as well."""
    if own is None:
        return add_unmetered

    def call_both(record: dict[str, Any]) -> None:
        add_unmetered(record)
        not_metered.call_audit(own, record)

    return call_both

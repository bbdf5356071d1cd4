"""What one process owns: ids, counts, transport, entitlements, and its billings."""

from __future__ import annotations

import atexit
import contextlib
import mmap
import os
import sys
import time
import weakref
from collections import Counter, defaultdict, deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

from openmeter_wsgi import log
from openmeter_wsgi.billing import Billing
from openmeter_wsgi.delivery.client import OpenMeterClient
from openmeter_wsgi.delivery.queue import Backlog, MemoryDelivery
from openmeter_wsgi.entitlements.service import entitlement_service, visibility_of
from openmeter_wsgi.events import RequestIds
from openmeter_wsgi.health import Health, Problem
from openmeter_wsgi.stats import Counts, Stats
from openmeter_wsgi.threads import threads_are_greenlets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from openmeter_wsgi.entitlements.service import EntitlementService
    from openmeter_wsgi.entitlements.visibility import Visibility
    from openmeter_wsgi.policy import Policy
    from openmeter_wsgi.routes import Routes
    from openmeter_wsgi.status_codes import StatusCodes

logger: Final = log.get_logger(__name__)

#: What the policy of the middleware itself is called in counts.
DEFAULT = "default"
#: ``MADV_WIPEONFORK`` of Linux 4.14 and later, which `mmap` does not name.
_WIPE_ON_FORK = 18


class ProcessGuard:
    """Knows the process, and the kind of threads, that something was made for.

    Any thread. A fork made in C, such as uWSGI's, calls no hook of Python's, and
    `os.getpid()` is a system call. Where the kernel empties a page of memory in every
    child, reading one byte of it says the same at a quarter of the price.

    Locks made before gevent patches `threading` block all greenlets of a process. So
    the first request looks whether what was made still fits, and confirms it.
    """

    __slots__ = ("_confirmed_pid", "_greenlets", "_page", "_pid")

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._greenlets = threads_are_greenlets()
        self._confirmed_pid = 0
        self._page = _page_wiped_on_fork()

    def is_current(self) -> bool:
        """Say whether `confirm` was called, and in this process."""
        page = self._page
        return os.getpid() == self._confirmed_pid if page is None else page[0] == 1

    def fits(self) -> bool:
        """Say whether what was made can be used here."""
        return self.is_current() or (
            os.getpid() == self._pid and threads_are_greenlets() == self._greenlets
        )

    def confirm(self) -> None:
        """Note that a request has come, and that what was made fits."""
        self._confirmed_pid = os.getpid()
        if self._page is not None:
            self._page[0] = 1


def _page_wiped_on_fork() -> mmap.mmap | None:
    """Return a page that a child finds empty; None where the kernel has none."""
    if sys.platform != "linux":
        return None
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        page.madvise(_WIPE_ON_FORK)
    except (OSError, ValueError):
        page.close()  # an older kernel
        return None
    return page


class Transport(Protocol):
    """Takes the events of one process and brings them to OpenMeter, or elsewhere."""

    @property
    def started(self) -> bool:
        """Whether all was done that the first request brings about."""

    def start(self, environ: Mapping[str, Any]) -> object:
        """Do what the first request brings about. Called until `started`."""

    def put(self, event: bytes, /) -> object:
        """Take an event. Any thread; never raises, never waits for delivery."""

    def flush(self, timeout: float | None = None) -> bool:
        """Send what waits now; say whether all of it is done within *timeout*."""

    def close(self, timeout: float | None = None) -> None:
        """Send what waits until *timeout*, then stop and say what is left."""

    def at_exit(self, call: Callable[[], None]) -> None:
        """Have *call* made when the process ends, after this was closed."""

    def release(self) -> None:
        """Stop once nothing waits: nobody holds the middleware any more."""

    def delivered_until(self) -> float:
        """Return a moment (wall clock) before which all that was put is delivered."""

    @property
    def directory(self) -> Path | None:
        """The directory of the spool, None if events wait in memory."""

    @property
    def is_sender(self) -> bool:
        """Whether this process sends what is put."""

    @property
    def in_spool(self) -> Backlog:
        """What waits in files."""

    @property
    def in_memory(self) -> Backlog:
        """What waits in this process."""

    @property
    def problems(self) -> Sequence[Problem]:
        """What is wrong with the delivery now."""


class DryRun:
    """A transport that writes events to the log, and sends nothing. Any thread."""

    started = is_sender = True
    directory = None
    in_spool: Backlog = Backlog()
    in_memory: Backlog = Backlog()
    problems: tuple[Problem, ...] = ()

    def __init__(self, counts: Counts) -> None:
        self._counts = counts

    def start(self, environ: Mapping[str, Any]) -> None:
        """Do nothing: there is no thread."""

    def put(self, event: bytes) -> None:
        """Write an event to the log."""
        self._counts.dropped["dry_run"] += 1
        logger.info("dry run, would send %s", event.decode())

    def flush(self, timeout: float | None = None) -> bool:  # noqa: ARG002
        """Say that nothing waits."""
        return True

    def close(self, timeout: float | None = None) -> None:
        """Do nothing: nothing waits."""

    def at_exit(self, call: Callable[[], None]) -> None:
        """Have *call* made when the process ends."""
        atexit.register(call)

    def release(self) -> None:
        """Do nothing: there is no thread."""

    def delivered_until(self) -> float:
        """Return the present: nothing that was put is on its way."""
        return time.time()


class Process:
    """All that one process needs to bill its requests.

    A fork gets a new one: ids, counts, transport and connections are a process's own.
    Making it starts no thread and opens nothing.

    :param transport: what takes the events, in place of a delivery to OpenMeter. It
        counts what it does with them in *counts*.
    :param entitlements: what knows who has access, in place of OpenMeter.
    :param watch: what a client gets in place of each response: for tests.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        counts: Counts | None = None,
        transport: Transport | None = None,
        ids: RequestIds | None = None,
        entitlements: EntitlementService | None = None,
        watch: Callable[[Iterable[bytes]], Iterable[bytes]] | None = None,
    ) -> None:
        #: Whether this process is the one that it belongs to.
        self.guard: ProcessGuard = ProcessGuard()
        self.counts: Counts = counts or Counts()
        self.ids: RequestIds = ids or RequestIds()
        visibility = None
        if transport is None and entitlements is None:
            visibility = visibility_of(policy)
        #: What takes the events.
        self.transport: Transport = transport or _transport_of(
            policy, self.counts, visibility
        )
        self.entitlements: EntitlementService = entitlements or entitlement_service(
            policy, self.transport, visibility
        )
        self.watch = watch
        #: Whether all was done that the first request brings about.
        self.is_begun: bool = False
        self._hooks: list[FirstRequestHook] = []
        self._hooks_to_call: deque[FirstRequestHook] = deque()
        self._successors: dict[int, Process] = {}
        self._billings: list[Billing] = []
        #: What bills a request …
        self.billing: Billing = self.billing_of(policy, DEFAULT)
        #: … where its route does not say more.
        self.routes: Routes[Billing | None] | None = self._compiled(policy)

    # -- Requests

    def begin(self, environ: Mapping[str, Any]) -> None:
        """Do what the first request brings about. Never raises an Exception."""
        while self._hooks_to_call:
            try:
                self._hooks_to_call.popleft()(self)
            except IndexError:
                break  # another thread took the last one
            except Exception:
                logger.exception(
                    "%s: broke off; the request goes on without it", "beginning"
                )
        self.entitlements.begin(environ)
        self.transport.start(environ)
        self.is_begun = self.transport.started

    def on_first_request(self, hook: FirstRequestHook) -> None:
        """Have *hook* called with the first request that is settled.

        In this process, and in each one that is forked from it.
        """
        self._hooks.append(hook)
        self._hooks_to_call.append(hook)
        self.is_begun = False

    def billing_of(self, policy: Policy, name: str) -> Billing:
        """Make what bills under *policy*; its counts are part of `stats`."""
        billing = Billing(policy, name, self)
        self._billings.append(billing)
        return billing

    def billing_of_view(self, policy: Policy, name: str) -> Billing:
        """Make what bills a view, under what its options make of a policy."""
        billing = self.billing_of(policy, name)
        _say_what_errors_are_billed(billing)
        return billing

    def say_what_errors_are_billed(self) -> None:
        """Log each policy that bills responses that are errors."""
        for billing in self._billings:
            _say_what_errors_are_billed(billing)

    def successor(self, new_process: NewProcess, policy: Policy) -> Process:
        """Return what takes over in the process that was forked from this one.

        The threads of a new process may come here together: one of them wins.
        """
        made = new_process(policy)
        for hook in self._hooks:
            made.on_first_request(hook)
        return self._successors.setdefault(os.getpid(), made)

    def _compiled(self, policy: Policy) -> Routes[Billing | None] | None:
        if policy.routes is None:
            return None
        # Here and in `_transport_of`, as only some applications have routes, or a
        # spool. A child, which comes here with its first request, has it imported.
        from openmeter_wsgi.routes import Routes

        rules = [
            (rule, None if own is None else self.billing_of(own, rule.text))
            for rule, own in policy.of_routes
        ]
        return Routes(rules, self.billing, _strictness)

    # -- Everything else

    def invalidate(self, subject: str, feature: str | None) -> None:
        """Forget what is known of *subject*, whatever customer a policy makes of it."""
        for billing in tuple(self._billings):
            billing.gate.invalidate(subject, feature)

    def release(self) -> None:
        """End once nothing waits: nobody holds the middleware any more."""
        self.transport.release()
        self.entitlements.close_connections()
        self.entitlements.end()

    def close(self, timeout: float | None) -> None:
        """Give back what is set apart, send what waits, and stop."""
        self.entitlements.close()
        self.transport.close(timeout)
        self.entitlements.end()

    def stats(self) -> Stats:
        """Return the counts of this process."""
        by_policy: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for billing in list(self._billings):  # several may have one name
            by_policy[billing.name].update(dict(billing.not_metered.counts))
        in_spool, in_memory = self.transport.in_spool, self.transport.in_memory
        moments = [at for at in (in_spool.oldest_at, in_memory.oldest_at) if at]
        return self.counts.stats(
            waiting=in_spool.events + in_memory.events,
            waiting_in_spool=in_spool.events,
            waiting_bytes=in_spool.bytes + in_memory.bytes,
            oldest_at=min(moments, default=None),
            not_metered={name: dict(found) for name, found in by_policy.items()},
        )

    def health(self, max_age: float) -> Health:
        """Return what is wrong now."""
        problems = [*self.transport.problems, *self.entitlements.problems]
        stats = self.stats()
        if stats.oldest_at and (age := time.time() - stats.oldest_at) > max_age:
            problems.append(
                Problem(
                    "backlog",
                    f"{stats.waiting} events wait, the oldest for {age:.0f} s",
                )
            )
        return Health(tuple(problems))


#: Is called in each process that settles a request, with the first one.
FirstRequestHook: TypeAlias = "Callable[[Process], object]"
#: Makes what a middleware needs in a process.
NewProcess: TypeAlias = "Callable[[Policy], Process]"


class ProcessOwner(Protocol):
    """A middleware, as `replaced` sees it."""

    def replace_process(self, new_process: NewProcess) -> Callable[[], None]:
        """Let *new_process* make all that bills from now on; return what undoes it."""


_owners: weakref.WeakSet[ProcessOwner] = weakref.WeakSet()
_new_process: NewProcess = Process


def new_process_for(owner: ProcessOwner) -> NewProcess:
    """Remember a new middleware, and return what makes its process."""
    _owners.add(owner)
    return _new_process


@contextlib.contextmanager
def replaced(new_process: NewProcess) -> Iterator[None]:
    """Let *new_process* make what bills, for all middlewares old and new: for tests.

    It costs requests nothing: a middleware is told at the beginning and at the end.
    """
    global _new_process  # noqa: PLW0603 - there is one for all middlewares
    before, _new_process = _new_process, new_process
    restore = {owner: owner.replace_process(new_process) for owner in list(_owners)}
    try:
        yield
    finally:
        _new_process = before
        for owner in list(_owners):
            if owner in restore:
                restore[owner]()
            else:
                owner.replace_process(before)


def client_factory(policy: Policy) -> Callable[[], OpenMeterClient]:
    """Return a function that makes a client for the server of *policy*."""
    return partial(
        OpenMeterClient,
        url=policy.api_url,
        flavor=policy.api_flavor,
        key=policy.key,
        timeout=policy.request_timeout,
    )


def _transport_of(
    policy: Policy, counts: Counts, visibility: Visibility | None
) -> Transport:
    if policy.dry_run:
        return DryRun(counts)
    new_client = client_factory(policy)
    if policy.spool_dir is None:
        if visibility is None:
            return MemoryDelivery(policy, new_client(), counts)
        accepted = visibility.accepted
        return MemoryDelivery(policy, new_client(), counts, accepted=accepted)
    from openmeter_wsgi.spool.delivery import SpoolDelivery

    return SpoolDelivery(policy, new_client, counts, listener=visibility)


def _strictness(billing: Billing | None) -> tuple[bool, bool, float]:
    """Return what sorts the policies of one request that may be two: see `Routes`."""
    if billing is None:
        return False, False, 0.0
    return True, billing.asks, sum(map(float, billing.policy.static.numbers.values()))


def _say_what_errors_are_billed(billing: Billing) -> None:
    codes: StatusCodes = billing.policy.meter_on_status_codes  # type: ignore[assignment]
    if not any(code[0] in "45" for code in codes.codes):
        return
    logger.warning(
        "%s: meter_on_status_codes=%r bills responses that are errors, too",
        f"policy {billing.name!r}", codes.text,
    )  # fmt: skip

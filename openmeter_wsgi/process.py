"""The metering state of one process: ids, counts, transport, entitlements, billings.

A middleware has one `Process` per operating-system process. After a fork, the child's
first request makes a new `Process`: threads, locks and sockets of the parent are of no
use in the child, and events that the parent queued are sent by the parent.
"""

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
from openmeter_wsgi.stats import Counts, Health, Problem, Stats
from openmeter_wsgi.threads import threads_are_greenlets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from openmeter_wsgi.entitlements.service import EntitlementService
    from openmeter_wsgi.entitlements.visibility_probes import Visibility
    from openmeter_wsgi.policy import Policy
    from openmeter_wsgi.routes import Routes
    from openmeter_wsgi.status_codes import StatusCodes

logger: Final = log.get_logger(__name__)

#: Name of the middleware's own policy in counts.
DEFAULT = "default"
#: ``MADV_WIPEONFORK`` of Linux 4.14 and later. The module `mmap` has no name for it.
_WIPE_ON_FORK = 18


class ProcessGuard:
    """Detects that the process has forked since the guard was made. Any thread.

    `os.register_at_fork` misses forks made in C, such as uWSGI's, and `os.getpid()` is
    a system call for each request. So the guard holds a page of memory that the kernel
    wipes in every child, and reads one byte of it: a quarter of the cost.

    Locks made before gevent patches `threading` would block all greenlets of a process.
    So the first request also checks the kind of threads, and then confirms the guard.
    """

    __slots__ = ("_confirmed_pid", "_greenlets", "_page", "_pid")

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._greenlets = threads_are_greenlets()
        self._confirmed_pid = 0
        self._page = _page_wiped_on_fork()

    def is_confirmed(self) -> bool:
        """Return True if `confirm` was called in this process. Fast."""
        page = self._page
        return os.getpid() == self._confirmed_pid if page is None else page[0] == 1

    def is_valid(self) -> bool:
        """Return True if the process and its kind of threads are those of `__init__`.

        False after a fork, and after gevent has patched `threading`.
        """
        return self.is_confirmed() or (
            os.getpid() == self._pid and threads_are_greenlets() == self._greenlets
        )

    def confirm(self) -> None:
        """Make `is_confirmed` return True in this process."""
        self._confirmed_pid = os.getpid()
        if self._page is not None:
            self._page[0] = 1


def _page_wiped_on_fork() -> mmap.mmap | None:
    """Return a page of memory that is zero in each child, None if not supported."""
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
    """Queues and delivers the events of one process."""

    @property
    def started(self) -> bool:
        """True once `start` has finished."""

    def start(self, environ: Mapping[str, Any]) -> object:
        """Start delivery. Requests call this until `started` is true."""

    def put(self, event: bytes, /) -> object:
        """Queue an encoded event. Any thread. Never raises or waits for delivery."""

    def flush(self, timeout: float | None = None) -> bool:
        """Send the queued events; return True if none is left after *timeout* s."""

    def close(self, timeout: float | None = None) -> None:
        """Send the queued events for *timeout* seconds, then stop and log the rest."""

    def at_exit(self, call: Callable[[], None]) -> None:
        """Call *call* when the process exits, after the transport is closed."""

    def release(self) -> None:
        """Stop once the queue is empty, because the middleware is no longer used."""

    def delivered_until(self) -> float:
        """Return the Unix time in seconds up to which all events are delivered."""

    @property
    def directory(self) -> Path | None:
        """The directory of the spool, None if events are queued in memory."""

    @property
    def is_sender(self) -> bool:
        """True if this process sends its events itself."""

    @property
    def in_spool(self) -> Backlog:
        """The events queued in files."""

    @property
    def in_memory(self) -> Backlog:
        """The events queued in the memory of this process."""

    @property
    def problems(self) -> Sequence[Problem]:
        """The current problems of delivery."""


class DryRunTransport:
    """A transport that logs events and sends none. Any thread."""

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
        """Log an event and count it as dropped."""
        self._counts.dropped["dry_run"] += 1
        logger.info("dry run, would send %s", event.decode())

    def flush(self, timeout: float | None = None) -> bool:  # noqa: ARG002
        """Return True: the queue is always empty."""
        return True

    def close(self, timeout: float | None = None) -> None:
        """Do nothing: the queue is always empty."""

    def at_exit(self, call: Callable[[], None]) -> None:
        """Call *call* when the process exits."""
        atexit.register(call)

    def release(self) -> None:
        """Do nothing: there is no thread."""

    def delivered_until(self) -> float:
        """Return the current time: no event is queued."""
        return time.time()


class Process:
    """The metering state of one process. Any thread.

    The constructor starts no thread and opens no file or socket: servers make the
    middleware before they fork.

    :param transport: receives the events in place of delivery to OpenMeter, and counts
        them in *counts*.
    :param entitlements: decides on access in place of OpenMeter.
    :param wrap: wraps each response; for tests.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        counts: Counts | None = None,
        transport: Transport | None = None,
        ids: RequestIds | None = None,
        entitlements: EntitlementService | None = None,
        wrap: Callable[[Iterable[bytes]], Iterable[bytes]] | None = None,
    ) -> None:
        #: Detects that this object belongs to a parent process.
        self.guard: ProcessGuard = ProcessGuard()
        self.counts: Counts = counts or Counts()
        self.ids: RequestIds = ids or RequestIds()
        visibility = None
        if transport is None and entitlements is None:
            visibility = visibility_of(policy)
        self.transport: Transport = transport or _transport_of(
            policy, self.counts, visibility
        )
        self.entitlements: EntitlementService = entitlements or entitlement_service(
            policy, self.transport, visibility
        )
        self.wrap = wrap
        #: True once `start` has finished.
        self.is_started: bool = False
        self._hooks: list[FirstRequestHook] = []
        self._hooks_to_call: deque[FirstRequestHook] = deque()
        self._successors: dict[int, Process] = {}
        self._billings: list[Billing] = []
        #: The billing of the middleware's own policy.
        self.billing: Billing = self.billing_of(policy, DEFAULT)
        #: The billings of routes, None without the option ``routes``.
        self.routes: Routes[Billing | None] | None = self._routes_of(policy)

    # -- Requests

    def start(self, environ: Mapping[str, Any]) -> None:
        """Call the hooks and start delivery. Never raises an Exception."""
        while self._hooks_to_call:
            try:
                self._hooks_to_call.popleft()(self)
            except IndexError:
                break  # another thread took the last hook
            except Exception:
                logger.exception(
                    "a hook of the first request raised; the request goes on"
                )
        self.entitlements.begin(environ)
        self.transport.start(environ)
        self.is_started = self.transport.started

    def on_first_request(self, hook: FirstRequestHook) -> None:
        """Call *hook* once in this process and once in each child."""
        self._hooks.append(hook)
        self._hooks_to_call.append(hook)
        self.is_started = False

    def billing_of(self, policy: Policy, name: str) -> Billing:
        """Return a new billing of *policy*. `stats` includes its counts."""
        billing = Billing(policy, name, self)
        self._billings.append(billing)
        return billing

    def billing_of_view(self, policy: Policy, name: str) -> Billing:
        """Return a new billing of a view that has its own options."""
        billing = self.billing_of(policy, name)
        _warn_of_billed_errors(billing)
        return billing

    def warn_of_billed_errors(self) -> None:
        """Log a warning for each policy that bills error responses."""
        for billing in self._billings:
            _warn_of_billed_errors(billing)

    def successor(self, new_process: NewProcess, policy: Policy) -> Process:
        """Return the `Process` that replaces this one in the calling process.

        Several threads may call this at the same time. All get the same object.
        """
        successor = new_process(policy)
        for hook in self._hooks:
            successor.on_first_request(hook)
        return self._successors.setdefault(os.getpid(), successor)

    def _routes_of(self, policy: Policy) -> Routes[Billing | None] | None:
        if policy.routes is None:
            return None
        # Imported here and in `_transport_of`, because only some applications have
        # routes or a spool. A forked child finds them imported.
        from openmeter_wsgi.routes import Routes

        rules = [
            (rule, None if p is None else self.billing_of(p, rule.text))
            for rule, p in policy.route_policies
        ]
        return Routes(rules, self.billing, _strictness)

    # -- Administration

    def invalidate(self, subject: str, feature: str | None) -> None:
        """Remove the cached entitlements of *subject*, for every policy."""
        for billing in tuple(self._billings):
            billing.gate.invalidate(subject, feature)

    def release(self) -> None:
        """Stop once the queue is empty, because the middleware is no longer used."""
        self.transport.release()
        self.entitlements.close_connections()
        self.entitlements.end()

    def close(self, timeout: float | None) -> None:
        """Release quota reservations, send the queued events, and stop."""
        self.entitlements.close(timeout)
        self.transport.close(timeout)
        self.entitlements.end()

    def stats(self) -> Stats:
        """Return the counts of this process."""
        by_policy: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for billing in list(self._billings):  # several may have the same name
            by_policy[billing.name].update(dict(billing.not_metered.counts))
        in_spool, in_memory = self.transport.in_spool, self.transport.in_memory
        times = [at for at in (in_spool.oldest_at, in_memory.oldest_at) if at]
        return self.counts.stats(
            waiting=in_spool.events + in_memory.events,
            waiting_in_spool=in_spool.events,
            waiting_bytes=in_spool.bytes + in_memory.bytes,
            oldest_at=min(times, default=None),
            not_metered={name: dict(counts) for name, counts in by_policy.items()},
        )

    def health(self, max_age: float) -> Health:
        """Return the current problems. *max_age* is in seconds."""
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


#: Called once in each process, when it settles its first request.
FirstRequestHook: TypeAlias = "Callable[[Process], object]"
#: Makes the `Process` of a middleware.
NewProcess: TypeAlias = "Callable[[Policy], Process]"


class ProcessOwner(Protocol):
    """The interface of a middleware that `replaced` uses."""

    def replace_process(self, new_process: NewProcess) -> Callable[[], None]:
        """Use *new_process* from now on; return a function that undoes this."""


_owners: weakref.WeakSet[ProcessOwner] = weakref.WeakSet()
_new_process: NewProcess = Process


def register_middleware(owner: ProcessOwner) -> NewProcess:
    """Register a new middleware for `replaced`; return the factory of its `Process`."""
    _owners.add(owner)
    return _new_process


@contextlib.contextmanager
def replaced(new_process: NewProcess) -> Iterator[None]:
    """Use *new_process* for all middlewares, existing and new. For tests.

    Each middleware is changed on entry and restored on exit, so requests need no check.
    """
    global _new_process  # noqa: PLW0603 - shared by all middlewares
    previous, _new_process = _new_process, new_process
    restore = {owner: owner.replace_process(new_process) for owner in list(_owners)}
    try:
        yield
    finally:
        _new_process = previous
        for owner in list(_owners):
            if owner in restore:
                restore[owner]()
            else:
                owner.replace_process(previous)


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
        return DryRunTransport(counts)
    new_client = client_factory(policy)
    if policy.spool_dir is None:
        if visibility is None:
            return MemoryDelivery(policy, new_client(), counts)
        accepted = visibility.accepted
        return MemoryDelivery(policy, new_client(), counts, accepted=accepted)
    from openmeter_wsgi.spool.delivery import SpoolDelivery

    return SpoolDelivery(policy, new_client, counts, listener=visibility)


def _strictness(billing: Billing | None) -> tuple[bool, bool, float]:
    """Return the sort key by which `Routes` compares billings: the stricter is larger.

    Metered over unmetered, then with entitlements over without, then the larger sum of
    the static meters.
    """
    if billing is None:
        return False, False, 0.0
    return (
        True,
        billing.requires_entitlements,
        sum(map(float, billing.policy.static.numbers.values())),
    )


def _warn_of_billed_errors(billing: Billing) -> None:
    codes: StatusCodes = billing.policy.meter_on_status_codes  # type: ignore[assignment]
    if not any(code[0] in "45" for code in codes.codes):
        return
    logger.warning(
        "%s: meter_on_status_codes=%r bills error responses too",
        f"policy {billing.name!r}", codes.text,
    )  # fmt: skip

"""The state of one process: ids, counts, transport, entitlements and billings."""

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

#: The name of the middleware's own policy in counts.
DEFAULT = "default"
#: ``MADV_WIPEONFORK`` of Linux 4.14 and later, which `mmap` does not name.
_WIPE_ON_FORK = 18


class ProcessGuard:
    """Tells whether this process is the one that the guard was made in. Any thread.

    A fork made in C, such as uWSGI's, calls no hook of Python, and `os.getpid()` is a
    system call. If the kernel can wipe a page of memory in every child, reading one
    byte of it costs a quarter of that.

    Locks made before gevent patches `threading` block all greenlets of a process. So
    the first request checks the kind of threads, too, and confirms the guard.
    """

    __slots__ = ("_confirmed_pid", "_greenlets", "_page", "_pid")

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._greenlets = threads_are_greenlets()
        self._confirmed_pid = 0
        self._page = _page_wiped_on_fork()

    def is_current(self) -> bool:
        """Return True if `confirm` was called in this process."""
        page = self._page
        return os.getpid() == self._confirmed_pid if page is None else page[0] == 1

    def fits(self) -> bool:
        """Return True if neither the process nor the kind of threads has changed."""
        return self.is_current() or (
            os.getpid() == self._pid and threads_are_greenlets() == self._greenlets
        )

    def confirm(self) -> None:
        """Note that this process serves requests."""
        self._confirmed_pid = os.getpid()
        if self._page is not None:
            self._page[0] = 1


def _page_wiped_on_fork() -> mmap.mmap | None:
    """Return a page that a child finds empty, None if the kernel has none."""
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
    """Takes the events of one process and delivers them."""

    @property
    def started(self) -> bool:
        """True once `start` has done all its work."""

    def start(self, environ: Mapping[str, Any]) -> object:
        """Start with the first request. Called until `started` is true."""

    def put(self, event: bytes, /) -> object:
        """Take an event. Any thread; never raises, never waits for delivery."""

    def flush(self, timeout: float | None = None) -> bool:
        """Send the waiting events; return True if all are done within *timeout*."""

    def close(self, timeout: float | None = None) -> None:
        """Send the waiting events until *timeout*, then stop and log the rest."""

    def at_exit(self, call: Callable[[], None]) -> None:
        """Call *call* at the end of the process, after the transport was closed."""

    def release(self) -> None:
        """Stop once no event waits: nobody uses the middleware any more."""

    def delivered_until(self) -> float:
        """Return a time (wall clock) up to which all events are delivered."""

    @property
    def directory(self) -> Path | None:
        """The directory of the spool, None if events wait in memory."""

    @property
    def is_sender(self) -> bool:
        """True if this process sends its events itself."""

    @property
    def in_spool(self) -> Backlog:
        """The events that wait in files."""

    @property
    def in_memory(self) -> Backlog:
        """The events that wait in the memory of this process."""

    @property
    def problems(self) -> Sequence[Problem]:
        """The current problems of the delivery."""


class DryRun:
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
        """Write an event to the log."""
        self._counts.dropped["dry_run"] += 1
        logger.info("dry run, would send %s", event.decode())

    def flush(self, timeout: float | None = None) -> bool:  # noqa: ARG002
        """Return True: no event waits."""
        return True

    def close(self, timeout: float | None = None) -> None:
        """Do nothing: no event waits."""

    def at_exit(self, call: Callable[[], None]) -> None:
        """Call *call* at the end of the process."""
        atexit.register(call)

    def release(self) -> None:
        """Do nothing: there is no thread."""

    def delivered_until(self) -> float:
        """Return the present: no event is on its way."""
        return time.time()


class Process:
    """The state with which one process bills its requests.

    A forked process makes its own. The constructor starts no thread and opens nothing.

    :param transport: takes the events in place of the delivery to OpenMeter, and counts
        them in *counts*.
    :param entitlements: decides on access in place of OpenMeter.
    :param watch: wraps each response, for tests.
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
        #: Tells whether this process is the one it belongs to.
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
        self.watch = watch
        #: True once `begin` has done all its work.
        self.is_begun: bool = False
        self._hooks: list[FirstRequestHook] = []
        self._hooks_to_call: deque[FirstRequestHook] = deque()
        self._successors: dict[int, Process] = {}
        self._billings: list[Billing] = []
        #: The billing of the middleware's own policy …
        self.billing: Billing = self.billing_of(policy, DEFAULT)
        #: … and those of routes.
        self.routes: Routes[Billing | None] | None = self._compiled(policy)

    # -- Requests

    def begin(self, environ: Mapping[str, Any]) -> None:
        """Call the hooks and start the transport. Never raises an Exception."""
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
        """Call *hook* with the first settled request, in this process and its forks."""
        self._hooks.append(hook)
        self._hooks_to_call.append(hook)
        self.is_begun = False

    def billing_of(self, policy: Policy, name: str) -> Billing:
        """Make a billing of *policy*, whose counts become part of `stats`."""
        billing = Billing(policy, name, self)
        self._billings.append(billing)
        return billing

    def billing_of_view(self, policy: Policy, name: str) -> Billing:
        """Make the billing of a view with options of its own."""
        billing = self.billing_of(policy, name)
        _say_what_errors_are_billed(billing)
        return billing

    def say_what_errors_are_billed(self) -> None:
        """Log each policy that bills responses that are errors."""
        for billing in self._billings:
            _say_what_errors_are_billed(billing)

    def successor(self, new_process: NewProcess, policy: Policy) -> Process:
        """Return the `Process` of a process that was forked from this one.

        Several threads may call it at once; all get the same one.
        """
        made = new_process(policy)
        for hook in self._hooks:
            made.on_first_request(hook)
        return self._successors.setdefault(os.getpid(), made)

    def _compiled(self, policy: Policy) -> Routes[Billing | None] | None:
        if policy.routes is None:
            return None
        # Imported here and in `_transport_of`: only some applications have routes or a
        # spool. A forked child finds both imported.
        from openmeter_wsgi.routes import Routes

        rules = [
            (rule, None if own is None else self.billing_of(own, rule.text))
            for rule, own in policy.of_routes
        ]
        return Routes(rules, self.billing, _strictness)

    # -- Everything else

    def invalidate(self, subject: str, feature: str | None) -> None:
        """Forget the cached answers about *subject*, under every policy."""
        for billing in tuple(self._billings):
            billing.gate.invalidate(subject, feature)

    def release(self) -> None:
        """End once no event waits: nobody uses the middleware any more."""
        self.transport.release()
        self.entitlements.close_connections()
        self.entitlements.end()

    def close(self, timeout: float | None) -> None:
        """Give back reservations, send the waiting events, and stop."""
        self.entitlements.close(timeout)
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
        """Return the current problems."""
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


#: Called in each process with the first request that it settles.
FirstRequestHook: TypeAlias = "Callable[[Process], object]"
#: Makes the `Process` of a middleware.
NewProcess: TypeAlias = "Callable[[Policy], Process]"


class ProcessOwner(Protocol):
    """A middleware, as `replaced` sees it."""

    def replace_process(self, new_process: NewProcess) -> Callable[[], None]:
        """Use *new_process* from now on; return a function that undoes it."""


_owners: weakref.WeakSet[ProcessOwner] = weakref.WeakSet()
_new_process: NewProcess = Process


def new_process_for(owner: ProcessOwner) -> NewProcess:
    """Register a new middleware, and return the factory of its `Process`."""
    _owners.add(owner)
    return _new_process


@contextlib.contextmanager
def replaced(new_process: NewProcess) -> Iterator[None]:
    """Use *new_process* for all middlewares, old and new: for tests.

    Requests do not get slower: each middleware is changed at the beginning and end.
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
    """Return the sort key by which `Routes` compares two policies."""
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

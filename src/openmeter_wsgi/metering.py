"""All that one process owns: its queue, its ids, its counts, one billing per policy."""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from functools import partial
from typing import TYPE_CHECKING

from openmeter_wsgi import log
from openmeter_wsgi.billing import Billing
from openmeter_wsgi.delivery.client import OpenMeterClient
from openmeter_wsgi.delivery.queue import MemoryDelivery
from openmeter_wsgi.entitlements.making import entitlements_of
from openmeter_wsgi.events import RequestIds
from openmeter_wsgi.forks import ProcessGuard
from openmeter_wsgi.health import Health, Problem
from openmeter_wsgi.stats import Counts, Stats

if TYPE_CHECKING:
    from collections.abc import Callable

    from openmeter_wsgi.entitlements.checking import Entitlements
    from openmeter_wsgi.policy import Policy
    from openmeter_wsgi.routes import Routes
    from openmeter_wsgi.spool.delivery import SpoolDelivery
    from openmeter_wsgi.status_codes import StatusCodes

logger = log.get_logger(__name__)

#: What the policy of the middleware itself is called in counts.
DEFAULT = "default"


class Metering:
    """All that one process needs to bill its requests.

    A fork gets a new one: ids, counts, queue and connections are a process's own.
    Making it starts no thread and opens nothing but a spool's directory.

    :raises ConfigError: if the directory of the spool cannot be one.
    """

    def __init__(self, policy: Policy) -> None:
        if policy.spool_dir is not None and not policy.dry_run:
            from openmeter_wsgi.spool.files import prepare_directory

            prepare_directory(policy.spool_dir)
        self._begin(policy)
        for billing in self._billings:
            _say_what_errors_are_billed(billing)

    def _begin(self, policy: Policy) -> None:
        #: What process, and what kind of threads, it belongs to.
        self.guard = ProcessGuard()
        #: Whether a request has found that it fits: see `ProcessGuard`.
        self.is_own = self.guard.mark
        self._followers: list[Callable[[Metering], None]] = []
        self.counts = Counts()
        self.queue = self._new_queue(policy)
        #: Hand one event to delivery. May be repeated with the same event.
        self.put: Callable[[bytes], object] = self._way_out(policy)
        self._policy = policy
        self.entitlements = self._new_entitlements(policy)
        self.ids = self._new_ids()
        self._billings: list[Billing] = []
        self.billing = self.billing_of(policy, DEFAULT)
        #: What governs the requests of single routes, None if nothing else does.
        self.routes = self._compiled(policy)
        #: What governs every request, None where each has to be looked at first …
        self.plain = self._plain()
        #: … or only has to pass its gate.
        self.gated = self._gated()

    # -- What it is made of, which may be something else in a test

    def _new_queue(self, policy: Policy) -> MemoryDelivery | SpoolDelivery:
        new_client = partial(
            OpenMeterClient,
            url=policy.api_url,
            flavor=policy.api_flavor,
            key=policy.key,
            timeout=policy.request_timeout,
        )
        if policy.spool_dir is None or policy.dry_run:
            return MemoryDelivery(policy, new_client(), self.counts)
        # Here and in `_compiled`, as only some applications have a spool, or routes. A
        # forked child, which comes here with its first request, has it imported.
        from openmeter_wsgi.spool.delivery import SpoolDelivery

        return SpoolDelivery(policy, new_client, self.counts)

    def _way_out(self, policy: Policy) -> Callable[[bytes], object]:
        return self._log_instead if policy.dry_run else self.queue.put

    def _plain(self) -> Billing | None:
        billing = self.billing
        is_plain = self.routes is None and not billing.asks and billing.bodies is None
        return billing if is_plain else None

    def _gated(self) -> Billing | None:
        billing = self.billing
        is_gated = self.routes is None and billing.asks and billing.bodies is None
        return billing if is_gated else None

    def _new_entitlements(self, policy: Policy) -> Entitlements:
        return entitlements_of(policy, self.queue.delivered_until)

    def _new_ids(self) -> RequestIds:
        return RequestIds()

    # -- Requests

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

    def _compiled(self, policy: Policy) -> Routes[Billing | None] | None:
        if policy.routes is None:
            return None
        from openmeter_wsgi.routes import Routes

        rules = [
            (rule, None if own is None else self.billing_of(own, rule.text))
            for rule, own in policy.of_routes
        ]
        return Routes(rules, self.billing if policy.unmatched else None)

    def successor(self) -> Metering:
        """Return what takes over in the process that was forked from this one's.

        The threads of a new process may come here together: one of them wins.
        """
        made = self.another()
        successor: Metering = self.__dict__.setdefault("_successor", made)
        return successor

    def another(self) -> Metering:
        """Return one under the same policy, with the same followers."""
        made = self.later(self._policy)
        for begin in self._followers:
            made.follow(begin)
        return made

    def follow(self, begin: Callable[[Metering], None]) -> None:
        """Have *begin* called with the first request that is settled.

        In this process, and in each one that is forked from it, with its own metering.
        """
        self._followers.append(begin)
        self.queue.announce(lambda: begin(self))
        for billing in self._billings:
            billing.usual.forget()  # what is announced begins the long way

    @classmethod
    def later(cls, policy: Policy) -> Metering:
        """Return one that is made after the start of the application.

        Not __init__: what is wrong with the spool now must not hurt a request.
        """
        made = Metering.__new__(Metering)
        made._begin(policy)
        return made

    def invalidate(self, subject: str, feature: str | None) -> None:
        """Forget what is known of *subject*, whatever customer a policy makes of it."""
        for billing in tuple(self._billings):
            billing.gate.invalidate(subject, feature)

    def close(self, timeout: float | None) -> None:
        """Give back what is set apart, send what waits, and stop."""
        self.entitlements.close()
        self.queue.close(timeout)

    def stats(self) -> Stats:
        """Return the counts of this process."""
        by_policy: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for billing in list(self._billings):  # several may have one name
            by_policy[billing.name].update(billing.not_metered())
        in_spool, in_memory = self.queue.in_spool, self.queue.in_memory
        moments = [at for at in (in_spool.oldest_at, in_memory.oldest_at) if at]
        usual = [billing.usual for billing in list(self._billings)]
        return self.counts.stats(
            usually_metered=sum(ways.metered for ways in usual),
            usual_events=sum(ways.events for ways in usual),
            waiting=in_spool.events + in_memory.events,
            waiting_in_spool=in_spool.events,
            waiting_bytes=in_spool.bytes + in_memory.bytes,
            oldest_at=min(moments, default=None),
            not_metered={name: dict(found) for name, found in by_policy.items()},
        )

    def health(self, max_age: float) -> Health:
        """Return what is wrong now."""
        problems = [*self.queue.problems, *self.entitlements.problems]
        stats = self.stats()
        if stats.oldest_at and (age := time.time() - stats.oldest_at) > max_age:
            problems.append(
                Problem(
                    "backlog",
                    f"{stats.waiting} events wait, the oldest for {age:.0f} s",
                )
            )
        return Health(tuple(problems))

    def _log_instead(self, event: bytes) -> None:
        self.counts.dropped["dry_run"] += 1
        logger.info("dry run, would send %s", event.decode())


def _say_what_errors_are_billed(billing: Billing) -> None:
    codes: StatusCodes = billing.policy.meter_on_status_codes  # type: ignore[assignment]
    if not any(code[0] in "45" for code in codes.codes):
        return
    intended = billing.policy.billing_errors == "intended"
    logger.log(
        logging.INFO if intended else logging.WARNING,
        "%s: responses of %s are billed, errors among them%s",
        f"policy {billing.name!r}", codes.text,
        "" if intended else " (say billing_errors='intended' if that is meant)",
    )  # fmt: skip

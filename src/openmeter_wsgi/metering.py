"""All that one process owns: its queue, its ids, its counts, one billing per policy."""

from __future__ import annotations

import logging
import os
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

from openmeter_wsgi import log
from openmeter_wsgi.billing import Billing
from openmeter_wsgi.client import OpenMeterClient
from openmeter_wsgi.delivery.directory import prepare_directory
from openmeter_wsgi.delivery.queue import DeliveryQueue
from openmeter_wsgi.delivery.spool_queue import SpoolQueue
from openmeter_wsgi.entitlements.making import entitlements_of
from openmeter_wsgi.events import RequestIds
from openmeter_wsgi.routes import Routes
from openmeter_wsgi.stats import Counts, Stats

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from openmeter_wsgi.policy import Policy
    from openmeter_wsgi.status_codes import StatusCodes

logger = log.get_logger(__name__)

#: Reasons for which an event is dropped, and not a meter before it became one.
_AFTER_ENCODING = ("queue_full", "dry_run", "spool_full", "spool_error", "too_large")
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
            prepare_directory(policy.spool_dir)
        self._begin(policy)
        for billing in self._billings:
            _say_what_errors_are_billed(billing)

    def _begin(self, policy: Policy) -> None:
        self.pid = os.getpid()
        self.counts = Counts()
        new_client = partial(
            OpenMeterClient,
            url=policy.api_url,
            flavor=policy.api_flavor,
            key=policy.key,
            timeout=policy.request_timeout,
        )
        self.queue = _queue(policy, new_client, self.counts)
        self._put = self._log_instead if policy.dry_run else self.queue.put
        self._policy = policy
        self.entitlements = entitlements_of(policy, self.queue.delivered_until)
        self._new_id = RequestIds().new
        self._billings: list[Billing] = []
        self.billing = self.billing_of(policy, DEFAULT)
        self._routes = self._compiled(policy)

    def billing_for(self, environ: Mapping[str, Any]) -> Billing | None:
        """Return what governs a request, None if it is not metered."""
        routes = self._routes
        return self.billing if routes is None else routes.find(environ)

    def billing_of(self, policy: Policy, name: str) -> Billing:
        """Make what bills under *policy*; its counts are part of `stats`."""
        billing = Billing(
            policy,
            name,
            counts=self.counts,
            entitlements=self.entitlements,
            new_id=self._new_id,
            vary=self.billing_of,
        )
        self._billings.append(billing)
        return billing

    def _compiled(self, policy: Policy) -> Routes[Billing | None] | None:
        if policy.routes is None:
            return None
        rules = [
            (rule, None if own is None else self.billing_of(own, rule.text))
            for rule, own in policy.of_routes
        ]
        return Routes(rules, self.billing if policy.unmatched else None)

    def successor(self) -> Metering:
        """Return what takes over in the process that was forked from this one's.

        The threads of a new process may come here together: one of them wins.
        """
        made = Metering.__new__(Metering)
        # Not __init__: what is wrong with the spool now must not hurt a request.
        made._begin(self._policy)
        successor: Metering = self.__dict__.setdefault("_successor", made)
        return successor

    def put(self, events: Sequence[bytes]) -> None:
        """Hand the events to delivery. May be repeated with the same events."""
        for event in events:
            self._put(event)

    def invalidate(self, subject: str, feature: str | None) -> None:
        """Forget what is known of *subject*, whatever customer a policy makes of it."""
        for billing in tuple(self._billings):
            billing.gate.invalidate(subject, feature)

    def count_late(self, helper: str) -> None:
        """Count usage stated after its request was settled."""
        self.counts.dropped["late"] += 1
        logger.error("%s: called after the response had ended; not billed", helper)

    def close(self, timeout: float | None) -> None:
        """Give back what is set apart, send what waits, and stop."""
        self.entitlements.close()
        self.queue.close(timeout)

    def stats(self) -> Stats:
        """Return the counts of this process."""
        counts = self.counts
        waiting = self.queue.waiting
        dropped = {reason: n for reason, n in counts.dropped.items() if n}
        made = sum(dropped.get(reason, 0) for reason in _AFTER_ENCODING)
        by_policy = {b.name: dict(b.not_metered) for b in self._billings}
        return Stats(
            settled=counts.settled,
            events=counts.delivered + waiting + counts.dead_lettered + made,
            delivered=counts.delivered,
            waiting=waiting,
            not_metered=dict(sum(map(Counter, by_policy.values()), Counter())),
            not_metered_by_policy={k: v for k, v in by_policy.items() if v},
            dropped=dropped,
            dead_lettered=counts.dead_lettered,
            ambiguous=counts.ambiguous,
            retries=counts.retries,
            unspooled=counts.unspooled,
            allowed=dict(counts.allowed),
            denied=dict(counts.denied),
            let_through=dict(counts.let_through),
        )

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


def _queue(
    policy: Policy, new_client: Callable[[], OpenMeterClient], counts: Counts
) -> DeliveryQueue | SpoolQueue:
    if policy.spool_dir is None or policy.dry_run:
        return DeliveryQueue(policy, new_client(), counts)
    return SpoolQueue(policy, new_client, counts)

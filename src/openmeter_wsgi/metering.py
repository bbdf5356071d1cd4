"""From the end of a response to its events: what is billed, and what is not."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from openmeter_wsgi import log
from openmeter_wsgi.client import OpenMeterClient
from openmeter_wsgi.delivery.directory import prepare_directory
from openmeter_wsgi.delivery.queue import DeliveryQueue
from openmeter_wsgi.delivery.spool_queue import SpoolQueue
from openmeter_wsgi.entitlements.gate import Gate
from openmeter_wsgi.entitlements.making import entitlements_of
from openmeter_wsgi.environ import RESERVED, is_options
from openmeter_wsgi.events import RequestIds, StaticEvents, encode_events
from openmeter_wsgi.stats import Counts, Stats
from openmeter_wsgi.subject import subject_finder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from openmeter_wsgi.meters import RunTimeMeters
    from openmeter_wsgi.policy import Policy
    from openmeter_wsgi.usage import Meter

logger = log.get_logger(__name__)

Environ: TypeAlias = dict[str, Any]

#: How a response ended. COMPLETED: to its end. FAILED: the application raised.
#: ABORTED: the server closed it early, because the client went away.
COMPLETED, FAILED, ABORTED = "completed", "failed", "aborted"


#: Reasons for which an event is dropped, and not a meter before it became one.
_AFTER_ENCODING = ("queue_full", "dry_run", "spool_full", "spool_error", "too_large")


class Metering:
    """All that one process needs to bill its requests under one policy.

    A fork gets a new one: ids, counts, queue and connections are a process's own.
    Making it starts no thread and opens nothing but a spool's directory.

    :raises ConfigError: if the directory of the spool cannot be one.
    """

    def __init__(self, policy: Policy) -> None:
        if policy.spool_dir is not None and not policy.dry_run:
            prepare_directory(policy.spool_dir)
        self._begin(policy)

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
        self._codes = policy.meter_on_status_codes.codes  # type: ignore[union-attr]
        self._static_meters = policy.static_meters
        plain = all(meter.plain for meter in self._static_meters)
        self._counts_down = bool(policy.entitlement_meters)
        self._static = (
            StaticEvents(self._static_meters, policy.event_source)
            if plain and not self._counts_down
            else None
        )
        self._find_subject = subject_finder(policy)
        self.entitlements = entitlements_of(policy, self.queue.delivered_until)
        self.gate = Gate(
            policy,
            self.entitlements,
            find_subject=self._find_subject,
            counts=self.counts,
        )
        self._new_id = RequestIds().new
        header = policy.trusted_request_id_header
        self._id_key = header and "HTTP_" + header.upper().replace("-", "_")

    def successor(self) -> Metering:
        """Return what takes over in the process that was forked from this one's.

        The threads of a new process may come here together: one of them wins.
        """
        made = Metering.__new__(Metering)
        # Not __init__: what is wrong with the spool now must not hurt a request.
        made._begin(self._policy)
        successor: Metering = self.__dict__.setdefault("_successor", made)
        return successor

    def events(
        self,
        environ: Environ,
        stated: RunTimeMeters | None,
        status: str | None,
        outcome: str,
    ) -> Sequence[bytes]:
        """Encode the events of a request that has ended; none if it is not billed.

        *status* is the status line that the client got, None if there was none.
        Never raises an Exception: an error of ours costs the seller this event and
        is logged and counted, but the customer's response stands.
        """
        self.counts.settled += 1
        if not self.queue.started:
            self.queue.start()
        try:
            if status is None or status[:3] not in self._codes:
                return self._not_metered("status" if status else "no_status")
            if not self._policy.meter_options and is_options(environ):
                return self._not_metered("options")
            if outcome is COMPLETED and stated is None and self._static:
                return self._static_events(environ, self._static)
            return self._stated_events(environ, stated, outcome)
        except Exception:
            logger.exception(
                "%s: usage of a request is lost by our own fault", "events"
            )
            return self._not_metered("error")
        finally:
            if self._counts_down and RESERVED in environ:
                self.gate.settle(environ, (), None)  # nothing is billed

    def must_ask(self, environ: Environ) -> bool:
        """Say whether a request may begin only after a decision."""
        if not self.gate.required:
            return False
        return self._policy.meter_options or not is_options(environ)

    def count_denial(self) -> None:
        """Count a request that was refused: it has ended, and is never billed."""
        self.counts.settled += 1
        self._not_metered("denied")

    def put(self, events: Sequence[bytes]) -> None:
        """Hand the events to delivery. May be repeated with the same events."""
        for event in events:
            self._put(event)

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
        dropped = dict(counts.dropped)
        made = sum(dropped.get(reason, 0) for reason in _AFTER_ENCODING)
        return Stats(
            settled=counts.settled,
            events=counts.delivered + waiting + counts.dead_lettered + made,
            delivered=counts.delivered,
            waiting=waiting,
            not_metered=dict(counts.not_metered),
            dropped=dropped,
            dead_lettered=counts.dead_lettered,
            ambiguous=counts.ambiguous,
            retries=counts.retries,
            unspooled=counts.unspooled,
            allowed=dict(counts.allowed),
            denied=dict(counts.denied),
            let_through=dict(counts.let_through),
        )

    def _static_events(self, environ: Environ, static: StaticEvents) -> Sequence[bytes]:
        if not self._static_meters:
            return self._not_metered("no_meters")
        subject = self._find_subject(environ)
        if subject is None:
            return self._no_subject()
        return static.encode(self._request_id(environ), subject)

    def _stated_events(
        self, environ: Environ, stated: RunTimeMeters | None, outcome: str
    ) -> Sequence[bytes]:
        billed = self._part_billed(outcome)
        if billed == "none":
            return self._not_metered(outcome)
        if stated is not None and stated.denied:
            return self._not_metered("denied")
        meters: Sequence[Meter]
        if stated is None:
            meters = self._static_meters if billed == "all" else ()
        else:
            usage = stated.merged(self._policy.static, with_flat=billed == "all")
            meters = self._policy.as_meters(usage)
        if not meters:
            return self._not_metered(outcome if billed != "all" else "no_meters")
        subject = self._find_subject(environ)
        if subject is None and not all(meter.subject for meter in meters):
            all_meters, meters = meters, [meter for meter in meters if meter.subject]
            if not meters:
                return self._no_subject()
            self.counts.dropped["no_subject"] += len(all_meters) - len(meters)
        if self._counts_down:
            self.gate.settle(environ, meters, subject)
        return encode_events(
            meters,
            request_id=self._request_id(environ),
            subject=subject,
            source=self._policy.event_source,
        )

    def _part_billed(self, outcome: str) -> str:
        if outcome is COMPLETED:
            return "all"
        policy = self._policy
        return policy.on_failure if outcome is FAILED else policy.on_abort

    def _request_id(self, environ: Environ) -> str:
        if self._id_key:
            given = str(environ.get(self._id_key, ""))
            if given.isascii() and given.isprintable() and 0 < len(given) <= 128:
                # A quote or backslash would need escaping where ids are pasted in.
                return given.replace("\\", "_").replace('"', "_")
        return self._new_id()

    def _not_metered(self, reason: str) -> Sequence[bytes]:
        self.counts.not_metered[reason] += 1
        return ()

    def _no_subject(self) -> Sequence[bytes]:
        logger.warning(
            "%s: a request without subject is not billed (see subject, subject_path, "
            "set_subject and on_missing_subject)",
            "no_subject",
        )
        return self._not_metered("no_subject")

    def _log_instead(self, event: bytes) -> None:
        self.counts.dropped["dry_run"] += 1
        logger.info("dry run, would send %s", event.decode())


def _queue(
    policy: Policy, new_client: Callable[[], OpenMeterClient], counts: Counts
) -> DeliveryQueue | SpoolQueue:
    if policy.spool_dir is None or policy.dry_run:
        return DeliveryQueue(policy, new_client(), counts)
    return SpoolQueue(policy, new_client, counts)

"""From the end of a response to its events: what one policy bills, and what not."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, TypeAlias

from openmeter_wsgi import log
from openmeter_wsgi.bodies.reader import Unknown
from openmeter_wsgi.entitlements.gate import Gate
from openmeter_wsgi.environ import RESERVED, is_options
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.events import StaticEvents, encode_events
from openmeter_wsgi.identity import Identity
from openmeter_wsgi.measured_meters import evaluate
from openmeter_wsgi.measures import Measure, computed
from openmeter_wsgi.outcome import COMPLETED, FAILED
from openmeter_wsgi.subject import subject_finder
from openmeter_wsgi.unbilled import Unbilled
from openmeter_wsgi.usage import Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from openmeter_wsgi.entitlements.checking import Entitlements
    from openmeter_wsgi.events import RequestIds
    from openmeter_wsgi.exchange import Exchange
    from openmeter_wsgi.meters import RunTimeMeters
    from openmeter_wsgi.policy import Policy
    from openmeter_wsgi.stats import Counts
    from openmeter_wsgi.usage import Meter

logger = log.get_logger(__name__)

Environ: TypeAlias = dict[str, Any]
#: Routes of which a warning was given are remembered up to this number.
_MAX_WARNED = 1_000
_MAX_STATUS_LINES = 1_000
_LOST = "%s: usage of a request is lost by our own fault"


class Billing:
    """One policy in one process: who may, and what each request is billed.

    Any thread.
    """

    def __init__(
        self,
        policy: Policy,
        name: str,
        *,
        counts: Counts,
        entitlements: Entitlements,
        ids: RequestIds,
        vary: Callable[[Policy, str], Billing],
    ) -> None:
        self.policy = policy
        #: The rule of its route, or what else it is called in counts and log lines.
        self.name = name
        #: Requests that became no event.
        self.unbilled = Unbilled(name, policy.audit)
        self._counts = counts
        self._codes = policy.meter_on_status_codes.codes  # type: ignore[union-attr]
        #: Whether responses of a status line are billed, for those that were seen.
        self._is_billed: dict[str, bool] = {}
        #: Whether requests may begin only after a decision, but for OPTIONS.
        self.asks = bool(policy.required_entitlements)
        self._vary = vary
        #: What governs views that say more of themselves than their route does.
        self._variants: dict[int, tuple[Mapping[str, Any], Billing]] = {}
        #: From an environ to who is metered under this policy.
        self.find_subject = subject_finder(policy)
        self.gate = Gate(
            policy, entitlements, find_subject=self.find_subject, counts=counts
        )
        self._identity = Identity(policy, ids)
        self._counts_down = bool(policy.entitlement_meters)
        self._when = _predicate(policy.meter_when)
        #: The readers of bodies that a response needs, None where not even its
        #: length has to be known.
        self.bodies = _bodies(policy, self._when)
        self._static_meters = policy.static_meters
        self._meter_options = policy.meter_options
        self._static = self._short_way(ids)
        self._warned: set[str | None] = set()

    def _short_way(self, ids: RequestIds) -> StaticEvents | None:
        """Return what encodes the events of most requests, if they are that simple."""
        policy = self.policy
        simple = (
            self.bodies is None
            and not self._counts_down
            and self._identity.is_ours
            and all(meter.plain for meter in self._static_meters)
        )
        if not simple:
            return None
        return StaticEvents(self._static_meters, policy.event_source, ids)

    def variant(self, name: str, options: Mapping[str, Any]) -> Billing:
        """Return what bills under the same policy with other *options*.

        Never raises an Exception: where they contradict the policy, or its key cannot
        be read now, it is the policy without them.
        """
        found = self._variants.get(id(options))
        if found is None:
            try:
                policy = dataclasses.replace(self.policy, routes=None, **options)
            except ConfigError as error:
                logger.error(
                    "%s: %s; its requests are billed as those of its route", name, error
                )
                return self
            # Two threads may come at once: one of them wins, for counts to be whole.
            # The options are kept, or others might be taken for them by their id.
            found = self._variants.setdefault(
                id(options), (options, self._vary(policy, name))
            )
        return found[1]

    def bills(self, status: str) -> bool:
        """Say whether responses of this status line are billed."""
        return status[:3] in self._codes

    def must_ask(self, environ: Environ) -> bool:
        """Say whether a request may begin only after a decision."""
        return self.asks and (self._meter_options or not is_options(environ))

    def refuse(self, environ: Environ) -> None:
        """Count a request that was denied: it has ended, and is never billed."""
        self._counts.settled += 1
        self.unbilled.note("denied", environ, None)

    def events(
        self,
        environ: Environ,
        stated: RunTimeMeters | None,
        status: str | None,
        outcome: str,
        exchange: Exchange | None = None,
    ) -> Sequence[bytes]:
        """Encode the events of a request that has ended; none if it is not billed.

        *status* is the status line that the client got, None if there was none.
        Never raises an Exception: an error of ours costs the seller this event and
        is logged and counted, but the customer's response stands.
        """
        self._counts.settled += 1
        try:
            if stated is not None and stated.denied:
                return self.unbilled.note("denied", environ, status)
            if reason := self._status_reason(environ, status):
                return self.unbilled.note(reason, environ, status)
            made = self._stated_events(environ, stated, outcome, exchange)
            if isinstance(made, str):
                return self.unbilled.note(made, environ, status)
        except Exception:
            logger.exception(_LOST, "events")
            return self.unbilled.note("error", environ, status)
        else:
            self._counts.metered += 1
            return made
        finally:
            if self._counts_down and RESERVED in environ:
                self.gate.settle(environ, (), None)  # nothing is billed

    def usual_events(
        self, environ: Environ, status: str | None
    ) -> Sequence[bytes] | None:
        """Do as `events` for most requests; None for those that are not so simple.

        The response has completed, the handler has stated nothing, its status was
        seen before, and the policy's meters are known beforehand.
        """
        static = self._static
        if static is None:
            return None
        try:
            if environ["REQUEST_METHOD"] == "OPTIONS":
                return None
            if self._is_billed[status]:  # type: ignore[index]
                if self._static_meters:
                    subject = self.find_subject(environ)
                    if subject is None:
                        return None
                    events = static.encode(subject)
                    counts = self._counts
                    counts.settled += 1
                    counts.metered += 1
                    return events
                reason = "no_meters"
            else:
                reason = "status"
        except Exception:  # noqa: BLE001 - `events` finds out what it is, and says so
            return None
        self._counts.settled += 1
        return self.unbilled.note(reason, environ, status)

    def _status_reason(self, environ: Environ, status: str | None) -> str | None:
        """Say why no response of that status to that request is billed."""
        if not status:
            return "no_status"
        if status not in self._is_billed:
            self._learn(status)
        if not self._is_billed[status]:
            return "status"
        if is_options(environ) and not self._meter_options:
            return "options"
        return None

    def _learn(self, status: str) -> None:
        """Note whether a status line is billed: cutting it costs more than looking."""
        if len(self._is_billed) >= _MAX_STATUS_LINES:
            self._is_billed = {}  # an application that invents reasons
        self._is_billed[status] = self.bills(status)

    def _stated_events(
        self,
        environ: Environ,
        stated: RunTimeMeters | None,
        outcome: str,
        exchange: Exchange | None,
    ) -> Sequence[bytes] | str:
        """Return the events, or the reason why there are none."""
        if reason := self._unbilled(stated, outcome, exchange):
            return reason
        meters = self._meters(stated, outcome, exchange)
        if isinstance(meters, str):
            return meters
        subject = self.find_subject(environ)
        if subject is None and not all(meter.subject for meter in meters):
            all_meters, meters = meters, [meter for meter in meters if meter.subject]
            if not meters:
                return "no_subject"
            without = len(all_meters) - len(meters)
            self._counts.dropped["no_subject"] += without
        if self._counts_down:
            self.gate.settle(environ, meters, subject)
        return encode_events(
            meters,
            request_id=self._identity.of(environ, stated, subject, outcome),
            subject=subject,
            source=self.policy.event_source,
        )

    def _unbilled(
        self, stated: RunTimeMeters | None, outcome: str, exchange: Exchange | None
    ) -> str | None:
        """Return why nothing at all is billed, None if something may be."""
        if self._part_billed(outcome) == "none":
            return outcome
        if stated is not None and stated.governed_by is None:
            return "no_meter"
        if self._when is None or exchange is None:
            return None
        wanted = self._when.value(exchange)
        # Where it cannot be said, the customer is not charged on suspicion.
        is_unknown = isinstance(wanted, Unknown)
        return "meter_when" if is_unknown or not wanted else None

    def _part_billed(self, outcome: str) -> str:
        if outcome is COMPLETED:
            return "all"
        policy = self.policy
        return policy.on_failure if outcome is FAILED else policy.on_abort

    def _meters(
        self, stated: RunTimeMeters | None, outcome: str, exchange: Exchange | None
    ) -> Sequence[Meter] | str:
        """Return the meters of the policy and of the handler together."""
        policy = self.policy
        with_flat = self._part_billed(outcome) == "all"
        usage = policy.static if with_flat else Usage({}, ())
        missing: Sequence[tuple[str, Measure, str]] = ()
        if policy.measured and exchange is not None:
            found = evaluate(
                [m for m in policy.measured if with_flat or m.is_quantity], exchange
            )
            usage = Usage(
                {**usage.numbers, **found.usage.numbers},
                (*usage.documents, *found.usage.documents),
            )
            missing = found.missing
            for each in found.missing:
                self._warn_of_missing(exchange, *each)
        if stated is not None:
            usage = stated.merged(usage, with_flat=with_flat)
        if meters := policy.as_meters(usage):
            for _, _, reason in missing:
                self._counts.dropped[f"no_value_{reason}"] += 1
            return meters
        if missing:
            return f"no_value_{missing[0][2]}"
        return "no_meters" if with_flat else outcome

    def _warn_of_missing(
        self, exchange: Exchange, meter_type: str, measure: Measure, reason: str
    ) -> None:
        where = f"{exchange.method} {exchange.route or self.name}"
        if where in self._warned or len(self._warned) >= _MAX_WARNED:
            return
        self._warned.add(where)
        logger.warning(
            "%s: %r has no value (%s), so no %r is billed; said once, then counted as "
            "no_value_%s",
            where, measure, reason, meter_type, reason,
        )  # fmt: skip


def _predicate(when: Any) -> Measure | None:
    if when is None or isinstance(when, Measure):
        return when
    return computed(when)


def _bodies(policy: Policy, when: Measure | None) -> frozenset[str] | None:
    measures = [measure for meter in policy.measured for measure in meter.measures]
    if when is not None:
        measures.append(when)
    if not measures:
        return None
    return frozenset().union(*(measure.bodies for measure in measures))

"""From the end of a response to its events: what one policy bills, and what not."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from openmeter_wsgi import log
from openmeter_wsgi.bodies.reader import Unknown
from openmeter_wsgi.entitlements.gate import Gate
from openmeter_wsgi.environ import RESERVED, is_options
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.events import are_small, encode_events, size_problem
from openmeter_wsgi.identity import Identity
from openmeter_wsgi.measured_meters import evaluate
from openmeter_wsgi.measures import Measure, computed
from openmeter_wsgi.outcome import COMPLETED, FAILED
from openmeter_wsgi.subject import anonymous_subject, subject_finder
from openmeter_wsgi.unbilled import Unbilled
from openmeter_wsgi.usage import Usage
from openmeter_wsgi.usual_way import UsualWays, usual_make

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from openmeter_wsgi.entitlements.checking import Entitlements
    from openmeter_wsgi.events import RequestIds
    from openmeter_wsgi.exchange import Exchange
    from openmeter_wsgi.forks import Mark
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


class Delivery(Protocol):
    """What takes events, and what is begun with the first request."""

    started: bool

    def start(self) -> object:
        """Do what is done with the first request."""


class Process(Protocol):
    """What a billing shares with the others of its process."""

    is_own: Mark
    counts: Counts
    ids: RequestIds
    entitlements: Entitlements
    #: Hand one event to delivery.
    put: Callable[[bytes], object]

    @property
    def queue(self) -> Delivery:
        """Return what delivers."""

    def billing_of_view(self, policy: Policy, name: str) -> Billing:
        """Make what bills a view that says more of itself than its route does."""


class Billing:
    """One policy in one process: who may, and what each request is billed.

    Any thread.
    """

    def __init__(self, policy: Policy, name: str, process: Process) -> None:
        self.policy = policy
        #: The rule of its route, or what else it is called in counts and log lines.
        self.name = name
        #: Requests that became no event.
        self.unbilled = Unbilled(name, policy.audit)
        self.process = process
        self._counts = process.counts
        self._codes = policy.meter_on_status_codes.codes  # type: ignore[union-attr]
        #: Whether responses of a status line are billed, for those that were seen.
        self._is_billed: dict[str, bool] = {}
        #: Whether requests may begin only after a decision, but for OPTIONS.
        self.asks = bool(policy.required_entitlements)
        #: Whether the response tells what that decision said of the quota.
        self.tells_quota = self.asks and policy.usage_headers
        #: What governs views that say more of themselves than their route does.
        self._variants: dict[int, tuple[Mapping[str, Any], Billing]] = {}
        #: From an environ to who is metered under this policy.
        self.find_subject = subject_finder(policy)
        self.gate = Gate(
            policy,
            process.entitlements,
            find_subject=self.find_subject,
            counts=self._counts,
        )
        #: Whether a request that has to ask may begin at once.
        self.passes = self.gate.passes
        self._identity = Identity(policy, process.ids)
        self._counts_down = bool(policy.entitlement_meters)
        self._when = _predicate(policy.meter_when)
        self._has_meters = bool(policy.static_meters or policy.measured)
        #: The readers of bodies that a response needs, None where not even its
        #: length has to be known.
        self.bodies = _bodies(policy, self._when)
        self._meter_options = policy.meter_options
        self._is_usual = (
            self.bodies is None
            and not self._counts_down
            and self._identity.is_ours
            and all(meter.plain for meter in policy.static_meters)
            and are_small(policy.static_meters, policy.event_source)
        )
        make = usual_make(
            policy.static_meters,
            policy.event_source,
            ids=process.ids,
            is_own=process.is_own,
            find_subject=self.find_subject,
            anonymous=anonymous_subject(policy),
        )
        self.usual = UsualWays(policy, make, process.put)
        #: How most responses end, by their status line.
        self.ways = self.usual.by_status
        self._warned: set[str | None] = set()

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
                id(options), (options, self.process.billing_of_view(policy, name))
            )
        return found[1]

    def count_late(self, helper: str) -> None:
        """Count usage stated after its request was settled."""
        self._counts.dropped["late"] += 1
        logger.error("%s: called after the response had ended; not billed", helper)

    def not_metered(self) -> Counter[str]:
        """Return how many requests became no event, by reason."""
        return self.usual.unbilled + Counter(dict(self.unbilled.counts))

    def bills(self, status: str) -> bool:
        """Say whether responses of this status line are billed."""
        return status[:3] in self._codes

    def must_ask(self, environ: Environ) -> bool:
        """Say whether a request may begin only after a decision."""
        return self.asks and (self._meter_options or not is_options(environ))

    def refuse(self, environ: Environ) -> None:
        """Count a request that was denied: it has ended, and is never billed."""
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
        try:
            if stated is not None and stated.denied:
                return self.unbilled.note("denied", environ, status)
            if reason := self._status_reason(environ, stated, status):
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

    def _status_reason(
        self, environ: Environ, stated: RunTimeMeters | None, status: str | None
    ) -> str | None:
        """Say why no response of that status to that request is billed."""
        if not status:
            return "no_status"
        if status not in self._is_billed:
            self._learn(status)
        is_billed = self._is_billed[status]
        # What is begun with the first request may have to be tried again.
        if status not in self.ways and self._is_usual and self.process.queue.started:
            self.usual.learn(status, is_billed=is_billed)
        if not is_billed:
            return "status"
        if is_options(environ) and not self._meter_options:
            return "options" if stated or self._has_meters else "no_meters"
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
        events = encode_events(
            meters,
            request_id=self._identity.of(environ, stated, subject, outcome),
            subject=subject,
            source=self.policy.event_source,
        )
        return self._storable(events) or "message_too_large"

    def _storable(self, events: list[bytes]) -> list[bytes]:
        """Return the events that OpenMeter can store; count and log the others."""
        problems = [problem for each in events if (problem := size_problem(each))]
        if not problems:
            return events
        for problem in problems:
            logger.error("%s: an event is not sent: %s", self.name, problem)
        kept = [each for each in events if size_problem(each) is None]
        if kept:
            # Else the request is counted as one without events.
            self._counts.dropped["message_too_large"] += len(problems)
        return kept

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

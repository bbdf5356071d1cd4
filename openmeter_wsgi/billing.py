"""Decides whether a finished request is billed, and builds its events.

`Billing.events` handles every response. `FastPath.events` handles the common case, a
completed response to a request without run-time usage, at half the cost.
"""

from __future__ import annotations

import dataclasses
from logging import DEBUG
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from openmeter_wsgi import log
from openmeter_wsgi.audit import NotMetered
from openmeter_wsgi.audit import logger as audit_logger
from openmeter_wsgi.bodies.base import Unknown
from openmeter_wsgi.entitlements.gate import Gate
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.events import (
    StatedUsage,
    are_small,
    derived_id,
    encode_events,
    numbered,
    quoted,
    size_problem,
    static_templates,
)
from openmeter_wsgi.exchange import route_of
from openmeter_wsgi.measures import Measure, computed, evaluate
from openmeter_wsgi.policy import in_place_of
from openmeter_wsgi.request import (
    COMPLETED,
    FAILED,
    OPTIONS,
    is_options,
    method_of,
)
from openmeter_wsgi.routes import EVERY_OTHER
from openmeter_wsgi.subject import SubjectFinder
from openmeter_wsgi.values import SHORT_SUBJECT, clock, timestamp

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from openmeter_wsgi.events import Meter, RequestIds
    from openmeter_wsgi.exchange import Exchange
    from openmeter_wsgi.policy import Policy
    from openmeter_wsgi.process import Process
    from openmeter_wsgi.request import RequestRecord, RunTimeMeters

logger: Final = log.get_logger(__name__)

Environ: TypeAlias = dict[str, Any]
#: At most so many routes are remembered as warned of.
_MAX_WARNED = 1_000
#: The helpers by which a handler states usage.
_STATING = {"set_meters", "add_meters"}
#: At most so many status lines are remembered: an application may invent reasons.
_MAX_STATUS_LINES = 1_000
_MAX_ID_LENGTH = 128
#: The log line of each remark about a body.
_REMARKS = {
    "ambiguous_usage": (
        "%s: the body holds several reports of a model's usage; the largest is billed, "
        "and no figure below another report's; counted as %s. llm_usage(provider=...) "
        "reads one shape alone"
    ),
    "several_calls": (
        "%s: the body holds several calls of a model; the last one is billed; counted "
        "as %s"
    ),
}
_LOST = "%s: the usage of a request is lost by an error in openmeter_wsgi"


class Billing:
    """Bills the requests of one policy in one process. Any thread."""

    def __init__(self, policy: Policy, name: str, process: Process) -> None:
        self.policy = policy
        #: Its name in counts and log lines: the rule of the route, or the view.
        self.name = name
        self.process = process
        #: The counts of requests that became no event.
        self.not_metered: NotMetered = NotMetered(name, policy.audit)
        self._counts = process.counts
        self._codes = policy.meter_on_status_codes.codes  # type: ignore[union-attr]
        #: True if requests, except OPTIONS, need a decision on entitlements first.
        self.asks: bool = bool(policy.required_entitlements)
        #: True if responses get RateLimit headers from that decision.
        self.tells_quota: bool = self.asks and policy.usage_headers
        #: The billings of views with options of their own, by the id of the options.
        self._variants: dict[int, tuple[Mapping[str, Any], Billing]] = {}
        self.subjects: SubjectFinder = SubjectFinder(policy)
        self.gate: Gate = Gate(
            policy,
            process.entitlements,
            subjects=self.subjects,
            counts=self._counts,
        )
        #: The generator of its request ids.
        self.identity: Identity = Identity(policy, process.ids)
        self._counts_down = bool(policy.entitlement_meters)
        self._when = _predicate(policy.meter_when)
        self._has_meters = bool(policy.static_meters or policy.measured)
        #: The readers of bodies that a response needs; None if not even its length is
        #: needed.
        self.bodies: frozenset[str] | None = _bodies(policy, self._when)
        self._meter_options = policy.meter_options
        #: The policy that holds the routes, or the rule `*`: it bills the requests that
        #: no other rule matches.
        self._bills_unmatched = policy.routes is not None or name == EVERY_OTHER
        #: None if this policy has no common case.
        self.fast_path: FastPath | None = (
            FastPath(self) if self._is_known_beforehand else None
        )
        self._warned: set[tuple[str, str]] = set()

    @property
    def _is_known_beforehand(self) -> bool:
        """True if the status and the subject alone decide the events of a response."""
        return (
            self.bodies is None
            and not self._bills_unmatched
            and not self._counts_down
            and self.identity.is_ours
            and all(meter.plain for meter in self.policy.static_meters)
            and are_small(self.policy.static_meters, self.policy.event_source)
        )

    def variant(self, name: str, options: Mapping[str, Any]) -> Billing:
        """Return the billing of the same policy with other *options*.

        Never raises an Exception: if they contradict the policy, or its key cannot be
        read now, it returns this billing.
        """
        found = self._variants.get(id(options))
        if found is None:
            try:
                own = in_place_of(options)
                policy = dataclasses.replace(self.policy, routes=None, **own)
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
        """Log a *helper* that was called after its request was settled.

        Usage that it stated is counted as lost.
        """
        if helper in _STATING:
            self._counts.dropped["late"] += 1
        logger.error(
            "%s: called after the response had ended; it has no effect", helper
        )

    def bills(self, status: str) -> bool:
        """Return True if responses with this status line are billed."""
        return status[:3] in self._codes

    def must_ask(self, environ: Environ) -> bool:
        """Return True if the request needs a decision on entitlements first."""
        return self.asks and (self._meter_options or not is_options(environ))

    def refuse(self, environ: Environ) -> None:
        """Count a denied request, which is never billed."""
        self.not_metered.note("denied", environ, None)

    def hand_over(self, environ: Environ, request: RequestRecord) -> None:
        """Count a request whose socket the application took over; it is not billed."""
        if not self.process.is_begun:
            self.process.begin(environ)
        self.not_metered.note("handed_over", environ, request.status)
        if request.reserved:
            self.gate.settle(request, (), None)
        request.end()

    def events(
        self,
        environ: Environ,
        request: RequestRecord,
        outcome: str,
        exchange: Exchange | None = None,
    ) -> Sequence[bytes]:
        """Encode the events of a finished request; none if it is not billed.

        Never raises an Exception: an error of ours loses this event and is logged and
        counted; the response is not changed.
        """
        stated, status = request.usage, request.status
        try:
            if stated is not None and stated.denied:
                return self.not_metered.note("denied", environ, status)
            if self._bills_unmatched and (other := self._of_route(environ)) is not None:
                return other.events(environ, request, outcome, exchange)
            if reason := self._status_reason(environ, stated, status):
                return self.not_metered.note(reason, environ, status)
            made = self._stated_events(environ, request, outcome, exchange)
            if isinstance(made, str):
                return self.not_metered.note(made, environ, status)
        except Exception:
            logger.exception(_LOST, "events")
            return self.not_metered.note("error", environ, status)
        else:
            self._counts.metered += 1
            return made
        finally:
            if request.reserved:
                # `_stated_events` did not settle it, so nothing is billed.
                self.gate.settle(request, (), None)

    def _of_route(self, environ: Environ) -> Billing | None:
        """Return the billing of the route by which the framework served a request.

        None if that route is unknown, or not stricter. No rule matched the path because
        the framework reads it in another way, such as ``-5`` as an integer.
        """
        routes, template = self.process.routes, route_of(environ)
        if routes is None or template is None:
            return None
        other = routes.by_template(template, environ, self)
        if other is not None:
            logger.warning(
                "route %s: a path that no rule matches was served by it; billed by the "
                "rule, and not asked for entitlements: write the rule in a form that "
                "matches all that the framework serves, or decorate the view",
                template,
            )
        return other

    def _status_reason(
        self, environ: Environ, stated: RunTimeMeters | None, status: str | None
    ) -> str | None:
        """Return the reason for not billing this status, None if it is billed."""
        if not status:
            return "no_status"
        if not self.bills(status):
            return "status"
        if is_options(environ) and not self._meter_options:
            return "options" if stated or self._has_meters else "no_usage"
        return None

    def _stated_events(
        self,
        environ: Environ,
        request: RequestRecord,
        outcome: str,
        exchange: Exchange | None,
    ) -> Sequence[bytes] | str:
        """Return the events, or the reason for having none."""
        stated = request.usage
        if reason := self._reason_for_nothing(stated, outcome, exchange):
            return reason
        meters = self._meters(stated, outcome, exchange)
        if isinstance(meters, str):
            return meters
        subject = self.subjects.find(environ)
        if subject is None and not all(meter.subject for meter in meters):
            all_meters, meters = meters, [meter for meter in meters if meter.subject]
            if not meters:
                self._say_why_nobody(environ)
                return "no_subject"
            without = [meter.type for meter in all_meters if not meter.subject]
            self._counts.dropped["no_subject"] += len(without)
            logger.warning(
                "%s: meters without a subject are not billed: %s; other meters of the "
                "request have one",
                "no_subject", ", ".join(map(repr, without)),
            )  # fmt: skip
        if stated is not None and stated.idempotency_key and outcome is COMPLETED:
            meters = with_own_ids(environ, meters, stated.idempotency_key)
        events = encode_events(
            meters,
            request_id=self.identity.of(environ, stated, subject, outcome),
            subject=subject,
            source=self.policy.event_source,
        )
        kept = self._storable(events)
        if self._counts_down:
            pairs = zip(meters, events, strict=True)
            self.gate.settle(request, [m for m, e in pairs if e in kept], subject)
        return kept or "message_too_large"

    def _say_why_nobody(self, environ: Environ) -> None:
        method = method_of(environ)
        path = f"{environ.get('SCRIPT_NAME', '')}{environ.get('PATH_INFO', '')}"
        if (missing := self.subjects.missing_path(environ)) is None:
            logger.warning(
                "%s: a request without subject is not billed: %s %s (see subject, "
                "subject_path, set_subject and on_missing_subject)",
                "no_subject", method, path,
            )  # fmt: skip
            return
        logger.error(
            "subject at %r: %s has no %r; %d requests without subject are not billed; "
            "the last one: %s %s",
            missing.path, missing.owner, missing.name,
            self.not_metered.counts["no_subject"] + 1, method, path,
        )  # fmt: skip

    def _storable(self, events: list[bytes]) -> list[bytes]:
        """Return the events small enough for OpenMeter; count and log the others."""
        problems = [problem for each in events if (problem := size_problem(each))]
        if not problems:
            return events
        for problem in problems:
            logger.error("%s: an event is not sent: %s", self.name, problem)
        kept = [each for each in events if size_problem(each) is None]
        if kept:
            # Otherwise the whole request is counted, as one without events.
            self._counts.dropped["message_too_large"] += len(problems)
        return kept

    def _reason_for_nothing(
        self, stated: RunTimeMeters | None, outcome: str, exchange: Exchange | None
    ) -> str | None:
        """Return the reason for billing nothing, None if something may be billed."""
        if self._part_billed(outcome) == "none":
            return outcome
        if stated is not None and stated.is_unmetered:
            return "no_meter"
        if stated is not None and None in stated.deferred:
            return "deferred"
        if self._when is None or exchange is None:
            return None
        wanted = self._when.value(exchange)
        # If the value is unknown, the customer is not charged.
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
        usage = policy.static if with_flat else StatedUsage({}, ())
        missing: Sequence[tuple[str, Measure, str]] = ()
        if policy.measured and exchange is not None:
            found = evaluate(
                [m for m in policy.measured if with_flat or m.is_quantity], exchange
            )
            usage = StatedUsage(
                {**usage.numbers, **found.usage.numbers},
                (*usage.documents, *found.usage.documents),
            )
            missing = found.missing
            for each in found.missing:
                self._warn_of_missing(exchange, *each)
            self._tell_remarks(exchange)
        if stated is not None:
            usage = stated.merged(usage, with_flat=with_flat)
            if stated.deferred and not usage.types:
                return "deferred"
        if meters := policy.as_meters(usage):
            for _, _, reason in missing:
                self._counts.dropped[f"no_value_{reason}"] += 1
            return meters
        if missing:
            return f"no_value_{missing[0][2]}"
        return "no_usage" if with_flat else outcome

    def _tell_remarks(self, exchange: Exchange) -> None:
        for remark in sorted(exchange.remarks):
            self._counts.remarks[remark] += 1
            logger.warning(_REMARKS[remark], self._where(exchange), remark)

    def _where(self, exchange: Exchange) -> str:
        return f"{exchange.method} {exchange.route or self.name}"

    def _warn_of_missing(
        self, exchange: Exchange, meter_type: str, measure: Measure, reason: str
    ) -> None:
        where = self._where(exchange)
        warning = (where, meter_type)
        if warning in self._warned or len(self._warned) >= _MAX_WARNED:
            return
        self._warned.add(warning)
        logger.warning(
            "%s: %r has no value (%s), so it is not billed; logged once, then counted "
            "as no_value_%s",
            f"{where}, meter {meter_type!r}", measure, reason, reason,
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


class FastPath:
    """Bills completed responses without run-time usage, from prepared templates.

    Only for policies without measures and quotas. `Billing.events` makes the same
    events of such a response, at twice the cost. Any thread.
    """

    def __init__(self, billing: Billing) -> None:
        self._billing = billing
        self._not_metered = billing.not_metered
        self._reason_counts = billing.not_metered.counts
        self._is_audited = billing.policy.audit is not None
        self._is_logged = audit_logger.isEnabledFor
        self._counts = billing.process.counts
        self._ids = billing.process.ids
        self._subjects = billing.subjects
        meters = billing.policy.static_meters
        self._templates = static_templates(meters, billing.policy.event_source)
        #: The only template; None if there are several.
        self._template = self._templates[0] if len(self._templates) == 1 else None
        #: The subject of requests without a caller; empty if the policy reads it from
        #: the request.
        self._anonymous = billing.subjects.anonymous or ""
        #: By status line: the reason for not billing it, None if it is billed.
        self._reasons: dict[str | None, str | None] = {}

    def events(  # noqa: C901 - in one piece: a call would cost each request
        self, environ: Environ, request: RequestRecord
    ) -> Sequence[bytes] | None:
        """Return the events of a response; an empty sequence if it is not billed.

        None leaves the response to `Billing.events`, because it is an unusual one.
        """
        try:
            if request.usage is not None or environ["REQUEST_METHOD"] in OPTIONS:
                return None
            status = request.status
            try:
                reason = self._reasons[status]
            except KeyError:
                reason = self._learn(status)
            subject = self._anonymous
            if reason is None and (
                not subject or request.caller or "REMOTE_USER" in environ
            ):
                subject = self._subjects.find(environ) or ""
                if len(subject) > SHORT_SUBJECT:
                    return None
        except Exception:  # noqa: BLE001 - `Billing.events` meets it again, and logs it
            return None
        if reason is not None:
            self._reason_counts[reason] += 1
            if self._is_audited or self._is_logged(DEBUG):
                self._not_metered.tell(reason, environ, status)
            return ()
        if not subject:
            return None
        request_id = self._ids.new()
        if self._template is not None:
            head, middle = self._template
            # `timestamp()`, inlined.
            time = clock.text if clock.monotonic() < clock.until else clock.renew()
            text = f'{head}{request_id}{middle}{time}","subject":{quoted(subject)}}}'
            events: Sequence[bytes] = (text.encode(),)
        else:
            tail = f'{timestamp()}","subject":{quoted(subject)}}}'
            events = [
                f"{head}{request_id}{middle}{tail}".encode()
                for head, middle in self._templates
            ]
        self._counts.metered += 1
        return events

    def _learn(self, status: str | None) -> str | None:
        """Remember and return the reason for not billing a status line."""
        if len(self._reasons) >= _MAX_STATUS_LINES:
            self._reasons = {}
        if not status:
            reason: str | None = "no_status"
        elif not self._billing.bills(status):
            reason = "status"
        else:
            reason = None if self._templates else "no_usage"
        self._reasons[status] = reason
        return reason


class Identity:
    """Makes the request ids of one policy. One process, any thread."""

    def __init__(self, policy: Policy, ids: RequestIds) -> None:
        self._ids = ids
        header = policy.trusted_request_id_header
        self._key = header and "HTTP_" + header.upper().replace("-", "_")

    @property
    def is_ours(self) -> bool:
        """True if every id is generated here."""
        return not self._key

    def of(
        self,
        environ: Mapping[str, Any],
        stated: RunTimeMeters | None,
        subject: str | None,
        outcome: str,
    ) -> str:
        """Return the id of a finished request."""
        if stated is not None and stated.idempotency_key and outcome is COMPLETED:
            return _derived_id(environ, subject, stated.idempotency_key)
        if self._key:
            given = str(environ.get(self._key, ""))
            if (
                given.isascii()
                and given.isprintable()
                and 0 < len(given) <= _MAX_ID_LENGTH
            ):
                return given
        return self._ids.new()


def with_own_ids(
    environ: Mapping[str, Any], meters: Sequence[Meter], key: str
) -> list[Meter]:
    """Return *meters*, with an id for each that has a subject of its own.

    Two customers may use the same idempotency key, so the id includes the subject.
    """
    return [
        msgspec.structs.replace(
            meter, id=f"{_derived_id(environ, meter.subject, key)}:{suffix}"
        )
        if meter.subject and not meter.id
        else meter
        for meter, suffix in numbered(meters)
    ]


def _derived_id(environ: Mapping[str, Any], subject: str | None, key: str) -> str:
    """Return the id that all completed attempts of one operation share."""
    path = f"{environ.get('SCRIPT_NAME', '')}{environ.get('PATH_INFO', '')}"
    return derived_id(subject or "", method_of(environ), path, key)

"""Decides whether a finished request is billed, and encodes its events.

There is one `Billing` per policy: of the middleware, of a route, of a view. The
response calls it on the thread of the request. `Billing.events` handles every response.
`FastPath.events` handles the common case at half the cost: a completed response to a
request without run-time usage, if the policy's events depend only on the status and the
subject (`_has_fast_path` lists the conditions). Both return the same events.

A request that becomes no event is counted with its reason (see `audit`).
"""

from __future__ import annotations

import dataclasses
from logging import DEBUG
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from openmeter_wsgi import log
from openmeter_wsgi.bodies.base import Unknown
from openmeter_wsgi.entitlements.gate import Gate
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.events import (
    CheckedUsage,
    are_small,
    derived_id,
    encode_events,
    quoted,
    size_problem,
    static_templates,
    with_id_suffixes,
)
from openmeter_wsgi.exchange import route_of
from openmeter_wsgi.measures import Measure, computed, evaluate
from openmeter_wsgi.not_metered import NotMetered
from openmeter_wsgi.not_metered import logger as audit_logger
from openmeter_wsgi.policy import overriding_options
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
    from openmeter_wsgi.request import RequestRecord, RunTimeUsage

logger: Final = log.get_logger(__name__)

Environ: TypeAlias = dict[str, Any]
#: Maximum number of remembered warnings.
_MAX_WARNED = 1_000
#: Helpers that add usage to a request.
_USAGE_HELPERS = {"set_meters", "add_meters"}
#: Maximum number of cached status lines: an application may send any reason phrase.
_MAX_STATUS_LINES = 1_000
#: Maximum number of characters of a request id from a header.
_MAX_ID_LENGTH = 128
#: Log line of each remark on a response body, by `Exchange.remarks`.
_REMARKS = {
    "ambiguous_usage": (
        "%s: the body holds several reports of a model's usage; the largest value of "
        "each figure is billed; counted as %s. llm_usage(provider=...) reads the "
        "reports of one provider only"
    ),
    "several_calls": (
        "%s: the body holds several calls of a model; the last one is billed; counted "
        "as %s"
    ),
}
_LOST = "%s: the usage of a request is lost due to an error in openmeter_wsgi"


class Billing:
    """Bills the requests of one policy in one process. Any thread."""

    def __init__(self, policy: Policy, name: str, process: Process) -> None:
        self.policy = policy
        #: The name in counts and log lines: ``default``, the rule of the route, or the
        #: view.
        self.name = name
        self.process = process
        #: Counts the requests that became no event.
        self.not_metered: NotMetered = NotMetered(name, policy.audit)
        self._counts = process.counts
        self._codes = policy.meter_on_status_codes.codes  # type: ignore[union-attr]
        #: True if a request is allowed only with certain entitlements.
        self.requires_entitlements: bool = bool(policy.required_entitlements)
        #: True if responses get RateLimit headers.
        self.adds_quota_headers: bool = (
            self.requires_entitlements and policy.usage_headers
        )
        #: Billings of views with their own options, by `id()` of the options. An entry
        #: holds the options: otherwise a later object could have the same id.
        self._variants: dict[int, tuple[Mapping[str, Any], Billing]] = {}
        self.subjects: SubjectFinder = SubjectFinder(policy)
        self.gate: Gate = Gate(
            policy,
            process.entitlements,
            subjects=self.subjects,
            counts=self._counts,
        )
        self.id_source: RequestIdSource = RequestIdSource(policy, process.ids)
        #: True if usage is subtracted from quotas that are reserved locally.
        self._has_countdown = bool(policy.entitlement_meters)
        self._when = _predicate(policy.meter_when)
        self._has_meters = bool(policy.static_meters or policy.measured)
        #: Kinds of body readers that the measures need. Empty if no measure reads the
        #: body; None if the policy has no measures, so that nothing is captured.
        self.body_readers: frozenset[str] | None = _body_readers(policy, self._when)
        self._meter_options = policy.meter_options
        #: True if this policy bills requests that no rule matches: it has routes, or
        #: belongs to the rule ``*``.
        self._bills_unmatched = policy.routes is not None or name == EVERY_OTHER
        #: None if the policy needs `Billing.events` for every response.
        self.fast_path: FastPath | None = (
            FastPath(self) if self._has_fast_path else None
        )
        #: Routes and meter types for which a missing value was logged.
        self._warned: set[tuple[str, str]] = set()

    @property
    def _has_fast_path(self) -> bool:
        """True if only the status and the subject of a response decide its events."""
        return (
            self.body_readers is None
            and not self._bills_unmatched
            and not self._has_countdown
            and self.id_source.generates_all
            and all(meter.has_no_overrides for meter in self.policy.static_meters)
            and are_small(self.policy.static_meters, self.policy.event_source)
        )

    def variant(self, name: str, options: Mapping[str, Any]) -> Billing:
        """Return the billing of the same policy with the *options* of a view.

        Never raises an Exception. If the options contradict the policy, or the API key
        cannot be read now, this is logged, and the same billing is returned.
        """
        variant = self._variants.get(id(options))
        if variant is None:
            try:
                changes = overriding_options(options)
                policy = dataclasses.replace(self.policy, routes=None, **changes)
            except ConfigError as error:
                logger.error(
                    "%s: %s; its requests are billed as those of its route", name, error
                )
                return self
            # `setdefault`: threads that race all get the same billing.
            variant = self._variants.setdefault(
                id(options), (options, self.process.billing_of_view(policy, name))
            )
        return variant[1]

    def report_late_call(self, helper: str) -> None:
        """Log a call of *helper* after the request was settled.

        A call of `set_meters` or `add_meters` is also counted as lost usage.
        """
        if helper in _USAGE_HELPERS:
            self._counts.dropped["late"] += 1
        logger.error(
            "%s: called after the response had ended; it has no effect", helper
        )

    def bills(self, status: str) -> bool:
        """Return True if responses with this status line are billed."""
        return status[:3] in self._codes

    def needs_decision(self, environ: Environ) -> bool:
        """Return True if the entitlements of this request must be checked."""
        return self.requires_entitlements and (
            self._meter_options or not is_options(environ)
        )

    def count_denied(self, environ: Environ) -> None:
        """Count a denied request. It is not billed."""
        self.not_metered.count("denied", environ, None)

    def count_handed_over(self, environ: Environ, request: RequestRecord) -> None:
        """Settle a request whose socket the application took over. It is not billed."""
        if not self.process.is_started:
            self.process.start(environ)
        self.not_metered.count("handed_over", environ, request.status)
        if request.reserved:
            self.gate.settle_reservations(request, (), None)
        request.mark_settled()

    def events(
        self,
        environ: Environ,
        request: RequestRecord,
        outcome: str,
        exchange: Exchange | None = None,
    ) -> Sequence[bytes]:
        """Return the encoded events of a finished request, empty if it is not billed.

        *exchange* is the measured response, None if nothing is measured. Never raises
        an Exception: an internal error is logged and counted, the events of this
        request are lost, and the response is not changed.
        """
        run_time, status = request.usage, request.status
        try:
            if run_time is not None and run_time.is_denied:
                return self.not_metered.count("denied", environ, status)
            if (
                self._bills_unmatched
                and (other := self._stricter_route_billing(environ)) is not None
            ):
                return other.events(environ, request, outcome, exchange)
            if reason := self._status_reason(environ, run_time, status):
                return self.not_metered.count(reason, environ, status)
            encoded = self._encode_events(environ, request, outcome, exchange)
            if isinstance(encoded, str):
                return self.not_metered.count(encoded, environ, status)
        except Exception:
            logger.exception(_LOST, "events")
            return self.not_metered.count("error", environ, status)
        else:
            self._counts.metered += 1
            return encoded
        finally:
            if request.reserved:
                # `_encode_events` did not settle them: nothing is billed, release all.
                self.gate.settle_reservations(request, (), None)

    def _stricter_route_billing(self, environ: Environ) -> Billing | None:
        """Return the billing of the framework's route, if that is stricter than this.

        The framework may serve a path by a route whose rule does not match that path:
        it accepts ``-5`` as an integer, for example. Then the rule of that route
        applies, if it is stricter. `Routes` defines which is stricter.
        """
        routes, template = self.process.routes, route_of(environ)
        if routes is None or template is None:
            return None
        other = routes.by_template(template, environ, self)
        if other is not None:
            logger.warning(
                "route %s: served a path that its rule does not match; the request is "
                "billed by the rule, but its entitlements were not checked; write the "
                "rule so that it matches all paths of the route, or decorate the view",
                template,
            )
        return other

    def _status_reason(
        self, environ: Environ, run_time: RunTimeUsage | None, status: str | None
    ) -> str | None:
        """Return the reason for not billing this status, None if it is billed."""
        if not status:
            return "no_status"
        if not self.bills(status):
            return "status"
        if is_options(environ) and not self._meter_options:
            return "options" if run_time or self._has_meters else "no_usage"
        return None

    def _encode_events(
        self,
        environ: Environ,
        request: RequestRecord,
        outcome: str,
        exchange: Exchange | None,
    ) -> Sequence[bytes] | str:
        """Return the encoded events, or the reason if nothing is billed."""
        run_time = request.usage
        if reason := self._exclusion_reason(run_time, outcome, exchange):
            return reason
        meters = self._meters(run_time, outcome, exchange)
        if isinstance(meters, str):
            return meters
        subject = self.subjects.find(environ)
        if subject is None and not all(meter.subject for meter in meters):
            all_meters, meters = meters, [meter for meter in meters if meter.subject]
            if not meters:
                self._warn_of_missing_subject(environ)
                return "no_subject"
            without = [meter.type for meter in all_meters if not meter.subject]
            self._counts.dropped["no_subject"] += len(without)
            logger.warning(
                "%s: meters without a subject are not billed: %s; other meters of the "
                "request have one",
                "no_subject", ", ".join(map(repr, without)),
            )  # fmt: skip
        if run_time is not None and run_time.idempotency_key and outcome is COMPLETED:
            meters = with_ids_per_subject(environ, meters, run_time.idempotency_key)
        events = encode_events(
            meters,
            request_id=self.id_source.id_of(environ, run_time, subject, outcome),
            subject=subject,
            source=self.policy.event_source,
        )
        kept = self._storable(events)
        if self._has_countdown:
            pairs = zip(meters, events, strict=True)
            self.gate.settle_reservations(
                request, [m for m, e in pairs if e in kept], subject
            )
        return kept or "message_too_large"

    def _warn_of_missing_subject(self, environ: Environ) -> None:
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
        """Return the events that are small enough; count and log the others."""
        problems = [problem for event in events if (problem := size_problem(event))]
        if not problems:
            return events
        for problem in problems:
            logger.error("%s: an event is not sent: %s", self.name, problem)
        kept = [event for event in events if size_problem(event) is None]
        if kept:
            # If none is kept, the caller counts the whole request as not metered.
            self._counts.dropped["message_too_large"] += len(problems)
        return kept

    def _exclusion_reason(
        self, run_time: RunTimeUsage | None, outcome: str, exchange: Exchange | None
    ) -> str | None:
        """Return the reason if outcome, view or ``meter_when`` rule out any event."""
        if self._part_billed(outcome) == "none":
            return outcome
        if run_time is not None and run_time.is_unmetered:
            return "no_meter"
        if run_time is not None and None in run_time.deferred:
            return "deferred"
        if self._when is None or exchange is None:
            return None
        value = self._when.value(exchange)
        # The customer is not charged if the value is unknown.
        is_unknown = isinstance(value, Unknown)
        return "meter_when" if is_unknown or not value else None

    def _part_billed(self, outcome: str) -> str:
        """Return the part of the usage to bill: ``all``, ``measured`` or ``none``."""
        if outcome is COMPLETED:
            return "all"
        policy = self.policy
        return policy.on_failure if outcome is FAILED else policy.on_abort

    def _meters(
        self, run_time: RunTimeUsage | None, outcome: str, exchange: Exchange | None
    ) -> Sequence[Meter] | str:
        """Return the meters of policy and handler, or the reason for having none."""
        policy = self.policy
        with_flat = self._part_billed(outcome) == "all"
        usage = policy.static if with_flat else CheckedUsage({}, ())
        missing: Sequence[tuple[str, Measure, str]] = ()
        if policy.measured and exchange is not None:
            evaluated = evaluate(
                [m for m in policy.measured if with_flat or m.is_quantity], exchange
            )
            usage = CheckedUsage(
                {**usage.numbers, **evaluated.usage.numbers},
                (*usage.documents, *evaluated.usage.documents),
            )
            missing = evaluated.missing
            for meter_type, measure, reason in missing:
                self._warn_of_missing(exchange, meter_type, measure, reason)
            self._report_remarks(exchange)
        if run_time is not None:
            usage = run_time.merged(usage, with_flat=with_flat)
            if run_time.deferred and not usage.types:
                return "deferred"
        if meters := policy.as_meters(usage):
            for _, _, reason in missing:
                self._counts.dropped[f"no_value_{reason}"] += 1
            return meters
        if missing:
            return f"no_value_{missing[0][2]}"
        return "no_usage" if with_flat else outcome

    def _report_remarks(self, exchange: Exchange) -> None:
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


def _body_readers(policy: Policy, when: Measure | None) -> frozenset[str] | None:
    measures = [measure for meter in policy.measured for measure in meter.measures]
    if when is not None:
        measures.append(when)
    if not measures:
        return None
    return frozenset().union(*(measure.bodies for measure in measures))


class FastPath:
    """Encodes events of completed responses from prepared templates. Any thread.

    Only for policies whose events depend on status and subject alone, and for requests
    without run-time usage. For these `Billing.events` returns the same events, at twice
    the cost.
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
        #: The template, if there is exactly one.
        self._template = self._templates[0] if len(self._templates) == 1 else None
        #: The subject of requests without a caller, empty if it depends on the request.
        self._anonymous = billing.subjects.anonymous or ""
        #: Cache by status line: the reason for not billing it, None if it is billed.
        self._reasons: dict[str | None, str | None] = {}

    def events(  # noqa: C901 - one function: a call costs each request
        self, environ: Environ, request: RequestRecord
    ) -> Sequence[bytes] | None:
        """Return the events of a response, empty if it is not billed.

        Return None if the fast path does not apply: use `Billing.events` then.
        """
        try:
            if request.usage is not None or environ["REQUEST_METHOD"] in OPTIONS:
                return None
            status = request.status
            try:
                reason = self._reasons[status]
            except KeyError:
                reason = self._classify(status)
            subject = self._anonymous
            if reason is None and (
                not subject or request.caller or "REMOTE_USER" in environ
            ):
                subject = self._subjects.find(environ) or ""
                if len(subject) > SHORT_SUBJECT:
                    return None
        except Exception:  # noqa: BLE001 - `Billing.events` gets it again and logs it
            return None
        if reason is not None:
            self._reason_counts[reason] += 1
            if self._is_audited or self._is_logged(DEBUG):
                self._not_metered.report(reason, environ, status)
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

    def _classify(self, status: str | None) -> str | None:
        """Cache and return the reason for not billing a status line."""
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


class RequestIdSource:
    """Returns the id of each request of one policy. One process, any thread.

    The id is derived from the idempotency key, read from the trusted header, or
    generated.
    """

    def __init__(self, policy: Policy, ids: RequestIds) -> None:
        self._ids = ids
        header = policy.trusted_request_id_header
        self._environ_key = header and "HTTP_" + header.upper().replace("-", "_")

    @property
    def generates_all(self) -> bool:
        """True unless ids are read from a header."""
        return not self._environ_key

    def id_of(
        self,
        environ: Mapping[str, Any],
        run_time: RunTimeUsage | None,
        subject: str | None,
        outcome: str,
    ) -> str:
        """Return the id of a request that ended with *outcome*."""
        if run_time is not None and run_time.idempotency_key and outcome is COMPLETED:
            return _derived_id(environ, subject, run_time.idempotency_key)
        if self._environ_key:
            given = str(environ.get(self._environ_key, ""))
            if (
                given.isascii()
                and given.isprintable()
                and 0 < len(given) <= _MAX_ID_LENGTH
            ):
                return given
        return self._ids.new()


def with_ids_per_subject(
    environ: Mapping[str, Any], meters: Sequence[Meter], key: str
) -> list[Meter]:
    """Return *meters*, with an event id for each meter that has its own subject.

    The id includes that subject: two customers may use the same idempotency key.
    """
    return [
        msgspec.structs.replace(
            meter, id=f"{_derived_id(environ, meter.subject, key)}:{suffix}"
        )
        if meter.subject and not meter.id
        else meter
        for meter, suffix in with_id_suffixes(meters)
    ]


def _derived_id(environ: Mapping[str, Any], subject: str | None, key: str) -> str:
    """Return the id that all requests of one operation share."""
    path = f"{environ.get('SCRIPT_NAME', '')}{environ.get('PATH_INFO', '')}"
    return derived_id(subject or "", method_of(environ), path, key)

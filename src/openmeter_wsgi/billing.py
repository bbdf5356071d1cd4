"""From the end of a response to its events: what one policy bills, and what not."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections import defaultdict
from typing import TYPE_CHECKING, Any, TypeAlias

from openmeter_wsgi import log
from openmeter_wsgi.audit import Audit, audit_record
from openmeter_wsgi.entitlements.gate import Gate
from openmeter_wsgi.environ import RESERVED, is_options
from openmeter_wsgi.events import StaticEvents, encode_events
from openmeter_wsgi.measured_meters import evaluate
from openmeter_wsgi.measures import Measure, computed
from openmeter_wsgi.outcome import COMPLETED, FAILED
from openmeter_wsgi.subject import subject_finder
from openmeter_wsgi.usage import Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from openmeter_wsgi.entitlements.checking import Entitlements
    from openmeter_wsgi.exchange import Exchange
    from openmeter_wsgi.meters import RunTimeMeters
    from openmeter_wsgi.policy import Policy
    from openmeter_wsgi.stats import Counts
    from openmeter_wsgi.usage import Meter

logger = log.get_logger(__name__)

Environ: TypeAlias = dict[str, Any]
#: Routes of which a warning was given are remembered up to this number.
_MAX_WARNED = 1_000


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
        new_id: Callable[[], str],
        vary: Callable[[Policy, str], Billing],
    ) -> None:
        self.policy = policy
        #: The rule of its route, or what else it is called in counts and log lines.
        self.name = name
        #: Requests that became no event, by reason.
        self.not_metered: defaultdict[str, int] = defaultdict(int)
        self._counts = counts
        self._codes = policy.meter_on_status_codes.codes  # type: ignore[union-attr]
        self._new_id = new_id
        self._vary = vary
        #: What governs views that say more of themselves than their route does.
        self._variants: dict[int, Billing] = {}
        #: From an environ to who is metered under this policy.
        self.find_subject = subject_finder(policy)
        self.gate = Gate(
            policy, entitlements, find_subject=self.find_subject, counts=counts
        )
        header = policy.trusted_request_id_header
        self._id_key = header and "HTTP_" + header.upper().replace("-", "_")
        self._counts_down = bool(policy.entitlement_meters)
        self._when = _predicate(policy.meter_when)
        #: The readers of bodies that a response needs, None where not even its
        #: length has to be known.
        self.bodies = _bodies(policy, self._when)
        self._static_meters = policy.static_meters
        self._static = self._short_way()
        self._warned: set[str | None] = set()
        self._audit = Audit(policy.audit) if policy.audit is not None else None

    def _short_way(self) -> StaticEvents | None:
        """Return what encodes the events of most requests, if they are that simple."""
        policy = self.policy
        simple = self.bodies is None and not self._counts_down
        if simple and all(meter.plain for meter in self._static_meters):
            return StaticEvents(self._static_meters, policy.event_source)
        return None

    def variant(self, name: str, options: Mapping[str, Any]) -> Billing:
        """Return what bills under the same policy with other *options*."""
        key = id(options)  # of a decorator, which lives as long as its view
        found = self._variants.get(key)
        if found is None:
            policy = dataclasses.replace(self.policy, routes=None, **options)
            # Two threads may come at once: one of them wins, for counts to be whole.
            found = self._variants.setdefault(key, self._vary(policy, name))
        return found

    def bills(self, status: str) -> bool:
        """Say whether responses of this status line are billed."""
        return status[:3] in self._codes

    def must_ask(self, environ: Environ) -> bool:
        """Say whether a request may begin only after a decision."""
        if not self.gate.required:
            return False
        return self.policy.meter_options or not is_options(environ)

    def refuse(self, environ: Environ) -> None:
        """Count a request that was denied: it has ended, and is never billed."""
        self._counts.settled += 1
        self._not_metered("denied", environ, None)

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
                return self._not_metered("denied", environ, status)
            if status is None or status[:3] not in self._codes:
                reason = "status" if status else "no_status"
                return self._not_metered(reason, environ, status)
            if not self.policy.meter_options and is_options(environ):
                return self._not_metered("options", environ, status)
            if outcome is COMPLETED and stated is None and self._static:
                return self._static_events(environ, self._static, status)
            made = self._stated_events(environ, stated, outcome, exchange)
            if not isinstance(made, str):
                return made
            return self._not_metered(made, environ, status)
        except Exception:
            logger.exception(
                "%s: usage of a request is lost by our own fault", "events"
            )
            return self._not_metered("error", environ, status)
        finally:
            if self._counts_down and RESERVED in environ:
                self.gate.settle(environ, (), None)  # nothing is billed

    def _static_events(
        self, environ: Environ, static: StaticEvents, status: str
    ) -> Sequence[bytes]:
        if not self._static_meters:
            return self._not_metered("no_meters", environ, status)
        subject = self.find_subject(environ)
        if subject is None:
            return self._not_metered(self._no_subject(), environ, status)
        return static.encode(self._request_id(environ), subject)

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
                return self._no_subject()
            self._counts.dropped["no_subject"] += len(all_meters) - len(meters)
        if self._counts_down:
            self.gate.settle(environ, meters, subject)
        return encode_events(
            meters,
            request_id=self._request_id(environ, stated, subject, outcome),
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
        return None if wanted is True or _truth(wanted) else "meter_when"

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
        missing = 0
        if policy.measured and exchange is not None:
            found = evaluate(
                [m for m in policy.measured if with_flat or m.is_quantity], exchange
            )
            usage = Usage(
                {**usage.numbers, **found.usage.numbers},
                (*usage.documents, *found.usage.documents),
            )
            missing = len(found.missing)
            for meter_type, measure, reason in found.missing:
                self._warn_of_missing(exchange, meter_type, measure, reason)
        if stated is not None:
            usage = stated.merged(usage, with_flat=with_flat)
        if meters := policy.as_meters(usage):
            self._counts.dropped["no_value"] += missing
            return meters
        if missing:
            return "no_value"
        return "no_meters" if with_flat else outcome

    def _warn_of_missing(
        self, exchange: Exchange, meter_type: str, measure: Measure, reason: str
    ) -> None:
        where = exchange.route or self.name
        if where in self._warned or len(self._warned) >= _MAX_WARNED:
            return
        self._warned.add(where)
        logger.warning(
            "%s: %r has no value (%s), so no %r is billed; said once, then counted as "
            "no_value",
            f"{exchange.method} {where}", measure, reason, meter_type,
        )  # fmt: skip

    def _request_id(
        self,
        environ: Environ,
        stated: RunTimeMeters | None = None,
        subject: str | None = None,
        outcome: str = COMPLETED,
    ) -> str:
        if stated is not None and stated.idempotency_key and outcome is COMPLETED:
            return _derived_id(environ, subject, stated.idempotency_key)
        if self._id_key:
            given = str(environ.get(self._id_key, ""))
            if given.isascii() and given.isprintable() and 0 < len(given) <= 128:
                # A quote or backslash would need escaping where ids are pasted in.
                return given.replace("\\", "_").replace('"', "_")
        return self._new_id()

    def _not_metered(
        self, reason: str, environ: Environ, status: str | None
    ) -> Sequence[bytes]:
        self.not_metered[reason] += 1
        if self._audit is not None or logger.isEnabledFor(logging.DEBUG):
            self._explain(reason, environ, status)
        return ()

    def _explain(self, reason: str, environ: Environ, status: str | None) -> None:
        record = audit_record(environ, policy=self.name, reason=reason, status=status)
        logger.debug(
            "not billed: %(method)s %(path)s (%(status)s): %(reason)s [%(policy)s]",
            record,
        )
        if self._audit is not None:
            self._audit.tell(record)

    def _no_subject(self) -> str:
        logger.warning(
            "%s: a request without subject is not billed (see subject, subject_path, "
            "set_subject and on_missing_subject)",
            "no_subject",
        )
        return "no_subject"


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


def _truth(value: object) -> bool:
    # An Unknown is an object, and so true.
    return bool(value) and not hasattr(value, "reason")


def _derived_id(environ: Environ, subject: str | None, key: str) -> str:
    """Return the id that every completed attempt of one operation has."""
    parts = (
        subject or "",
        str(environ.get("REQUEST_METHOD", "")),
        f"{environ.get('SCRIPT_NAME', '')}{environ.get('PATH_INFO', '')}",
        key,
    )
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode(errors="surrogatepass")
        digest.update(b"%d:" % len(encoded) + encoded)
    return f"once-{digest.hexdigest()[:40]}"

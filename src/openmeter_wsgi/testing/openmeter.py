"""What a test has in its hand."""

from __future__ import annotations

import contextlib
import datetime
import os
from typing import TYPE_CHECKING, Any, Self

from openmeter_wsgi import timestamps
from openmeter_wsgi.process import replaced
from openmeter_wsgi.testing.collecting import Collected
from openmeter_wsgi.testing.expectation import Expectation
from openmeter_wsgi.testing.report import report

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from decimal import Decimal

    from openmeter_wsgi.entitlements.decision import Reason
    from openmeter_wsgi.testing.collecting import Event

_START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
_KEY = "OPENMETER_API_KEY"


class OpenMeter:
    """Stands in for OpenMeter in a test, and knows what was metered.

    While it is entered every `OpenMeterMiddleware` of the process hands over to it,
    wherever and whenever that was made. Nothing is sent, no thread is started.
    Ids count the requests, the time of events is *now*, which stands still.
    """

    def __init__(self) -> None:
        #: The time of the events to come; has a time zone.
        self.now = _START
        self._collected = Collected()
        self._entered = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._entered.callback(timestamps.go_by, timestamps.go_by(self._clock))
        if _KEY not in os.environ:
            os.environ[_KEY] = "test"
            self._entered.callback(os.environ.pop, _KEY, None)
        self._entered.enter_context(replaced(self._collected.process))
        return self

    def __exit__(self, *_: object) -> None:
        self._collected.end()
        self._entered.close()

    # -- What was metered

    @property
    def events(self) -> list[Event]:
        """Every event so far, in order. A response that is still open ends here."""
        self._collected.responses.finish()
        return list(self._collected.events)

    def assert_metered(
        self,
        type: str,  # noqa: A002 - as CloudEvents calls it
        /,
        *,
        subject: str | None = None,
        total: float | Decimal | None = None,
        of: str = "total",
        data: Mapping[str, Any] | None = None,
        times: int | None = None,
    ) -> list[Event]:
        """Fail unless events of *type* were metered; return them.

        :param total: what their numbers come to together …
        :param of: … under this name in their data.
        :param data: what the data of each has at least.
        :param times: how many there are; at least one by default.
        """
        __tracebackhide__ = True
        expected = Expectation(type, subject, total, of, data, times)
        findings = [(event, expected.mismatch(event)) for event in self.events]
        found = [event for event, why_not in findings if not why_not]
        if problem := expected.shortfall(found):
            raise AssertionError(
                report(f"{expected}, {problem}", self._collected, findings)
            )
        return found

    def assert_not_metered(
        self,
        type: str | None = None,  # noqa: A002 - as CloudEvents calls it
        /,
        *,
        subject: str | None = None,
        reason: str | None = None,
    ) -> None:
        """Fail if an event was metered, or was not for another *reason*.

        :param type: only such events are looked for.
        :param reason: that of a request without events, as in ``stats().not_metered``.
        """
        __tracebackhide__ = True
        findings = [
            (event, "")
            for event in self.events
            if type in {None, event.type} and subject in {None, event.subject}
        ]
        reasons = {each.reason for each in self._collected.unmetered}
        expected = f"expected {type!r}" if type else "expected nothing"
        expected += " not to be metered" if type else " to be metered"
        expected += f", subject {subject!r}" if subject is not None else ""
        if findings:
            text = f"{expected}, but it was" if type else f"{expected}, but this was"
        elif reason is not None and reason not in reasons:
            text = f"{expected} for the reason {reason!r}, but that was not the reason"
        elif not self._collected.unmetered and not self._collected.events:
            text = f"{expected}, which says nothing"
        else:
            return
        raise AssertionError(report(text, self._collected, findings))

    def clear(self) -> None:
        """Forget what was metered so far; grants stay."""
        self._collected.responses.finish()
        self._collected.events.clear()
        self._collected.unmetered.clear()

    # -- Who may

    def grant(
        self,
        feature: str,
        *,
        subject: str | None = None,
        balance: float | None = None,
        config: Any = None,
    ) -> None:
        """Give access to *feature*: to one, or to everybody.

        Without this OpenMeter knows of no access. Subjects are customers, as far as
        the policy maps them to none.

        :param balance: what is left of a metered feature. It is counted down only
            as far as the policy does that (``entitlement_meters``).
        :param config: the value of a static feature, as ``Decision.config`` has it.
        """
        self._collected.grants.grant(feature, subject, balance, config)

    def deny(
        self, feature: str, *, subject: str | None = None, reason: Reason = "no_access"
    ) -> None:
        """Deny access to *feature*, for the reason that OpenMeter has."""
        self._collected.grants.deny(feature, subject, reason)

    def outage(self) -> contextlib.AbstractContextManager[None]:
        """Let OpenMeter answer no question from now on, or within ``with`` only.

        What a request is billed waits for OpenMeter to come back, so it is metered
        all the same.
        """
        self._collected.grants.is_away = True
        return self._outage()

    @contextlib.contextmanager
    def _outage(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._collected.grants.is_away = False

    def _clock(self) -> float:
        return self.now.timestamp()

"""The test helper `OpenMeter`: its assertions, and the reports of failures."""

from __future__ import annotations

import contextlib
import datetime
import os
from decimal import Decimal, InvalidOperation
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import msgspec

from openmeter_wsgi import values
from openmeter_wsgi.process import replaced
from openmeter_wsgi.testing.collecting import Collected
from openmeter_wsgi.values import add_exactly, written_number

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from openmeter_wsgi.entitlements.decision import Reason
    from openmeter_wsgi.testing.collecting import Event, Unmetered


#: Maximum number of lines in each section of a report.
_MAX_LINES = 20
_NO_REQUEST = (
    "no request came through an OpenMeterMiddleware: is the application wrapped, and "
    "does the test's client call it as WSGI does?"
)


def report(
    expected: str, collected: Collected, findings: Iterable[tuple[Event, str]]
) -> str:
    """Return the text of a failure: the expectation, and the mismatch of each event."""
    lines = [expected]
    lines += _section("metered", [_metered(*finding) for finding in findings])
    lines += _section(
        "not metered", [_unmetered(request) for request in collected.unmetered]
    )
    lines += _section("lost", _lost(collected))
    lines += _section("never granted", _never_granted(collected))
    if len(lines) == 1:
        lines.append(f"  {_NO_REQUEST}")
    return "\n".join(lines)


def _section(title: str, lines: Sequence[str]) -> list[str]:
    if not lines:
        return []
    more = len(lines) - _MAX_LINES
    listed = [*lines[:_MAX_LINES], f"… and {more} more"] if more > 0 else lines
    return [f"{title}:", *(f"  {line}" for line in listed)]


def _metered(event: Event, mismatch: str) -> str:
    text = f"{event.type} of {event.subject!r}: {as_json(event.data)}"
    return f"{text}  <- {mismatch}" if mismatch else text


def _unmetered(request: Unmetered) -> str:
    status = request.status or "no status"
    text = f"{request.method} {request.path} ({status}): {request.reason}"
    return text if request.policy == "default" else f"{text} [{request.policy}]"


def _lost(collected: Collected) -> list[str]:
    return [f"{n} meters: {reason}" for reason, n in collected.dropped.items()]


def _never_granted(collected: Collected) -> list[str]:
    return [
        f"{feature!r} of {customer!r}: see openmeter.grant({feature!r})"
        for customer, feature in collected.grants.never_granted
    ]


def as_json(data: Any) -> str:
    """Return *data* as JSON, as it is sent."""
    return msgspec.json.encode(data).decode()


class Expectation(NamedTuple):
    """An expectation: events of one type, with conditions."""

    type: str
    subject: str | None = None
    #: Sum of the numbers named *of* in their data.
    total: float | Decimal | None = None
    of: str = "total"
    #: Members that the data of each event must have.
    data: Mapping[str, Any] | None = None
    times: int | None = None

    def __str__(self) -> str:
        text = f"expected {self.type!r} to be metered"
        if self.times is not None:
            text += f" {self.times} times" if self.times != 1 else " once"
        if self.subject is not None:
            text += f", subject {self.subject!r}"
        if self.data is not None:
            text += f", with data {as_json(dict(self.data))}"
        if self.total is not None:
            text += f", {self.of} {self.total} in all"
        return text

    def mismatch(self, event: Event) -> str:
        """Return the difference of *event* from an expected one, or empty text."""
        if event.type != self.type:
            return f"type {event.type!r}"
        if self.subject not in {None, event.subject}:
            return f"subject {event.subject!r}"
        for name, value in (self.data or {}).items():
            if name not in event.data:
                return f"no {name!r} in its data"
            if not _equal(event.data[name], value):
                return f"{name} {event.data[name]!r}"
        return ""

    def shortfall(self, found: Sequence[Event]) -> str:
        """Return the difference in the number or sum of *found*, or empty text."""
        if self.times is not None and len(found) != self.times:
            return f"but {len(found)} were"
        if self.times is None and not found:
            return "but none was"
        if self.total is None:
            return ""
        try:
            values = [Decimal(str(event.data[self.of])) for event in found]
        except KeyError:
            names = sorted({name for event in found for name in event.data})
            return f"but there is no {self.of!r} in the data: use of={_or(names)}"
        except InvalidOperation:
            return f"but {self.of!r} is not a number"
        total = reduce(add_exactly, values, Decimal(0))
        if total != Decimal(str(self.total)):
            return f"but it comes to {total}"
        return ""


def _or(names: Sequence[str]) -> str:
    return " or ".join(map(repr, names)) or "…"


def _equal(found: Any, wanted: Any) -> bool:
    """Compare values as sent: exact numbers are sent as text."""
    if found == wanted:
        return True
    return isinstance(wanted, int | Decimal) and written_number(wanted) == found


_START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
_KEY = "OPENMETER_API_KEY"


class OpenMeter:
    """A stand-in for OpenMeter in a test, which collects the events.

    While its context is entered, it collects the events of every `OpenMeterMiddleware`
    in the process, also of those made before. Nothing is sent, no thread is started.
    Event ids count the requests; events have the time *now*, which stands still.
    """

    def __init__(self) -> None:
        #: Time of the next events, with a time zone.
        self.now = _START
        self._collected = Collected()
        self._entered = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._entered.callback(values.set_clock, values.set_clock(self._clock))
        if _KEY not in os.environ:
            os.environ[_KEY] = "test"
            self._entered.callback(os.environ.pop, _KEY, None)
        self._entered.enter_context(replaced(self._collected.process))
        return self

    def __exit__(self, *_: object) -> None:
        self._collected.end()
        self._entered.close()

    # -- Events

    @property
    def events(self) -> list[Event]:
        """All events so far, in order; open responses are finished first."""
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

        :param total: expected sum of their numbers.
        :param of: name of these numbers in the data of the events.
        :param data: members that the data of each event must have.
        :param times: expected number of events; at least one by default.
        """
        __tracebackhide__ = True
        expected = Expectation(type, subject, total, of, data, times)
        findings = [(event, expected.mismatch(event)) for event in self.events]
        found = [event for event, mismatch in findings if not mismatch]
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
        """Fail if an event was metered, or no request was unmetered for *reason*.

        :param type: consider only events of this type.
        :param reason: reason of an unmetered request, as in ``stats().not_metered``.
        """
        __tracebackhide__ = True
        findings = [
            (event, "")
            for event in self.events
            if type in {None, event.type} and subject in {None, event.subject}
        ]
        reasons = {request.reason for request in self._collected.unmetered}
        expected = f"expected {type!r}" if type else "expected nothing"
        expected += " not to be metered" if type else " to be metered"
        expected += f", subject {subject!r}" if subject is not None else ""
        if findings:
            text = f"{expected}, but it was" if type else f"{expected}, but this was"
        elif reason is not None and reason not in reasons:
            text = f"{expected} for the reason {reason!r}, but that was not the reason"
        elif not self._collected.unmetered and not self._collected.events:
            text = f"{expected}, but there was no request at all"
        else:
            return
        raise AssertionError(report(text, self._collected, findings))

    def clear(self) -> None:
        """Forget the events so far; grants stay."""
        self._collected.responses.finish()
        self._collected.events.clear()
        self._collected.unmetered.clear()

    # -- Entitlements

    def grant(
        self,
        feature: str,
        *,
        subject: str | None = None,
        balance: float | None = None,
        config: Any = None,
    ) -> None:
        """Give access to *feature*: to one *subject*, or to everybody.

        Without a grant there is no access. A subject is a customer, unless the policy
        maps it to another customer.

        :param balance: remaining balance of a metered feature. It is counted down if
            the policy does so (``entitlement_meters``).
        :param config: value of a static feature, as in ``Decision.config``.
        """
        self._collected.grants.grant(feature, subject, balance, config)

    def deny(
        self, feature: str, *, subject: str | None = None, reason: Reason = "no_access"
    ) -> None:
        """Deny access to *feature*, for one of OpenMeter's reasons."""
        self._collected.grants.deny(feature, subject, reason)

    def outage(self) -> contextlib.AbstractContextManager[None]:
        """Make OpenMeter unavailable from now on, or only within ``with``.

        It answers no questions about access. Requests are metered all the same, as
        events wait in the queue during an outage.
        """
        self._collected.grants.is_unavailable = True
        return self._outage()

    @contextlib.contextmanager
    def _outage(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._collected.grants.is_unavailable = False

    def _clock(self) -> float:
        return self.now.timestamp()

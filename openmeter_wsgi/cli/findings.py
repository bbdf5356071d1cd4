"""Findings of ``check``: severity, printing, and the state that checks share."""

from __future__ import annotations

import dataclasses
import enum
import secrets
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from openmeter_wsgi.cli.common import print_json, printable
from openmeter_wsgi.events import Meter, encode_events

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from openmeter_wsgi.cli.api_client import Listing, NoAnswer
    from openmeter_wsgi.delivery.client import OpenMeterClient
    from openmeter_wsgi.middleware import OpenMeterMiddleware
    from openmeter_wsgi.policy import Policy

#: Type and subject of every test event that a check sends: no meter counts this type,
#: and no customer has this subject.
MARK = "openmeter_wsgi.check"
#: Status codes of an answer to a key without permission.
_NOT_ALLOWED = (401, 403)


class Severity(enum.StrEnum):
    """The severity of a finding.

    NOTE is information, not a problem. UNKNOWN is not a failure: the check could not
    run.
    """

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    FAILURE = "failure"
    UNKNOWN = "unknown"


class Finding(NamedTuple):
    """One result of a check, with its remedy."""

    name: str
    severity: Severity
    found: str
    #: The action that solves the problem, None if none is needed.
    remedy: str | None = None
    #: A shell command for this action.
    command: str | None = None


def ok(name: str, found: str, remedy: str | None = None) -> Finding:
    """Return a finding without a problem; *remedy* is advice."""
    return Finding(name, Severity.OK, found, remedy)


def note(name: str, found: str, remedy: str | None = None) -> Finding:
    """Return a finding that is information, not a problem."""
    return Finding(name, Severity.NOTE, found, remedy)


def warning(name: str, found: str, remedy: str) -> Finding:
    """Return a finding that may lose usage, or bill it twice, in some situations."""
    return Finding(name, Severity.WARNING, found, remedy)


def failure(name: str, found: str, remedy: str) -> Finding:
    """Return a finding because of which usage is billed wrongly, or not at all."""
    return Finding(name, Severity.FAILURE, found, remedy)


def unknown(name: str, found: str, remedy: str | None = None) -> Finding:
    """Return a finding for a check that could not run, with the reason."""
    return Finding(name, Severity.UNKNOWN, found, remedy)


def unanswered(name: str, error: NoAnswer, may: str) -> Finding:
    """Return a finding for a request that failed; it needs the permission *may*."""
    remedy = f"use a key that may {may}" if error.status in _NOT_ALLOWED else None
    return unknown(name, str(error), remedy)


_SYMBOLS = {
    Severity.OK: ("✓", "green"),
    Severity.NOTE: ("i", "blue"),
    Severity.WARNING: ("!", "bold yellow"),
    Severity.FAILURE: ("✗", "bold red"),
    Severity.UNKNOWN: ("?", "cyan"),
}
_IN_SUMMARY = (
    Severity.FAILURE, Severity.WARNING, Severity.UNKNOWN, Severity.NOTE, Severity.OK,
)  # fmt: skip
#: Severities whose word has a plural.
_COUNTED = {Severity.FAILURE, Severity.WARNING, Severity.NOTE}
_WIDTH = max(map(len, Severity))
_NAME_WIDTH = 20
#: Maximum number of columns; wider lines are hard to read.
_MAX_WIDTH = 110


def print_findings(
    findings: Iterable[Finding], url: str | None, *, as_json: bool
) -> list[Finding]:
    """Print findings and return them: text one by one, JSON at the end."""
    if as_json:
        printed = list(findings)
        print_json(
            {"api_url": url, "findings": [finding._asdict() for finding in printed]}
        )
        return printed
    if sys.stdout.isatty():
        return _show(findings, url)
    printed = []
    for finding in findings:
        printed.append(finding)
        _print_lines(finding)
    return printed


def _print_lines(finding: Finding) -> None:
    severity = f"{finding.severity:{_WIDTH}}"
    click.echo(f"{severity}  {printable(finding.name)}: {printable(finding.found)}")
    if finding.remedy:
        click.echo(f"{'':{_WIDTH}}  → {printable(finding.remedy)}")
    if finding.command:
        click.echo(printable(finding.command))


def _show(findings: Iterable[Finding], url: str | None) -> list[Finding]:
    """Print findings on a terminal, and a summary at the end."""
    console = Console(markup=False, highlight=False)
    console.width = min(console.width, _MAX_WIDTH)
    began = time.monotonic()
    console.print(Text(f"Checking {url or 'the configuration'}", "bold"))
    shown: list[Finding] = []
    unknowns: list[Finding] = []
    for finding in findings:
        shown.append(finding)
        if unknowns and finding.found != unknowns[0].found:
            _show_alike(unknowns, console)
        if finding.severity is Severity.UNKNOWN:
            unknowns.append(finding)
        else:
            _show_one(finding, console)
    _show_alike(unknowns, console)
    console.print(_summary(shown, time.monotonic() - began))
    return shown


def _show_alike(unknowns: list[Finding], console: Console) -> None:
    """Show checks that could not run, all for the same reason, as one finding."""
    if unknowns:
        names = ", ".join(finding.name for finding in unknowns)
        _show_one(unknowns[0]._replace(name=names), console)
        unknowns.clear()


def _show_one(finding: Finding, console: Console) -> None:
    symbol, style = _SYMBOLS[finding.severity]
    text = Text(printable(finding.found))
    if finding.remedy:
        text.append(f"\n→ {printable(finding.remedy)}", "bold")
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=1)
    table.add_column(width=_NAME_WIDTH, overflow="fold")
    table.add_column(overflow="fold")
    table.add_row(Text(symbol, style), Text(printable(finding.name)), text)
    console.print(table)
    if finding.command:
        # Not wrapped, so that it can be copied.
        console.print(Text(printable(finding.command), "bold"), soft_wrap=True)


def _summary(findings: list[Finding], seconds: float) -> Text:
    counts = Counter(finding.severity for finding in findings)
    summary = Text()
    for severity in _IN_SUMMARY:
        if number := counts[severity]:
            word = severity.value
            if severity in _COUNTED and number > 1:
                word += "s"
            summary.append(" · " if summary else "")
            summary.append(f"{number} {word}", _SYMBOLS[severity][1])
    return summary.append(f" · {seconds:.1f} s", "dim")


@dataclasses.dataclass(frozen=True)
class Sent:
    """A test event that OpenMeter has taken."""

    id: str
    encoded: bytes
    #: Monotonic time when it was taken.
    at: float


@dataclasses.dataclass
class Situation:
    """The policy that is checked, its server, and the results of earlier checks."""

    policy: Policy
    client: OpenMeterClient
    listing: Listing
    #: Waits for a number of seconds; a terminal shows the text as the reason.
    wait: Callable[[float, str], None]
    #: True if the server has answered at all, even with an error.
    server_answers: bool = False
    #: The test event, once OpenMeter has taken it.
    sent: Sent | None = None
    #: The directory of the server in the spool, None if the spool cannot be used.
    spool: Path | None = None
    #: Names and policies of the views that are decorated with `meter`.
    views: tuple[tuple[str, Policy], ...] = ()
    #: The middleware around the application, None if only a policy is checked.
    middleware: OpenMeterMiddleware | None = None

    def policies(self) -> Iterator[tuple[str | None, Policy]]:
        """Yield the name of each route or view, None for the others, and its policy."""
        if not any(rule.is_every_other for rule, _ in self.policy.route_policies):
            yield None, self.policy
        for rule, policy in self.policy.route_policies:
            if policy is not None:
                yield repr(rule.text), policy
        for view, policy in self.views:
            yield f"view {view!r}", policy

    def send(self) -> Sent:
        """Send a test event.

        :raises DeliveryError: if OpenMeter does not take it.
        """
        meter = Meter(MARK, b'{"total":1}')
        request_id = f"check-{secrets.token_hex(12)}"
        (encoded,) = encode_events(
            [meter],
            request_id=request_id,
            subject=MARK,
            source=self.policy.event_source,
        )
        self.client.ingest([encoded])
        return Sent(f"{request_id}:{MARK}", encoded, time.monotonic())


class Check(NamedTuple):
    """A check, and its conditions."""

    run: Callable[[Situation], Iterable[Finding]]
    #: Name of its finding if it cannot run.
    name: str
    #: True if it needs answers of the server.
    needs_answer: bool = False
    #: True if it needs the test event in OpenMeter.
    needs_event: bool = False

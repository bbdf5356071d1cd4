"""Findings of ``check``: severity, printing, and the situation that is checked."""

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
    from openmeter_wsgi.policy import Policy

#: The type and the subject of every event that a check sends. No meter counts the
#: one, nobody pays for the other.
MARK = "openmeter_wsgi.check"
#: The answers to a key that may not, of all those that a list may get.
_NOT_ALLOWED = (401, 403)


class Severity(enum.StrEnum):
    """The severity of a finding.

    NOTE is no problem, but worth knowing. UNKNOWN is no failure: the check could not
    run.
    """

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    FAILURE = "failure"
    UNKNOWN = "unknown"


class Finding(NamedTuple):
    """One thing that was looked at."""

    name: str
    severity: Severity
    found: str
    #: What to do about it, None if that is nothing.
    remedy: str | None = None
    #: A command for the shell that does it.
    command: str | None = None


def ok(name: str, found: str, remedy: str | None = None) -> Finding:
    """Return a finding without a problem; *remedy* is advice."""
    return Finding(name, Severity.OK, found, remedy)


def note(name: str, found: str, remedy: str | None = None) -> Finding:
    """Return a finding that is no problem, but worth knowing."""
    return Finding(name, Severity.NOTE, found, remedy)


def warning(name: str, found: str, remedy: str) -> Finding:
    """Return a finding that can lose usage, or bill it twice, in some situations."""
    return Finding(name, Severity.WARNING, found, remedy)


def failure(name: str, found: str, remedy: str) -> Finding:
    """Return a finding for which usage is billed wrongly, or not at all."""
    return Finding(name, Severity.FAILURE, found, remedy)


def unknown(name: str, found: str, remedy: str | None = None) -> Finding:
    """Return a finding that could not be made, with the reason."""
    return Finding(name, Severity.UNKNOWN, found, remedy)


def unanswered(name: str, error: NoAnswer, may: str) -> Finding:
    """Return a finding for an answer that is missing; *may* is a permission."""
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
#: Their words have a plural.
_COUNTED = {Severity.FAILURE, Severity.WARNING, Severity.NOTE}
_WIDTH = max(map(len, Severity))
_NAME_WIDTH = 20
#: Wider lines are hard to read.
_MAX_WIDTH = 110


def print_findings(
    findings: Iterable[Finding], url: str | None, *, as_json: bool
) -> list[Finding]:
    """Print findings, for people as they come, and return them."""
    if as_json:
        told = list(findings)
        print_json({"api_url": url, "findings": [one._asdict() for one in told]})
        return told
    if sys.stdout.isatty():
        return _show(findings, url)
    told = []
    for finding in findings:
        told.append(finding)
        _print_lines(finding)
    return told


def _print_lines(finding: Finding) -> None:
    severity = f"{finding.severity:{_WIDTH}}"
    click.echo(f"{severity}  {printable(finding.name)}: {printable(finding.found)}")
    if finding.remedy:
        click.echo(f"{'':{_WIDTH}}  → {printable(finding.remedy)}")
    if finding.command:
        click.echo(printable(finding.command))


def _show(findings: Iterable[Finding], url: str | None) -> list[Finding]:
    console = Console(markup=False, highlight=False)
    console.width = min(console.width, _MAX_WIDTH)
    began = time.monotonic()
    console.print(Text(f"Checking {url or 'the configuration'}", "bold"))
    told: list[Finding] = []
    unknowns: list[Finding] = []
    for finding in findings:
        told.append(finding)
        if unknowns and finding.found != unknowns[0].found:
            _show_alike(unknowns, console)
        if finding.severity is Severity.UNKNOWN:
            unknowns.append(finding)
        else:
            _show_one(finding, console)
    _show_alike(unknowns, console)
    console.print(_summary(told, time.monotonic() - began))
    return told


def _show_alike(unknowns: list[Finding], console: Console) -> None:
    """Show findings that are unknown for one reason as one."""
    if unknowns:
        names = ", ".join(finding.name for finding in unknowns)
        _show_one(unknowns[0]._replace(name=names), console)
        unknowns.clear()


def _show_one(finding: Finding, console: Console) -> None:
    symbol, style = _SYMBOLS[finding.severity]
    said = Text(printable(finding.found))
    if finding.remedy:
        said.append(f"\n→ {printable(finding.remedy)}", "bold")
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=1)
    table.add_column(width=_NAME_WIDTH, overflow="fold")
    table.add_column(overflow="fold")
    table.add_row(Text(symbol, style), Text(printable(finding.name)), said)
    console.print(table)
    if finding.command:
        # Not wrapped: it is copied.
        console.print(Text(printable(finding.command), "bold"), soft_wrap=True)


def _summary(told: list[Finding], seconds: float) -> Text:
    counts = Counter(finding.severity for finding in told)
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
    """A marked event that OpenMeter has taken."""

    id: str
    #: As it was sent, and is sent again.
    encoded: bytes
    #: The monotonic time at which it was taken.
    at: float


@dataclasses.dataclass
class Situation:
    """The object of the checks; each may use the results of those before it."""

    policy: Policy
    client: OpenMeterClient
    listing: Listing
    #: Wait so many seconds, and say on a terminal what for.
    wait: Callable[[float, str], None]
    #: Whether the server has answered anything at all.
    answers: bool = False
    #: The marked event, once OpenMeter has taken it.
    sent: Sent | None = None
    #: The directory of the server in the spool, if there can be one.
    spool: Path | None = None
    #: The policies of views that are decorated with `meter`, by the name of the view.
    views: tuple[tuple[str, Policy], ...] = ()

    def policies(self) -> Iterator[tuple[str | None, Policy]]:
        """Yield every policy that governs requests, with its route or view."""
        if not any(rule.is_every_other for rule, _ in self.policy.route_policies):
            yield None, self.policy
        for rule, policy in self.policy.route_policies:
            if policy is not None:
                yield repr(rule.text), policy
        for view, policy in self.views:
            yield f"view {view!r}", policy

    def send(self) -> Sent:
        """Send a marked event.

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
    """A line of the table of checks."""

    look: Callable[[Situation], Iterable[Finding]]
    #: What its finding is called where it cannot look.
    name: str
    #: Whether it looks at what the server says, which must answer.
    needs_answer: bool = False
    #: Whether it looks at the marked event, which OpenMeter must have taken.
    needs_event: bool = False

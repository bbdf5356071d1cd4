"""How findings are shown: as they come, for people, for pipes, for programs."""

from __future__ import annotations

import sys
import time
from collections import Counter
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from openmeter_wsgi.commands.checks.findings import Severity
from openmeter_wsgi.commands.output import print_json, printable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from openmeter_wsgi.commands.checks.findings import Finding

_SYMBOLS = {
    Severity.OK: ("✓", "green"),
    Severity.WARNING: ("!", "bold yellow"),
    Severity.FAILURE: ("✗", "bold red"),
    Severity.UNKNOWN: ("?", "cyan"),
}
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
    """Show what could not be found out for one reason as one finding."""
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


def _summary(told: list[Finding], seconds: float) -> Text:
    counts = Counter(finding.severity for finding in told)
    summary = Text()
    for severity in (Severity.FAILURE, Severity.WARNING, Severity.UNKNOWN, Severity.OK):
        if number := counts[severity]:
            word = severity.value
            if severity in {Severity.FAILURE, Severity.WARNING} and number > 1:
                word += "s"
            summary.append(" · " if summary else "")
            summary.append(f"{number} {word}", _SYMBOLS[severity][1])
    return summary.append(f" · {seconds:.1f} s", "dim")

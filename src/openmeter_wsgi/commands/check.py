"""``openmeter-wsgi check``: is everything there for usage to be billed, and right?"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from openmeter_wsgi.client import OpenMeterClient
from openmeter_wsgi.commands.asking import Listing
from openmeter_wsgi.commands.checks.billing import look_at_dry_run, look_at_status_codes
from openmeter_wsgi.commands.checks.event import look_at_event
from openmeter_wsgi.commands.checks.findings import (
    Check,
    Finding,
    Severity,
    Situation,
    failure,
    unknown,
)
from openmeter_wsgi.commands.checks.meters import look_at_meters
from openmeter_wsgi.commands.checks.repetition import look_at_repetition
from openmeter_wsgi.commands.checks.server import look_at_clock, look_at_server
from openmeter_wsgi.commands.checks.spool_directory import look_at_spool
from openmeter_wsgi.commands.output import pause, print_json, printable
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Iterator

#: In this order: what a check needs is found out by those before it.
CHECKS = (
    Check(look_at_dry_run, "dry run"),
    Check(look_at_status_codes, "billed status codes"),
    Check(look_at_spool, "spool directory"),
    Check(look_at_server, "server"),
    Check(look_at_clock, "clock"),
    Check(look_at_event, "event", needs_event=True, needs_listing=True),
    Check(look_at_meters, "meters", needs_listing=True),
)
REPETITION = Check(
    look_at_repetition, "deduplication", needs_event=True, needs_listing=True
)

_EXIT_CODES = """\b
Exit codes:
  0  nothing fails; there may be warnings, and what could not be found out
  2  wrong usage, or a configuration that cannot work
  3  something fails"""
_STYLES = {
    Severity.OK: "green",
    Severity.WARNING: "yellow",
    Severity.FAILURE: "bold red",
    Severity.UNKNOWN: "cyan",
}
_WIDTH = max(map(len, Severity))


@click.command("check", epilog=_EXIT_CODES)
@click.option(
    "--config",
    "config",
    type=click.Path(),
    metavar="FILE",
    help="TOML or JSON file with options; OPENMETER_… variables outdo it.",
)
@click.option(
    "--dedupe-check/--no-dedupe-check",
    "repeat",
    default=True,
    help="Send an event twice, to see whether OpenMeter drops the second.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(
    context: click.Context, config: str | None, repeat: bool, as_json: bool
) -> None:
    """Say whether usage would be billed, and right; and what to do if not.

    Up to three events are sent, of the type and subject "openmeter_wsgi.check",
    which no meter counts and nobody pays for. Run it with the configuration, and as
    the user, of the application.
    """
    try:
        policy = _policy(context, config)
    except ConfigError as error:
        remedy = "see the fields of Policy, which say what each option takes"
        problems = [failure("configuration", said, remedy) for said in error.problems]
        _print(problems, None, as_json=as_json)
        context.exit(2)
    checks = (*CHECKS, REPETITION) if repeat else CHECKS
    findings = _print(look(policy, checks), policy.api_url, as_json=as_json)
    if any(finding.severity is Severity.FAILURE for finding in findings):
        context.exit(3)


def _policy(context: click.Context, config: str | None) -> Policy:
    # A framework's own command has the policy of its settings.
    if context.obj is not None:
        policy: Policy = context.obj()
        return policy
    return Policy.from_env() if config is None else Policy.from_file(config)


def look(policy: Policy, checks: tuple[Check, ...]) -> Iterator[Finding]:
    """Yield what *checks* find under *policy*, as they find it."""
    client = OpenMeterClient(
        url=policy.api_url,
        flavor=policy.api_flavor,
        key=policy.key,
        timeout=policy.request_timeout,
    )
    with Listing(policy) as listing:
        situation = Situation(policy, client, listing, pause)
        try:
            for check in checks:
                if reason := _obstacle(check, situation):
                    yield unknown(check.name, reason)
                else:
                    yield from check.look(situation)
        finally:
            client.close()


def _obstacle(check: Check, situation: Situation) -> str | None:
    """Say why a check cannot look, None if it can."""
    flavor = situation.policy.api_flavor
    if check.needs_listing and flavor != "v1":
        return f"only v1 lists what has arrived, and api_flavor is {flavor!r}"
    if check.needs_event and situation.sent is None:
        return "OpenMeter has not taken the event that this looks at"
    return None


def _print(
    findings: Iterator[Finding] | list[Finding], url: str | None, *, as_json: bool
) -> list[Finding]:
    """Print findings, for people as they come, and return them."""
    told = []
    console = Console(markup=False, highlight=False)
    for finding in findings:
        told.append(finding)
        if not as_json:
            _print_one(finding, console)
    if as_json:
        print_json({"api_url": url, "findings": [one._asdict() for one in told]})
    return told


def _print_one(finding: Finding, console: Console) -> None:
    label = f"{finding.severity:{_WIDTH}}"
    said = [f"{printable(finding.name)}: {printable(finding.found)}"]
    if finding.remedy and finding.severity is not Severity.OK:
        said.append(f"→ {printable(finding.remedy)}")
    if not sys.stdout.isatty():
        click.echo(f"{label}  {said[0]}")
        for line in said[1:]:
            click.echo(f"{'':{_WIDTH}}  {line}")
        return
    table = Table.grid(padding=(0, 2))
    table.add_row(Text(label, _STYLES[finding.severity]), Text("\n".join(said)))
    console.print(table)

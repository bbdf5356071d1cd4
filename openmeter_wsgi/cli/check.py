"""``openmeter-wsgi check``: validate the configuration against the server."""

from __future__ import annotations

import sys
import time
from collections import Counter
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from openmeter_wsgi.cli.arguments import open_listing, options_given, server_options
from openmeter_wsgi.cli.check_configuration import (
    NoApplication,
    load_application,
    look_at_dry_run,
    look_at_layers,
    look_at_spool,
    look_at_status_codes,
    look_at_views,
    middlewares,
    problems_of,
    warnings_told,
)
from openmeter_wsgi.cli.check_meters import look_at_features, look_at_meters
from openmeter_wsgi.cli.check_quotas import look_at_quotas
from openmeter_wsgi.cli.check_routes import look_at_rules, look_at_unmatched
from openmeter_wsgi.cli.check_server import (
    look_at_clock,
    look_at_event,
    look_at_repetition,
    look_at_server,
)
from openmeter_wsgi.cli.exits import ANSWER_IS_NO, exit_codes
from openmeter_wsgi.cli.findings import (
    Check,
    Finding,
    Severity,
    Situation,
    failure,
    unknown,
)
from openmeter_wsgi.cli.output import busy, print_json, printable
from openmeter_wsgi.delivery.client import OpenMeterClient
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


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


#: In this order: what a check needs is found out by those before it.
CHECKS = (
    Check(look_at_dry_run, "dry run"),
    Check(look_at_status_codes, "billed status codes"),
    Check(look_at_unmatched, "routes"),
    Check(look_at_spool, "spool directory"),
    Check(look_at_quotas, "quotas"),
    Check(look_at_server, "server"),
    Check(look_at_clock, "clock", needs_answer=True),
    Check(look_at_event, "event", needs_event=True),
    Check(look_at_meters, "meters", needs_answer=True),
    Check(look_at_features, "features", needs_answer=True),
)
REPETITION = Check(look_at_repetition, "deduplication", needs_event=True)
_EXIT_CODES = exit_codes(
    _0="nothing fails; there may be warnings, and what could not be found out",
    _3="something fails",
)


@click.command("check", epilog=_EXIT_CODES)
@server_options
@click.option(
    "--app",
    "app_name",
    metavar="MODULE:APP",
    help="Check this WSGI application and the policy it is wrapped in; with () at the "
    "end what makes one.",
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
    context: click.Context,
    policy_file: str | None,
    api_url: str | None,
    app_name: str | None,
    repeat: bool,
    as_json: bool,
) -> None:
    """Say whether usage would be billed, and right; and what to do if not.

    Up to three events are sent, of the type and subject "openmeter_wsgi.check",
    which no meter counts and nobody pays for. Run it with the configuration, and as
    the user, of the application.
    """
    if app_name and (policy_file or api_url):
        raise click.UsageError("--app has its own policy: leave the other one out.")
    try:
        with warnings_told() as before:
            policy, found = _configured(policy_file, api_url, app_name, context.obj)
    except (ConfigError, NoApplication) as error:
        print_findings(_problems(error), None, as_json=as_json)
        context.exit(2)
    findings = (
        finding
        for part in (before, found, look(policy, repeat=repeat) if policy else ())
        for finding in part
    )
    told = print_findings(findings, policy.api_url if policy else None, as_json=as_json)
    if any(finding.severity is Severity.FAILURE for finding in told):
        context.exit(ANSWER_IS_NO)


def look(
    policy: Policy, checks: tuple[Check, ...] = CHECKS, *, repeat: bool = False
) -> Iterator[Finding]:
    """Yield what is found under *policy*, as it is found.

    With *repeat* an event is sent twice, which takes some seconds.
    """
    client = OpenMeterClient(
        url=policy.api_url,
        flavor=policy.api_flavor,
        key=policy.key,
        timeout=policy.request_timeout,
    )
    with open_listing(policy) as listing:
        situation = Situation(policy, client, listing, _waiting(lambda _: None))
        try:
            for check in (*checks, REPETITION) if repeat else checks:
                yield from _found(check, situation)
        finally:
            client.close()


def _found(check: Check, situation: Situation) -> list[Finding]:
    """Return what one check finds; meanwhile a terminal shows what it looks at."""
    if reason := _obstacle(check, situation):
        return [unknown(check.name, reason)]
    with busy(f"Looking at: {check.name}") as say:
        situation.wait = _waiting(say)
        return list(check.look(situation))


def _waiting(say: Callable[[str], None]) -> Callable[[float, str], None]:
    def wait(seconds: float, title: str) -> None:
        say(title)
        time.sleep(seconds)

    return wait


def _obstacle(check: Check, situation: Situation) -> str | None:
    """Say why a check cannot look, None if it can."""
    if (check.needs_answer or check.needs_event) and not situation.answers:
        return "not looked at: the server does not answer"
    if check.needs_event and situation.sent is None:
        return "OpenMeter has not taken the event that this looks at"
    return None


def _configured(
    file: str | None,
    url: str | None,
    app_name: str | None,
    policy_of_framework: Callable[[], Policy] | None,
) -> tuple[Policy | None, list[Finding]]:
    """Return the policy that is checked, and what is found of the application.

    :raises ConfigError: if the policy is none.
    :raises NoApplication: if there is no application of this name.
    """
    if policy_of_framework is not None:
        # A framework's own command has the policy of its settings.
        return policy_of_framework(), []
    if app_name is not None:
        app = load_application(app_name)
        found = middlewares(app)
        policy = found[0].policy if found else None
        findings = [*look_at_layers(app_name, found), *look_at_views(app)]
        return policy, [*findings, *(look_at_rules(found[0]) if found else ())]
    options = options_given(api_url=url)
    if file is None:
        return Policy.from_env(**options), []
    return Policy.from_file(file, **options), []


def _problems(error: ConfigError | NoApplication) -> list[Finding]:
    cause = error if isinstance(error, ConfigError) else error.__cause__
    if isinstance(cause, ConfigError):
        return problems_of(cause)
    remedy = "name it as the server does: MODULE:APP, importable from here"
    return [failure("application", str(error), remedy)]

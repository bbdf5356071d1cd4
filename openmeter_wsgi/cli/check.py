"""``openmeter-wsgi check``: validate the configuration against the server."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, NamedTuple

import click

from openmeter_wsgi.cli.check_configuration import (
    NoApplication,
    decorated_views,
    load_application,
    look_at_dry_run,
    look_at_event_source,
    look_at_layers,
    look_at_quotas,
    look_at_rules,
    look_at_spool,
    look_at_status_codes,
    look_at_unmatched,
    look_at_views,
    middlewares,
    problems_of,
    warnings_told,
)
from openmeter_wsgi.cli.check_meters import look_at_features, look_at_meters
from openmeter_wsgi.cli.check_server import (
    look_at_clock,
    look_at_event,
    look_at_repetition,
    look_at_server,
)
from openmeter_wsgi.cli.check_status_202 import (
    look_at_accepted,
    look_at_accepting_views,
)
from openmeter_wsgi.cli.common import (
    ANSWER_IS_NO,
    busy,
    exit_codes,
    open_listing,
    options_given,
    server_options,
)
from openmeter_wsgi.cli.findings import (
    Check,
    Finding,
    Severity,
    Situation,
    failure,
    print_findings,
    unknown,
)
from openmeter_wsgi.delivery.client import OpenMeterClient
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


#: In this order: what a check needs is found out by those before it.
CHECKS = (
    Check(look_at_dry_run, "dry run"),
    Check(look_at_status_codes, "billed status codes"),
    Check(look_at_unmatched, "routes"),
    Check(look_at_accepted, "accepted work"),
    Check(look_at_event_source, "event source"),
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
    help="Check this WSGI application and the policy that it is wrapped in. With () at "
    "the end the name is a function that returns the application.",
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
    """Validate the configuration against the server; each problem has a remedy.

    Up to three events are sent, of the type and subject "openmeter_wsgi.check", which
    no meter counts. Run it with the configuration, and as the user, of the application.
    """
    if app_name and (policy_file or api_url):
        raise click.UsageError("--app has its own policy: leave the other one out.")
    try:
        with warnings_told() as before:
            checked = _checked(policy_file, api_url, app_name, context.obj)
    except (ConfigError, NoApplication) as error:
        print_findings(_problems(error), None, as_json=as_json)
        context.exit(2)
    policy = checked.policy
    found = look(policy, repeat=repeat, views=checked.views) if policy else ()
    told = print_findings(
        itertools.chain(before, checked.findings, found),
        policy.api_url if policy else None,
        as_json=as_json,
    )
    if any(finding.severity is Severity.FAILURE for finding in told):
        context.exit(ANSWER_IS_NO)


def look(
    policy: Policy,
    checks: tuple[Check, ...] = CHECKS,
    *,
    repeat: bool = False,
    views: Iterable[tuple[str, Policy]] = (),
) -> Iterator[Finding]:
    """Run the checks of *policy* and of those of *views*; yield each finding at once.

    With *repeat* an event is sent twice, which takes some seconds.
    """
    client = OpenMeterClient(
        url=policy.api_url,
        flavor=policy.api_flavor,
        key=policy.key,
        timeout=policy.request_timeout,
    )
    with open_listing(policy) as listing:
        situation = Situation(
            policy, client, listing, _waiting(lambda _: None), views=tuple(views)
        )
        try:
            for check in (*checks, REPETITION) if repeat else checks:
                yield from _found(check, situation)
        finally:
            client.close()


def _found(check: Check, situation: Situation) -> list[Finding]:
    """Run one check, and show its name on a terminal meanwhile."""
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
    """Return the reason for which a check cannot run, None if it can."""
    if (check.needs_answer or check.needs_event) and not situation.answers:
        return "not looked at: the server does not answer"
    if check.needs_event and situation.sent is None:
        return "OpenMeter has not taken the event that this looks at"
    return None


class FrameworkProject(NamedTuple):
    """A project of a framework, whose own command runs this one."""

    #: Returns the policy of its settings.
    policy: Callable[[], Policy]
    #: Yields what is found in its settings.
    findings: Callable[[], Iterable[Finding]] = tuple
    #: Its application as ``MODULE:APP``, None where no setting names it.
    application: str | None = None


class _Checked(NamedTuple):
    """A policy to check, with the findings of loading it."""

    policy: Policy | None
    findings: list[Finding]
    views: list[tuple[str, Policy]]


def _checked(
    file: str | None,
    url: str | None,
    app_name: str | None,
    project: FrameworkProject | None,
) -> _Checked:
    """Return the policy that is checked.

    :raises ConfigError: if the policy is none.
    :raises NoApplication: if there is no application of this name.
    """
    if project is not None:
        return _checked_project(project)
    if app_name is not None:
        return _checked_application(app_name)
    options = options_given(api_url=url)
    if file is None:
        return _Checked(Policy.from_env(**options), [], [])
    return _Checked(Policy.from_file(file, **options), [], [])


def _checked_project(project: FrameworkProject) -> _Checked:
    policy = project.policy()
    findings = list(project.findings())
    if project.application is None:
        return _Checked(policy, findings, [])
    try:
        checked = _checked_application(project.application)
    except NoApplication as error:
        return _Checked(policy, [*findings, *_problems(error)], [])
    findings += checked.findings
    return _Checked(checked.policy or policy, findings, checked.views)


def _checked_application(name: str) -> _Checked:
    app = load_application(name)
    found = middlewares(app)
    findings = [*look_at_layers(name, app, found), *look_at_views(app)]
    if not found:
        return _Checked(None, findings, [])
    views, problems = decorated_views(found[0])
    findings += [*look_at_rules(found[0]), *problems]
    findings += look_at_accepting_views(found[0])
    return _Checked(found[0].policy, findings, views)


def _problems(error: ConfigError | NoApplication) -> list[Finding]:
    cause = error if isinstance(error, ConfigError) else error.__cause__
    if isinstance(cause, ConfigError):
        return problems_of(cause)
    remedy = "name it as the server does: MODULE:APP, importable from here"
    return [failure("application", str(error), remedy)]

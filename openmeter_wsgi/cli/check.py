"""``openmeter-wsgi check``: validate the configuration against the server.

The policy comes from variables, a file, an application (``--app``), or the settings of
a framework's project. `CHECKS` are run in order; each yields findings, which are
printed as they come.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, NamedTuple

import click

from openmeter_wsgi.cli.check_configuration import (
    NoApplication,
    check_decorators,
    check_dry_run,
    check_event_source,
    check_layers,
    check_quotas,
    check_spool,
    check_status_codes,
    load_application,
    logged_warnings,
    middlewares,
    problems_of,
)
from openmeter_wsgi.cli.check_meters import check_features, check_meters
from openmeter_wsgi.cli.check_routes import (
    check_rules,
    check_unmatched_paths,
    decorated_views,
)
from openmeter_wsgi.cli.check_server import (
    check_clock,
    check_deduplication,
    check_event,
    check_ingest,
)
from openmeter_wsgi.cli.check_status_202 import check_accepted_work
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
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from openmeter_wsgi.middleware import OpenMeterMiddleware


#: In order: a check may use the results of those before it.
CHECKS = (
    Check(check_dry_run, "dry run"),
    Check(check_status_codes, "billed status codes"),
    Check(check_unmatched_paths, "routes"),
    Check(check_accepted_work, "accepted work"),
    Check(check_event_source, "event source"),
    Check(check_spool, "spool directory"),
    Check(check_quotas, "quotas"),
    Check(check_ingest, "server"),
    Check(check_clock, "clock", needs_answer=True),
    Check(check_event, "event", needs_event=True),
    Check(check_meters, "meters", needs_answer=True),
    Check(check_features, "features", needs_answer=True),
)
DEDUPLICATION = Check(check_deduplication, "deduplication", needs_event=True)
_EXIT_CODES = exit_codes(
    _0="nothing fails; there may be warnings, and checks that could not be run",
    _3="something fails",
)


@click.command("check", epilog=_EXIT_CODES)
@server_options
@click.option(
    "--app",
    "app_name",
    metavar="MODULE:APP",
    help="Check this WSGI application and its own policy. With () at the end, APP is a "
    "function that returns the application.",
)
@click.option(
    "--dedupe-check/--no-dedupe-check",
    "checks_deduplication",
    default=True,
    help="Send one event twice, to check that OpenMeter drops the second.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(
    context: click.Context,
    policy_file: str | None,
    api_url: str | None,
    app_name: str | None,
    checks_deduplication: bool,
    as_json: bool,
) -> None:
    """Validate the configuration against the server; each problem has a remedy.

    Run it with the configuration of the application, and as its user. It sends up to
    three events of the type and subject "openmeter_wsgi.check", which no meter counts.
    """
    if app_name and (policy_file or api_url):
        raise click.UsageError(
            "--app has a policy of its own: leave --config and --api-url out."
        )
    try:
        with logged_warnings() as warned:
            loaded = _load(policy_file, api_url, app_name, context.obj)
    except (ConfigError, NoApplication) as error:
        print_findings(_problems(error), None, as_json=as_json)
        context.exit(2)
    policy = loaded.policy
    checked: Iterable[Finding] = ()
    if policy is not None:
        checks = (*CHECKS, DEDUPLICATION) if checks_deduplication else CHECKS
        checked = run_checks(
            policy, checks, views=loaded.views, middleware=loaded.middleware
        )
    findings = print_findings(
        itertools.chain(warned, loaded.findings, checked),
        policy.api_url if policy else None,
        as_json=as_json,
    )
    if any(finding.severity is Severity.FAILURE for finding in findings):
        context.exit(ANSWER_IS_NO)


def run_checks(
    policy: Policy,
    checks: tuple[Check, ...] = CHECKS,
    *,
    views: Iterable[tuple[str, Policy]] = (),
    middleware: OpenMeterMiddleware | None = None,
) -> Iterator[Finding]:
    """Run *checks* and yield each finding at once.

    :param views: the names and policies of views with a policy of their own.
    :param middleware: the middleware around the application, if one is checked.
    """
    client = OpenMeterClient(
        url=policy.api_url,
        flavor=policy.api_flavor,
        key=policy.key,
        timeout=policy.request_timeout,
    )
    with open_listing(policy) as listing:
        situation = Situation(
            policy,
            client,
            listing,
            _waiting(lambda _: None),
            views=tuple(views),
            middleware=middleware,
        )
        try:
            for check in checks:
                yield from _run(check, situation)
        finally:
            client.close()


def _run(check: Check, situation: Situation) -> list[Finding]:
    """Run one check; a terminal shows its name meanwhile."""
    if obstacle := _obstacle(check, situation):
        return [unknown(check.name, obstacle)]
    with busy(f"Checking: {check.name}") as set_title:
        situation.wait = _waiting(set_title)
        return list(check.run(situation))


def _waiting(set_title: Callable[[str], None]) -> Callable[[float, str], None]:
    def wait(seconds: float, title: str) -> None:
        set_title(title)
        time.sleep(seconds)

    return wait


def _obstacle(check: Check, situation: Situation) -> str | None:
    """Return the reason why a check cannot run, None if it can."""
    if (check.needs_answer or check.needs_event) and not situation.server_answers:
        return "not checked: the server does not answer"
    if check.needs_event and situation.sent is None:
        return "not checked: OpenMeter did not take the test event"
    return None


class FrameworkProject(NamedTuple):
    """A project of a framework, whose own command runs ``check``."""

    #: Returns the policy of its settings.
    policy: Callable[[], Policy]
    #: Yields the findings of its settings.
    findings: Callable[[], Iterable[Finding]] = tuple
    #: Its application as ``MODULE:APP``, None if no setting names it.
    application: str | None = None


class _Loaded(NamedTuple):
    """A policy to check, and the findings while it was loaded."""

    policy: Policy | None
    findings: Sequence[Finding] = ()
    views: Sequence[tuple[str, Policy]] = ()
    middleware: OpenMeterMiddleware | None = None


def _load(
    file: str | None,
    url: str | None,
    app_name: str | None,
    project: FrameworkProject | None,
) -> _Loaded:
    """Return the policy to check.

    :raises ConfigError: if the configuration is invalid.
    :raises NoApplication: if there is no application of this name.
    """
    if project is not None:
        return _load_project(project)
    if app_name is not None:
        return _load_application(app_name)
    options = options_given(api_url=url)
    if file is None:
        return _Loaded(Policy.from_env(**options))
    return _Loaded(Policy.from_file(file, **options))


def _load_project(project: FrameworkProject) -> _Loaded:
    policy = project.policy()
    findings = list(project.findings())
    if project.application is None:
        return _Loaded(policy, findings)
    try:
        loaded = _load_application(project.application)
    except NoApplication as error:
        return _Loaded(policy, [*findings, *_problems(error)])
    return loaded._replace(
        policy=loaded.policy or policy, findings=[*findings, *loaded.findings]
    )


def _load_application(name: str) -> _Loaded:
    app = load_application(name)
    layers = middlewares(app)
    findings = [*check_layers(name, app, layers), *check_decorators(app)]
    if not layers:
        return _Loaded(None, findings)
    middleware = layers[0]
    views, problems = decorated_views(middleware)
    findings += [*check_rules(middleware), *problems]
    return _Loaded(middleware.policy, findings, views, middleware)


def _problems(error: ConfigError | NoApplication) -> list[Finding]:
    if isinstance(error, ConfigError):
        return problems_of(error)
    if isinstance(error.__cause__, ConfigError):
        return problems_of(error.__cause__)
    return [failure("application", str(error), error.remedy)]

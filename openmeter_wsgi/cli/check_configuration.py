"""Checks of the configuration, the application, its routes and the spool directory."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import logging
import os
import re
import secrets
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openmeter_wsgi.cli import kafka_retention
from openmeter_wsgi.cli.common import size
from openmeter_wsgi.cli.findings import failure, note, ok, unknown, warning
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.framework_routes import (
    OPTIONS_ATTRIBUTE,
    handlers_of,
    layers_of,
    misplaced_decorators,
    served_routes,
    view_class_of,
)
from openmeter_wsgi.lock import ELECTION, holder
from openmeter_wsgi.log import PREFIX
from openmeter_wsgi.middleware import OpenMeterMiddleware
from openmeter_wsgi.policy import DEFAULT_SOURCE, Policy, overriding_options
from openmeter_wsgi.spool import server_directories
from openmeter_wsgi.spool.files import file_system, prepare_directory
from openmeter_wsgi.spool.watermark import backlog
from openmeter_wsgi.status_codes import StatusCodes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openmeter_wsgi.cli.findings import Finding, Situation
    from openmeter_wsgi.framework_routes import ServedRoute
    from openmeter_wsgi.routes import RouteRule

_REMEDIES = {
    "api_url": "write scheme, host and port alone, such as http://127.0.0.1:8888",
    "api_key": "set OPENMETER_API_KEY to a key that may ingest events",
    "api_key_file": "name one file that holds the key and nothing else",
    "spool_dir": "name a directory of the application's own, mode 0700",
}

#: The loggers that warn of a configuration which nothing else here looks at.
_WARNS = {
    "openmeter_wsgi.options": "write it as the option is called",
    "openmeter_wsgi.measures": "name the whole path, such as $.usage.total_tokens",
}


def problems_of(error: ConfigError) -> list[Finding]:
    """Return a failure for each problem of a configuration."""
    return [failure("configuration", said, _remedy(said)) for said in error.problems]


@contextlib.contextmanager
def warnings_told() -> Iterator[list[Finding]]:
    """Collect the warnings that are logged while a configuration is read."""
    found: list[Finding] = []
    package = logging.getLogger("openmeter_wsgi")
    handler = _Collector(found)
    package.addHandler(handler)
    try:
        yield found
    finally:
        package.removeHandler(handler)


class _Collector(logging.Handler):
    def __init__(self, found: list[Finding]) -> None:
        super().__init__()
        self._found = found

    def emit(self, record: logging.LogRecord) -> None:
        # What the others say has a check of its own.
        for name, remedy in _WARNS.items():
            if record.name == name and record.levelno >= logging.WARNING:
                said = record.getMessage().removeprefix(PREFIX)
                self._found.append(warning("configuration", said, remedy))


def _remedy(problem: str) -> str:
    option = problem.partition(":")[0].partition("[")[0]
    if option in _REMEDIES:
        return _REMEDIES[option]
    if option in {field.name for field in dataclasses.fields(Policy)}:
        return f"mend {option} where it is set: in the code, in the file or in " + (
            f"OPENMETER_{option.upper()}"
        )
    if problem.startswith("unknown option"):
        return "write an option as it is called; the fields of Policy are all there are"
    return "mend it where it is set"


_STATUS_CODES = "billed status codes"


def look_at_status_codes(situation: Situation) -> Iterator[Finding]:
    """Check that no policy bills errors."""
    told = set()
    for route, policy in situation.policies():
        finding = _look_at_status_codes(_STATUS_CODES, policy)
        if (finding.found, finding.severity) not in told:
            told.add((finding.found, finding.severity))
            named = _STATUS_CODES if route is None else f"{_STATUS_CODES} of {route}"
            yield finding._replace(name=named)


def _look_at_status_codes(name: str, policy: Policy) -> Finding:
    codes = StatusCodes(policy.meter_on_status_codes)
    errors = [code for code in codes.codes if code[0] in "45"]
    if not errors:
        return ok(name, codes.text)
    return warning(
        name,
        f"{codes.text} bills errors too, {StatusCodes(errors).text}",
        "set meter_on_status_codes to the codes that customers shall pay for, such as "
        "'200-299', unless they shall pay for these errors",
    )


def look_at_dry_run(situation: Situation) -> Iterator[Finding]:
    """Check that events are sent."""
    if situation.policy.dry_run:
        yield warning(
            "dry run",
            "dry_run is set: usage is counted and logged, and none is sent",
            "leave dry_run out where customers shall be billed",
        )


def look_at_event_source(situation: Situation) -> Iterator[Finding]:
    """Report an event source that is the default."""
    source = situation.policy.event_source
    if source == DEFAULT_SOURCE:
        yield ok(
            "event source",
            f"{source!r}, the default",
            "set event_source to the name of this service, so that OpenMeter's list of "
            "events tells it from others",
        )


_QUOTAS = "quotas"


def look_at_quotas(situation: Situation) -> Iterator[Finding]:
    """Check that the processes of the application count quotas down together."""
    policy = situation.policy
    if not policy.entitlement_meters:
        return
    counted = ", ".join(map(repr, policy.entitlement_meters))
    if policy.redis_url is not None:
        yield ok(_QUOTAS, f"{counted}: counted by all processes that use the Redis")
    elif policy.spool_dir is not None:
        yield ok(_QUOTAS, f"{counted}: counted by all processes that use the spool")
    else:
        yield warning(
            _QUOTAS,
            f"{counted}: each process counts for itself, so two workers may serve a "
            "quota twice",
            "set spool_dir, or redis_url where the processes are on several hosts; "
            "leave it if there is one process",
        )


_APPLICATION = "application"


class NoApplication(Exception):
    """There is no WSGI application where one was named."""


def load_application(name: str) -> Any:
    """Return the application that *name* says, as ``module:app`` or ``module:make()``.

    A module is looked for in the working directory, too, as servers do.

    :raises NoApplication: saying why there is none.
    """
    module_name, _, path = name.partition(":")
    made = path.endswith("()")
    path = path.removesuffix("()") or "application"
    sys.path.insert(0, os.getcwd())
    try:
        # What it prints must not be taken for what is found.
        with contextlib.redirect_stdout(sys.stderr):
            found: Any = importlib.import_module(module_name)
            for attribute in path.split("."):
                found = getattr(found, attribute)
            found = found() if made else found
    except (Exception, SystemExit) as error:
        # The application's own code may fail in any way.
        raise NoApplication(f"{name!r}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(found):
        raise NoApplication(f"{name!r}: expected a WSGI application, got {found!r}")
    return found


def middlewares(app: Any) -> list[OpenMeterMiddleware]:
    """Return every middleware of ours around *app*, the outermost first."""
    return [one for one in layers_of(app) if isinstance(one, OpenMeterMiddleware)]


def look_at_layers(
    name: str, app: Any, found: list[OpenMeterMiddleware]
) -> Iterator[Finding]:
    """Check that an application is metered, and once."""
    if _is_asgi(app):
        yield failure(
            _APPLICATION,
            f"{name} is an ASGI application, and this is WSGI middleware: what it "
            "serves is not metered",
            "serve the WSGI application; where only ASGI will do, send events from the "
            "handler with OpenMeter's SDK",
        )
        return
    if not found:
        yield failure(
            _APPLICATION,
            f"{name} is not wrapped in OpenMeterMiddleware: nothing is billed",
            _django_remedy(app)
            or "wrap it, and name what the server serves: the outermost application",
        )
        return
    if len(found) == 1:
        yield ok(_APPLICATION, f"{name} is metered, once")
        return
    outer, *inner = found
    said = f"{name} is wrapped {len(found)} times; the outermost alone bills"
    remedy = "remove the others; the options of single routes belong into routes"
    if all(each.policy == outer.policy for each in inner):
        yield warning(_APPLICATION, said, remedy)
    else:
        yield failure(
            _APPLICATION,
            f"{said}, and what the inner policy says is never billed",
            remedy,
        )


def _is_asgi(app: Any) -> bool:
    called = getattr(app, "__call__", None)  # noqa: B004 - it may be a coroutine
    return any(map(inspect.iscoroutinefunction, (app, called)))


def _django_remedy(app: Any) -> str | None:
    if not any(type(one).__module__.startswith("django.") for one in layers_of(app)):
        return None
    return (
        "in wsgi.py, write 'from openmeter_wsgi.django import get_wsgi_application' in "
        "place of Django's own function"
    )


def look_at_views(app: Any) -> Iterator[Finding]:
    """Report decorators of views that have no effect."""
    for template, name in misplaced_decorators(app):
        yield failure(
            f"view {name}",
            f"its @meter or @no_meter stands above the decorator that registers it for "
            f"{template}, and has no effect",
            "put it below, next to the function",
        )


def decorated_views(
    middleware: OpenMeterMiddleware,
) -> tuple[list[tuple[str, Policy]], list[Finding]]:
    """Return the policies of views with options of their own, and wrong options."""
    policies: list[tuple[str, Policy]] = []
    problems: list[Finding] = []
    seen = set()
    for route in served_routes(middleware.app):
        governing = policy_of_route(middleware.policy, route)
        # A router of the REST framework has several routes to one view.
        if governing is None or (id(route.view), id(governing)) in seen:
            continue
        seen.add((id(route.view), id(governing)))
        for name, options, remedy in _own_options(route.view):
            try:
                own = overriding_options(options)
                policy = dataclasses.replace(governing, routes=None, **own)
            except ConfigError as error:
                problems.append(failure(f"view {name!r}", str(error), remedy))
            else:
                policies.append((name, policy))
    return policies, list(dict.fromkeys(problems))


def policy_of_route(policy: Policy, route: ServedRoute) -> Policy | None:
    """Return the policy of a route, None if its requests are not metered."""
    governing: Policy | None = policy
    for rule, own in policy.route_policies:
        if rule.is_every_other:
            governing = own
        elif _may_match(rule, route):
            return own
    return governing


def _own_options(view: Any) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield options of a view, of its class and of its functions.

    Each with the name of the object that has them, and the remedy if they are wrong.
    """
    of_class = view_class_of(view)
    for function in (view, *handlers_of(view)):
        if options := getattr(function, OPTIONS_ATTRIBUTE, None):
            named = of_class if function is view and of_class else function
            remedy = "mend its @meter: its requests are billed as those of its route"
            yield getattr(named, "__qualname__", repr(named)), options, remedy
    # `HasEntitlements` reads this attribute of a view of the REST framework.
    features = getattr(of_class, "required_entitlements", None)
    if features and isinstance(features, str | list | tuple | set | frozenset):
        options = {"meter": None, "meters": None, "required_entitlements": features}
        remedy = "mend its required_entitlements: nobody has access to such a feature"
        yield of_class.__qualname__, options, remedy


_SPOOL = "spool directory"
_ROOT = Path("/")
_MEMORY = ("tmpfs", "ramfs")
_REMEDY = (
    "set spool_dir to a directory of the application's own, mode 0700, on a local file "
    "system"
)


def look_at_spool(situation: Situation) -> Iterator[Finding]:
    """Check the directory of the spool, its volume and its disk."""
    path = situation.policy.spool_dir
    if path is None:
        yield note(
            _SPOOL,
            "none: usage waits in memory, and a killed process loses it",
            "set OPENMETER_SPOOL_DIR to a directory of the application's own, to keep "
            "usage on disk",
        )
        return
    directory = Path(os.path.abspath(path))
    finding = _directory(directory)
    yield finding
    if finding.severity == "ok":
        server = server_directories.server_of_policy(situation.policy)
        own = server_directories.server_directory(directory, server)
        situation.spool = own
        yield from _look_for_room(situation.policy, own)
        yield from _look_for_sender(situation, own)
        yield from _look_for_old_events(own)
        yield from _look_for_orphans(directory, server)
    existing = directory if directory.exists() else directory.parent
    if existing.exists():
        yield from _look_beneath(existing)


def _look_for_sender(situation: Situation, directory: Path) -> Iterator[Finding]:
    if situation.policy.delivery != "ship":
        return
    name = "sender of the spool"
    if holder(directory / ELECTION) is None:
        yield warning(
            name,
            "delivery='ship' leaves it to another process, and none is there: usage "
            "waits in the spool",
            f"run openmeter-wsgi ship --spool-dir {directory.parent}",
        )
    else:
        yield ok(name, "there is one")


def _look_for_orphans(
    root: Path, server: server_directories.Server
) -> Iterator[Finding]:
    for orphan in server_directories.orphans(root, but=server):
        yield warning(
            "events of other servers",
            f"{orphan.events} events wait for {orphan.address}, and no running process "
            "sends there",
            f"start its application, or run openmeter-wsgi spool --spool-dir {root} "
            "assign --to URL",
        )


def _look_for_old_events(directory: Path) -> Iterator[Finding]:
    if problem := kafka_retention.oldest(backlog(directory).oldest_at):
        yield warning("age of the spool", problem, kafka_retention.REMEDY)


def _look_for_room(policy: Policy, directory: Path) -> Iterator[Finding]:
    may_take = max(policy.max_spool_bytes - backlog(directory).bytes, 0)
    free = shutil.disk_usage(directory.parent).free
    if free < may_take:
        yield warning(
            "spool disk",
            f"{size(free)} are free, and the spool may take {size(may_take)} more: in "
            "an outage the disk is full first, and usage then waits in memory",
            "make room on the disk, or set max_spool_bytes to what it has",
        )


def _directory(directory: Path) -> Finding:
    if not os.path.lexists(directory):
        # Not made here: it would belong to whoever runs this.
        return _absent(directory)
    owner = directory.lstat().st_uid
    if owner != os.geteuid():
        return failure(
            _SPOOL,
            f"{directory} belongs to user {owner}, this runs as {os.geteuid()}",
            "run this and the application as one user, who owns the directory",
        )
    try:
        prepare_directory(str(directory))
        _try_to_write(directory)
    except ConfigError as error:
        return failure(_SPOOL, str(error).removeprefix("spool_dir: "), _REMEDY)
    except OSError as error:
        return failure(
            _SPOOL,
            f"{directory} takes no file: {error.strerror}",
            "let the application's user write there, and see that the disk has room",
        )
    return ok(_SPOOL, f"{directory} on {file_system(directory) or 'a file system'}")


def _absent(directory: Path) -> Finding:
    if directory.parent.is_dir():
        return unknown(
            _SPOOL,
            f"{directory} is not there yet; the application makes it at its start",
            "check again when the application has run",
        )
    return failure(
        _SPOOL,
        f"{directory} cannot be made, {directory.parent} is no directory",
        f"make {directory.parent}, writable for the application's user",
    )


def _try_to_write(directory: Path) -> None:
    path = directory / f"check.{secrets.token_hex(8)}.new"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, b"\n")
    finally:
        os.close(fd)
        path.unlink()


def _look_beneath(directory: Path) -> Iterator[Finding]:
    name, kind = "spool volume", file_system(directory)
    if is_on_layer(directory, _ROOT):
        yield warning(
            name,
            f"{directory} is in the container itself: the next deployment deletes it, "
            "with all that is not delivered",
            "mount a volume there that outlives the container",
        )
    elif kind in _MEMORY:
        yield warning(
            name,
            f"{directory} is in memory ({kind}) and gone when the machine restarts",
            "set spool_dir to a directory on a disk",
        )
    else:
        yield ok(name, f"{directory} is not on a container's own layer")


def is_on_layer(directory: Path, root: Path) -> bool:
    """True if *directory* is on the writable layer of a container.

    Of an overlay *root* it is, unless something is mounted in between.
    """
    same = directory.stat().st_dev == root.stat().st_dev
    return same and file_system(root) == "overlay"


_NAME = "routes"
#: A variable in a template of any framework, and one that takes slashes, too.
_VARIABLE = re.compile(r"<[^<>]*>|\{[^{}]*\}")
_TAKES_SLASHES = re.compile(r"path|:re:|:filter|\*")
#: Characters of a regular expression that no path contains.
_REGULAR = re.compile(r"[()\\^$]")
#: A part of a template that takes any text, and one that takes several parts.
_ONE, _MANY = "\0", "\1"


def look_at_unmatched(situation: Situation) -> Iterator[Finding]:
    """Report paths that no rule matches and that need no entitlement."""
    policy = situation.policy
    asking = [
        rule.text
        for rule, own in policy.route_policies
        if own and own.required_entitlements
    ]
    unmetered = any(
        rule.is_every_other and own is None for rule, own in policy.route_policies
    )
    if unmetered and asking:
        yield warning(
            _NAME,
            f"{asking[0]!r} requires entitlements, and '*': None lets requests pass "
            "that no other rule matches: also a path that the framework serves by the "
            "same view and reads in another way than the rule",
            "let the view itself ask: @meter(required_entitlements=[…])",
        )


def look_at_rules(middleware: OpenMeterMiddleware) -> Iterator[Finding]:
    """Name each rule that no request of the application can match."""
    layers = layers_of(middleware.app, closures=False)
    if any(hasattr(layer, "mounts") for layer in layers):
        return  # of one application among several
    routes = served_routes(middleware.app, closures=False)
    for rule, _ in middleware.policy.route_policies if routes else ():
        if not (rule.is_every_other or any(_may_match(rule, each) for each in routes)):
            yield warning(
                _NAME,
                f"{rule.text!r} matches no route of the application, so it never "
                "governs a request",
                "write it as the application's route, or leave it out",
            )


def _may_match(rule: RouteRule, route: ServedRoute) -> bool:
    methods = {"GET" if method == "HEAD" else method for method in rule.methods}
    if methods and route.methods is not None and methods.isdisjoint(route.methods):
        return False
    return _overlap(_parts(rule.path), _parts(route.template))


def _parts(template: str) -> list[str]:
    """Return a template part by part: a text, `_ONE` or `_MANY`."""
    marked = _VARIABLE.sub(
        lambda found: _MANY if _TAKES_SLASHES.search(found[0]) else _ONE, template
    )
    return [_part(part) for part in marked.strip("/").split("/")]


def _part(text: str) -> str:
    if _MANY in text or text.startswith("*") or _REGULAR.search(text):
        return _MANY
    return _ONE if _ONE in text else text


def _overlap(left: list[str], right: list[str]) -> bool:
    """True if a path can match both."""
    if not left or not right:
        return left == right
    if _MANY in {left[0], right[0]}:
        several, other = (left, right) if left[0] == _MANY else (right, left)
        return any(_overlap(several[1:], other[n:]) for n in range(1, len(other) + 1))
    if left[0] != right[0] and _ONE not in {left[0], right[0]}:
        return False
    return _overlap(left[1:], right[1:])

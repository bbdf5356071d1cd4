"""Checks of the configuration, the application and the spool directory."""

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
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openmeter_wsgi.cli import kafka_retention
from openmeter_wsgi.cli.common import size
from openmeter_wsgi.cli.findings import failure, note, ok, unknown, warning
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.framework_routes import layers_of, misplaced_decorators
from openmeter_wsgi.lock import ELECTION, holder
from openmeter_wsgi.log import PREFIX
from openmeter_wsgi.middleware import OpenMeterMiddleware
from openmeter_wsgi.policy import DEFAULT_SOURCE, Policy
from openmeter_wsgi.spool import server_directories
from openmeter_wsgi.spool.files import file_system, prepare_directory
from openmeter_wsgi.spool.watermark import backlog
from openmeter_wsgi.status_codes import StatusCodes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openmeter_wsgi.cli.findings import Finding, Situation

#: Remedies for a wrong value, by option.
_REMEDIES = {
    "api_url": "write scheme, host and port alone, such as http://127.0.0.1:8888",
    "api_key": "set OPENMETER_API_KEY to a key that may ingest events",
    "api_key_file": "name one file that holds the key and nothing else",
    "spool_dir": "name a directory of the application's own, mode 0700",
}

#: Our options by the names that they have in other products.
_OPTIONS_BY_OTHER_NAMES = {
    "billable_statuses": "meter_on_status_codes",
    "billable_status_codes": "meter_on_status_codes",
    "status_codes": "meter_on_status_codes",
    "customer": "subject",
    "url": "api_url",
    "token": "api_key",
}

#: Remedies for logged warnings, by logger. Checks report the warnings of other loggers.
_REMEDIES_OF_WARNINGS = {
    "openmeter_wsgi.options": "write it as the option is called",
    "openmeter_wsgi.measures": "name the whole path, such as $.usage.total_tokens",
}


def problems_of(error: ConfigError) -> list[Finding]:
    """Return a failure for each problem of a configuration."""
    return [
        failure("configuration", problem, _remedy(problem))
        for problem in error.problems
    ]


@contextlib.contextmanager
def logged_warnings() -> Iterator[list[Finding]]:
    """Yield a list that collects the warnings logged within the block."""
    findings: list[Finding] = []
    package = logging.getLogger("openmeter_wsgi")
    handler = _Collector(findings)
    package.addHandler(handler)
    try:
        yield findings
    finally:
        package.removeHandler(handler)


class _Collector(logging.Handler):
    """A log handler that turns warnings into findings."""

    def __init__(self, findings: list[Finding]) -> None:
        super().__init__(logging.WARNING)
        self._findings = findings

    def emit(self, record: logging.LogRecord) -> None:
        if remedy := _REMEDIES_OF_WARNINGS.get(record.name):
            text = record.getMessage().removeprefix(PREFIX)
            self._findings.append(warning("configuration", text, remedy))


def _remedy(problem: str) -> str:
    option = problem.partition(":")[0].partition("[")[0]
    if option in _REMEDIES:
        return _REMEDIES[option]
    if option in {field.name for field in dataclasses.fields(Policy)}:
        return (
            f"correct {option} where it is set: in the code, in the file or in "
            f"OPENMETER_{option.upper()}"
        )
    if unknown_option := re.match("unknown option '([^']*)'", problem):
        if option := _OPTIONS_BY_OTHER_NAMES.get(unknown_option[1], ""):
            return f"write {option}"
        return (
            "look the name up in the list of options, docs/options.md, or leave it out"
        )
    return "correct it where it is set"


_STATUS_CODES = "billed status codes"


def check_status_codes(situation: Situation) -> Iterator[Finding]:
    """Check that no policy bills errors."""
    reported = set()
    for route, policy in situation.policies():
        codes = StatusCodes(policy.meter_on_status_codes)
        if codes not in reported:
            reported.add(codes)
            name = _STATUS_CODES if route is None else f"{_STATUS_CODES} of {route}"
            yield _check_codes(name, codes)


def _check_codes(name: str, codes: StatusCodes) -> Finding:
    errors = [code for code in codes.codes if code[0] in "45"]
    if not errors:
        return ok(name, codes.text)
    return warning(
        name,
        f"{codes.text} bills errors too, {StatusCodes(errors).text}",
        "set meter_on_status_codes to the codes that customers are to pay for, such as "
        "'200-299', unless they are to pay for these errors",
    )


def check_dry_run(situation: Situation) -> Iterator[Finding]:
    """Check that events are sent."""
    if situation.policy.dry_run:
        yield warning(
            "dry run",
            "dry_run is set: usage is counted and logged, but not sent",
            "leave dry_run out if customers are to be billed",
        )


def check_event_source(situation: Situation) -> Iterator[Finding]:
    """Report the default event source."""
    source = situation.policy.event_source
    if source == DEFAULT_SOURCE:
        yield ok(
            "event source",
            f"{source!r}, the default",
            "set event_source to the name of this service, so that OpenMeter's list of "
            "events shows which service sent an event",
        )


_QUOTAS = "quotas"


def check_quotas(situation: Situation) -> Iterator[Finding]:
    """Check that the processes of the application share the balances of quotas."""
    policy = situation.policy
    if not policy.entitlement_meters:
        return
    counted = ", ".join(map(repr, policy.entitlement_meters))
    if policy.redis_url is not None:
        yield ok(_QUOTAS, f"{counted}: counted by all processes that use this Redis")
    elif policy.spool_dir is not None:
        yield ok(_QUOTAS, f"{counted}: counted by all processes that use this spool")
    else:
        yield warning(
            _QUOTAS,
            f"{counted}: each process counts for itself, so two workers may grant a "
            "quota twice",
            "set spool_dir, or redis_url where the processes are on several hosts; "
            "leave it if there is one process",
        )


_APPLICATION = "application"


class NoApplication(Exception):
    """There is no WSGI application of the given name; with a remedy."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.remedy = remedy


def load_application(name: str) -> Any:
    """Return the application at ``module:app``, or that ``module:make()`` returns.

    Modules in the working directory are found as well, as servers do it.

    :raises NoApplication: if there is none.
    """
    module_name, _, path = name.partition(":")
    is_called = path.endswith("()")
    path = path.removesuffix("()") or "application"
    sys.path.insert(0, os.getcwd())
    try:
        # JSON is written to stdout: the application's own output must not mix with it.
        with contextlib.redirect_stdout(sys.stderr):
            app = _member(_imported(module_name), path)
            app = app() if is_called else app
    except NoApplication:
        raise
    except (Exception, SystemExit) as error:
        raise NoApplication(
            f"{name!r}: {type(error).__name__}: {error}{_place(error)}",
            "MODULE:APP was found, and its own code fails: correct that, or run check "
            "where it works: with the packages, variables and directory of the server",
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(app):
        raise NoApplication(
            f"{name!r}: expected a WSGI application, got {app!r}",
            "name the object that the server serves; a function that returns the "
            "application needs () at the end",
        )
    return app


def _imported(name: str) -> Any:
    """Import the module *name*."""
    try:
        if all(part.isidentifier() for part in name.split(".")):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Raised again for another name: a module that this one imports.
        if not f"{name}.".startswith(f"{error.name}."):
            raise
    raise NoApplication(
        f"there is no module {name!r}",
        "write MODULE:APP as for the server, where MODULE is a name such as shop.wsgi, "
        "and run check in the directory from which the server imports it",
    )


def _member(module: Any, path: str) -> Any:
    """Return the attribute of *module* at a dotted path."""
    value = module
    for attribute in path.split("."):
        try:
            value = getattr(value, attribute)
        except AttributeError:
            raise NoApplication(
                f"module {module.__name__!r} has no {path!r}",
                "write the name that the application has in the module behind the "
                "colon, MODULE:APP; without one it is 'application'",
            ) from None
    return value


def _place(error: BaseException) -> str:
    """Return the last line of *error* in the working directory's own files."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if file.is_relative_to(Path.cwd()) and "site-packages" not in file.parts:
            return f" ({file.relative_to(Path.cwd())}, line {frame.lineno})"
    return ""


def middlewares(app: Any) -> list[OpenMeterMiddleware]:
    """Return every `OpenMeterMiddleware` around *app*, the outermost first."""
    return [layer for layer in layers_of(app) if isinstance(layer, OpenMeterMiddleware)]


def check_layers(
    name: str, app: Any, found: list[OpenMeterMiddleware]
) -> Iterator[Finding]:
    """Check that an application is metered exactly once."""
    if _is_asgi(app):
        yield failure(
            _APPLICATION,
            f"{name} is an ASGI application, and this is WSGI middleware: its requests "
            "are not metered",
            "serve the WSGI application; with ASGI alone, send events from "
            "handlers with OpenMeter's SDK",
        )
        return
    if not found:
        yield failure(
            _APPLICATION,
            f"{name} is not wrapped in OpenMeterMiddleware: nothing is billed",
            _django_remedy(app)
            or "wrap it, and name the outermost application, which the server serves",
        )
        return
    if len(found) == 1:
        yield ok(_APPLICATION, f"{name} is metered once")
        return
    outer, *inner = found
    problem = f"{name} is wrapped {len(found)} times; only the outermost bills"
    remedy = "remove the others; the options of single routes belong into routes"
    if all(layer.policy == outer.policy for layer in inner):
        yield warning(_APPLICATION, problem, remedy)
    else:
        yield failure(
            _APPLICATION,
            f"{problem}, and the meters of the inner policy are never billed",
            remedy,
        )


def _is_asgi(app: Any) -> bool:
    method = getattr(app, "__call__", None)  # noqa: B004 - it may be a coroutine
    return any(map(inspect.iscoroutinefunction, (app, method)))


def _django_remedy(app: Any) -> str | None:
    modules = [type(layer).__module__ for layer in layers_of(app)]
    if not any(module.startswith("django.") for module in modules):
        return None
    return (
        "in wsgi.py, write 'from openmeter_wsgi.django import get_wsgi_application' in "
        "place of Django's own function"
    )


def check_decorators(app: Any) -> Iterator[Finding]:
    """Report decorators of views without effect."""
    for template, name in misplaced_decorators(app):
        yield failure(
            f"view {name}",
            f"its @meter or @no_meter stands above the decorator that registers it for "
            f"{template}, and has no effect",
            "put it below, next to the function",
        )


_SPOOL = "spool directory"
_ROOT = Path("/")
#: File systems in memory.
_MEMORY = ("tmpfs", "ramfs")
_REMEDY = (
    "set spool_dir to a directory of the application's own, mode 0700, on a local file "
    "system"
)


def check_spool(situation: Situation) -> Iterator[Finding]:
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
    finding = _check_directory(directory)
    yield finding
    if finding.severity == "ok":
        server = server_directories.server_of_policy(situation.policy)
        of_server = server_directories.server_directory(directory, server)
        situation.spool = of_server
        yield from _check_room(situation.policy, of_server)
        yield from _check_sender(situation, of_server)
        yield from _check_oldest_event(of_server)
        yield from _check_orphans(directory, server)
    existing = directory if directory.exists() else directory.parent
    if existing.exists():
        yield from _check_volume(existing)


def _check_sender(situation: Situation, directory: Path) -> Iterator[Finding]:
    if situation.policy.delivery != "ship":
        return
    name = "sender of the spool"
    if holder(directory / ELECTION) is None:
        yield warning(
            name,
            "with delivery='ship' another process delivers, and none is running: usage "
            "waits in the spool",
            f"run openmeter-wsgi ship --spool-dir {directory.parent}",
        )
    else:
        yield ok(name, "it is running")


def _check_orphans(root: Path, server: server_directories.Server) -> Iterator[Finding]:
    for orphan in server_directories.orphans(root, but=server):
        yield warning(
            "events of other servers",
            f"{orphan.events} events wait for {orphan.address}, and no running process "
            "sends there",
            f"start its application, or run openmeter-wsgi spool --spool-dir {root} "
            "assign --to URL",
        )


def _check_oldest_event(directory: Path) -> Iterator[Finding]:
    if problem := kafka_retention.oldest(backlog(directory).oldest_at):
        yield warning("age of the spool", problem, kafka_retention.REMEDY)


def _check_room(policy: Policy, directory: Path) -> Iterator[Finding]:
    growth = max(policy.max_spool_bytes - backlog(directory).bytes, 0)
    free = shutil.disk_usage(directory.parent).free
    if free < growth:
        yield warning(
            "spool disk",
            f"{size(free)} are free, and the spool may take {size(growth)} more: in "
            "an outage the disk gets full first, and usage then waits in memory",
            "free space on the disk, or lower max_spool_bytes",
        )


def _check_directory(directory: Path) -> Finding:
    if not os.path.lexists(directory):
        # Not created here: its owner must be the application's user.
        return _absent(directory)
    owner = directory.lstat().st_uid
    if owner != os.geteuid():
        return failure(
            _SPOOL,
            f"{directory} belongs to user {owner}, and this command runs as user "
            f"{os.geteuid()}",
            "run this command and the application as the owner of the directory",
        )
    try:
        prepare_directory(str(directory))
        _try_to_write(directory)
    except ConfigError as error:
        return failure(_SPOOL, str(error).removeprefix("spool_dir: "), _REMEDY)
    except OSError as error:
        return failure(
            _SPOOL,
            f"no file can be written in {directory}: {error.strerror}",
            "let the application's user write there, and check the space on the disk",
        )
    return ok(_SPOOL, f"{directory} on {file_system(directory) or 'a file system'}")


def _absent(directory: Path) -> Finding:
    if directory.parent.is_dir():
        return unknown(
            _SPOOL,
            f"{directory} does not exist yet; the application creates it",
            "start the application, then check again",
        )
    return failure(
        _SPOOL,
        f"{directory} cannot be created: {directory.parent} is not a directory",
        f"create {directory.parent}, writable for the application's user",
    )


def _try_to_write(directory: Path) -> None:
    path = directory / f"check.{secrets.token_hex(8)}.new"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, b"\n")
    finally:
        os.close(fd)
        path.unlink()


def _check_volume(directory: Path) -> Iterator[Finding]:
    name, kind = "spool volume", file_system(directory)
    if is_on_layer(directory, _ROOT):
        yield warning(
            name,
            f"{directory} is in the container itself: the next deployment deletes it, "
            "and the undelivered events in it",
            "mount a volume there that outlives the container",
        )
    elif kind in _MEMORY:
        yield warning(
            name,
            f"{directory} is in memory ({kind}): a restart of the machine deletes it",
            "set spool_dir to a directory on a disk",
        )
    else:
        yield ok(name, f"{directory} is not on the writable layer of a container")


def is_on_layer(directory: Path, root: Path) -> bool:
    """Return True if *directory* is on the writable layer of a container.

    The root of a container is an overlay; a mounted volume is another device.
    """
    is_same_device = directory.stat().st_dev == root.stat().st_dev
    return is_same_device and file_system(root) == "overlay"

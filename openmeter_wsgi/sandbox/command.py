"""The command ``openmeter-wsgi sandbox``."""

from __future__ import annotations

import errno
import json
import signal
import sqlite3
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeAlias

import click
from rich.console import Console

from openmeter_wsgi.sandbox.faults import GROUPS, Settings, names
from openmeter_wsgi.sandbox.server import Sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator


if TYPE_CHECKING:
    _ParamType: TypeAlias = click.ParamType[tuple[tuple[str, ...], dict[str, Any]]]
else:
    _ParamType = click.ParamType  # not generic before click 8.2


class FaultType(_ParamType):
    """The type of ``--fault``: ``WHERE:FAULT[=VALUE]``."""

    name = "WHERE:FAULT"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[tuple[str, ...], dict[str, Any]]:
        """Return the groups of requests that *value* names, and the setting."""
        where, _, rest = str(value).partition(":")
        fault, equals, text = rest.partition("=")
        groups = GROUPS if where == "both" else (where,)
        known = [n.replace("_", "-") for n in names(where)]
        if not set(groups) <= set(GROUPS) or fault not in known:
            self.fail(_expected(value), param, ctx)
        name = fault.replace("-", "_")
        try:
            setting = {name: _read(name, text) if equals else _DEFAULTS[name]}
            Settings(**setting)
        except (KeyError, ValueError) as error:
            reason = "it needs a value" if isinstance(error, KeyError) else str(error)
            self.fail(f"{value!r}: {reason}", param, ctx)
        return groups, setting


#: The values of faults that are given without a value.
_DEFAULTS: dict[str, Any] = {
    "outage": True, "forget": True, "claim": True, "fail_rate": 1.0, "denied": 401,
}  # fmt: skip


def _read(name: str, text: str) -> Any:
    if name.startswith("refused"):
        return text
    if _DEFAULTS.get(name) is True:
        raise ValueError(f"{name} has no value")
    return int(text) if name == "denied" else float(text)


def _expected(value: str) -> str:
    where = "|".join((*GROUPS, "both"))
    listed = "|".join(names("ingest")).replace("_", "-")
    return f"{value!r}: expected {where}:{listed}, such as both:outage"


def _refuse_latency(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """Name the replacement of an option of version 0.1.0."""
    if value is not None:
        written = f"--fault ingest:latency={value}"
        raise click.BadParameter(f"is no longer an option: write {written}", ctx, param)


_EXIT_CODES = """\b
Exit codes:
  0  ended by SIGTERM or SIGINT
  1  it could not be done; one line on stderr says why
  2  wrong usage, or a configuration that cannot work"""


@click.command("sandbox", epilog=_EXIT_CODES, context_settings={"show_default": True})
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option(
    "--port",
    default=8888,
    type=click.IntRange(0, 65535),
    help="Port to listen on; 0 chooses a free port.",
)
@click.option(
    "--database",
    type=click.Path(dir_okay=False),
    help="SQLite file for all data.  [default: a temporary file]",
)
@click.option(
    "--dedupe/--no-dedupe",
    default=True,
    help="Drop events whose source and id were seen before.",
)
@click.option("--latency", hidden=True, expose_value=False, callback=_refuse_latency)
@click.option(
    "--fail-rate",
    default=0.0,
    type=click.FloatRange(0, 1),
    help="Share of ingest requests that get 500, half of them after storing.",
)
@click.option(
    "--visible-after",
    default=0.0,
    type=click.FloatRange(0, 3600),
    help="Seconds until an event is counted and listed; OpenMeter takes about 1.",
)
@click.option(
    "--fault",
    "faults",
    multiple=True,
    type=FaultType(),
    help="A fault of ingest, entitlements or both, such as ingest:outage or"
    " both:latency=2. Faults: latency=2, fail-rate=0.1, hang=30, byte-delay=0.01,"
    " outage, retry-after=5, denied=401; only of ingest: forget, claim,"
    " refused-type=T, refused-subject=S. May be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the URL as JSON.")
def command(
    host: str, port: int, faults: tuple[Any, ...], as_json: bool, **options: Any
) -> None:
    """Serve OpenMeter's API on this machine, with a page that shows the usage.

    For development and tests. Set api_url of your application to the printed URL.
    """
    console = Console(markup=False, highlight=False, soft_wrap=True)
    with _stop_signals() as stopped:
        try:
            sandbox = Sandbox(host=host, port=port, **options)
        except OSError as error:
            raise click.ClickException(_explain(error, host, port)) from None
        except sqlite3.Error as error:
            raise click.ClickException(
                f"--database {options['database']}: {error}"
            ) from None
        for groups, setting in faults:
            for group in groups:
                getattr(sandbox.faults, group).set(**setting)
        with sandbox:
            sentence = f"OpenMeter sandbox listens on {sandbox.url}"
            console.print(json.dumps({"url": sandbox.url}) if as_json else sentence)
            console.file.flush()
            stopped.get()


@contextmanager
def _stop_signals() -> Iterator[SimpleQueue[int]]:
    """Yield a queue that gets SIGTERM and SIGINT, which do not end the process.

    A threading.Event could hang: its `set` takes the lock that an interrupted `wait`
    may hold. The `put` of a SimpleQueue is reentrant.
    """
    stopped: SimpleQueue[int] = SimpleQueue()
    previous = {
        number: signal.signal(number, lambda number, _: stopped.put(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _explain(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is in use; choose another with --port (0: any free port)"
    reason = error.strerror or str(error)
    if error.errno == errno.EACCES:
        return f"port {port}: {reason}; choose another with --port (0: any free port)"
    return f"cannot listen on {host}:{port}: {reason}"

"""Arguments, output and exit codes that commands share."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from openmeter_wsgi.cli.api_client import ListingV1
from openmeter_wsgi.cli.api_client_v3 import ListingV3
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.policy import Policy
from openmeter_wsgi.spool.files import FORMAT, prepare_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from openmeter_wsgi.cli.api_client import Listing
    from openmeter_wsgi.options import ApiKey

#: The command has looked, or done what could be done, and the answer is no.
ANSWER_IS_NO = 3

_MEANINGS = {
    0: "done",
    1: "it could not be done; one line on stderr says why",
    2: "wrong usage, or a configuration that cannot work",
}


def exit_codes(**meanings: str) -> str:
    """Return the foot of a command's help; *meanings* change or add to the usual.

    They are named by their number: ``_3="something fails"``.
    """
    said = {int(name.lstrip("_")): text for name, text in meanings.items()}
    lines = [
        f"  {code}  {text}" for code, text in sorted({**_MEANINGS, **said}.items())
    ]
    return "\n".join(["\b", "Exit codes:", *lines])


#: Those of a command that has no others.
EXIT_CODES = exit_codes()


class BadConfiguration(click.ClickException):
    """A configuration that cannot work is told from an attempt that failed."""

    exit_code = 2


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM and SIGINT set instead of ending the process."""
    stopped = threading.Event()
    previous = {
        number: signal.signal(number, lambda *_: stopped.set())
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def spool_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say which spool, and under which policy."""
    return spool_dir_option(policy_option(command))


def spool_dir_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the option that says which spool."""
    return click.option(
        "--spool-dir",
        envvar="OPENMETER_SPOOL_DIR",
        show_envvar=True,
        type=click.Path(),
        help="Directory of the spool.",
    )(command)


def policy_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the option that says which file holds the policy."""
    return click.option(
        "--config",
        "--policy",
        "policy_file",
        type=click.Path(),
        metavar="FILE",
        help="TOML or JSON file with options; OPENMETER_… variables outdo it.",
    )(command)


def server_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say which server, and under which policy."""
    url = click.option(
        "--api-url",
        metavar="URL",
        help="Address of the server, instead of OPENMETER_API_URL's.",
    )
    return policy_option(url(command))


def options_given(**options: Any) -> dict[str, Any]:
    """Return those of *options* that were given."""
    return {name: value for name, value in options.items() if value is not None}


def open_spool(
    path: str | None, *, may_be_empty: bool = False, to_write: bool = False
) -> Path:
    """Return the directory of a spool that is there; never make a directory.

    :raises ClickException: if there is none, it is not the caller's, or it is read-only
        and not only to be read.
    """
    if path is None:
        # Not by click: the help of a subcommand would not be shown without it.
        raise click.UsageError("Missing option '--spool-dir'.")
    directory = Path(os.path.abspath(path))  # not resolved: a symlink is refused
    try:
        owner = directory.lstat().st_uid
        if owner != os.geteuid():
            raise click.ClickException(
                f"{_shown(path)} belongs to {_user(owner)}, and this is run by "
                f"{_user(os.geteuid())}; run it as {_user(owner)}"
            )
        if directory.is_dir() and not _is_spool(directory, may_be_empty):
            raise click.ClickException(
                f"{_shown(path)} is no spool: it has no file {FORMAT!r}"
            )
        return prepare_directory(path, to_write=to_write)
    except OSError as error:
        raise click.ClickException(f"{_shown(path)}: {error.strerror}") from None
    except ConfigError as error:
        raise click.ClickException(_told(error)) from None


def read_policy(file: str | None, **options: Any) -> Policy:
    """Return the policy that a file, if any, and variables say.

    :raises BadConfiguration: naming everything that is wrong with it.
    """
    try:
        if file is None:
            return Policy.from_env(**options)
        return Policy.from_file(file, **options)
    except ConfigError as error:
        raise BadConfiguration(_told(error)) from None


def open_listing(
    policy: Policy, url: str | None = None, key: ApiKey | None = None
) -> Listing:
    """Return OpenMeter's lists, by the version of the API that *policy* names.

    *url* and *key* are where and as whom entitlements are asked for, if that is not
    where events are sent to.
    """
    of_version = ListingV3 if policy.api_flavor == "v3" else ListingV1
    return of_version(url or policy.api_url, key or policy.key, policy.request_timeout)


def _is_spool(directory: Path, may_be_empty: bool) -> bool:
    # A volume that no application has written to yet is waited for.
    entries = os.listdir(directory)
    return FORMAT in entries or (may_be_empty and not entries)


def _told(error: ConfigError) -> str:
    return printable("; ".join(error.problems))


def _shown(path: str) -> str:
    return printable(repr(path))


def _user(number: int) -> str:
    try:
        return f"user {pwd.getpwuid(number).pw_name}"
    except KeyError:
        return f"user {number}"


Item = TypeVar("Item")

#: Seconds before the name of a running check is shown: a shorter one would flicker.
_UNNOTICED = 0.4


def printable(text: str) -> str:
    """Return *text* with everything escaped that could steer a terminal.

    What is in a spool came from requests: colours, cursor movements and changes
    of the writing direction could make a listing say what is not so.
    """
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    # Surrogates have no other form.
    return character.encode("unicode_escape", "surrogatepass").decode()


def print_json(document: object, *, indent: int | None = None) -> None:
    """Print a document in ASCII, so that nothing in it reaches the terminal raw."""
    text = json.dumps(document, ensure_ascii=True, indent=indent)
    click.echo(text.replace("\x7f", "\\u007f"))


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    numbers: Collection[str] = (),
) -> None:
    """Print rows: a table on a terminal, else lines of fields with tabs between.

    The columns named in *numbers* are aligned at their right.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    if not sys.stdout.isatty():
        for line in [list(columns), *cells]:
            click.echo("\t".join(line))
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        justify: Literal["left", "right"] = "right" if column in numbers else "left"
        table.add_column(column, overflow="fold", justify=justify)
    for line in cells:
        table.add_row(*(Text(cell) for cell in line))
    Console(markup=False, highlight=False).print(table)


def _cell(value: object) -> str:
    return "-" if value is None else printable(str(value))


def progress(items: Iterable[Item], title: str, total: int | None) -> Iterator[Item]:
    """Yield *items*, with a bar on stderr if that is a terminal."""
    console = Console(stderr=True)
    with Progress(
        console=console, transient=True, disable=not console.is_terminal
    ) as p:
        yield from p.track(items, description=title, total=total)


@contextlib.contextmanager
def busy(title: str) -> Iterator[Callable[[str], None]]:
    """Show that something takes its time, on stderr if that is a terminal.

    Yields what changes the title. Nothing else may be printed meanwhile.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    status = console.status(Text(printable(title)))
    shown = threading.Timer(_UNNOTICED, status.start)
    shown.start()
    try:
        yield lambda text: status.update(Text(printable(text)))
    finally:
        shown.cancel()
        shown.join()
        status.stop()


def age(seconds: float | None) -> str | None:
    """Return a duration as people say it."""
    if seconds is None:
        return None
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def size(amount: float) -> str:
    """Return a number of bytes as people say it."""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB"):
        if amount < 1_024:
            break
        amount, unit = amount / 1_024, larger
    return f"{amount:.1f} {unit}"


def name_of(event: Any, attribute: str) -> str | None:
    """Return an attribute of an event; None if it is no event or lacks it."""
    value = event.get(attribute) if isinstance(event, dict) else None
    return value if isinstance(value, str) else None

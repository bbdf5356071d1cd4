"""Options, output and exit codes that the commands share."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import queue
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

#: Exit code of a command that ran and found a problem, such as a refused event.
ANSWER_IS_NO = 3

#: Meanings of the exit codes.
_MEANINGS = {
    0: "done",
    1: "it could not be done; one line on stderr says why",
    2: "wrong usage, or a configuration that cannot work",
}


def exit_codes(**meanings: str) -> str:
    """Return the list of exit codes at the end of a command's help.

    :param meanings: other or more meanings by number, such as ``_3="something fails"``.
    """
    own = {int(name.lstrip("_")): text for name, text in meanings.items()}
    lines = [f"  {code}  {text}" for code, text in sorted({**_MEANINGS, **own}.items())]
    return "\n".join(["\b", "Exit codes:", *lines])


#: The exit codes of a command without codes of its own.
EXIT_CODES = exit_codes()


class BadConfiguration(click.ClickException):
    """An invalid configuration; its exit code differs from that of a failed attempt."""

    exit_code = 2


class StopEvent:
    """An event that a signal handler may set while the same thread waits for it.

    `threading.Event` would deadlock: its `wait` and its `set` take one lock. `put` of a
    SimpleQueue takes no lock that the handler could find held.
    """

    def __init__(self) -> None:
        self._is_set = False
        self._wakeups: queue.SimpleQueue[None] = queue.SimpleQueue()

    def is_set(self) -> bool:
        """Return True once `set` was called."""
        return self._is_set

    def set(self) -> None:
        """Set the event, and wake up the waiting thread."""
        self._is_set = True
        self._wakeups.put(None)

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the event is set, at most *timeout* seconds."""
        if not self._is_set:
            with contextlib.suppress(queue.Empty):
                self._wakeups.get(timeout=timeout)


@contextlib.contextmanager
def stop_signals() -> Iterator[StopEvent]:
    """Yield an event that SIGTERM and SIGINT set instead of ending the process."""
    stopped = StopEvent()
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
    """Add ``--spool-dir`` and ``--config``."""
    return spool_dir_option(policy_option(command))


def spool_dir_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--spool-dir``."""
    return click.option(
        "--spool-dir",
        envvar="OPENMETER_SPOOL_DIR",
        show_envvar=True,
        type=click.Path(),
        help="Directory of the spool.",
    )(command)


def policy_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--config``."""
    return click.option(
        "--config",
        "--policy",
        "policy_file",
        type=click.Path(),
        metavar="FILE",
        help="TOML or JSON file with options; OPENMETER_… variables win over it.",
    )(command)


def server_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--api-url`` and ``--config``."""
    url = click.option(
        "--api-url",
        metavar="URL",
        help="Address of the server; wins over OPENMETER_API_URL.",
    )
    return policy_option(url(command))


def options_given(**options: Any) -> dict[str, Any]:
    """Return the *options* that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def open_spool(
    path: str | None, *, may_be_empty: bool = False, to_write: bool = False
) -> Path:
    """Return the directory of an existing spool; never create a directory.

    :raises ClickException: if it does not exist, belongs to another user, or, with
        *to_write*, cannot be written.
    """
    if path is None:
        # An option that click requires would be required for a subcommand's help, too.
        raise click.UsageError("Missing option '--spool-dir'.")
    # Not resolved, so that a symlink is refused.
    directory = Path(os.path.abspath(path))
    try:
        owner = directory.lstat().st_uid
        if owner != os.geteuid():
            raise click.ClickException(
                f"{_quoted(path)} belongs to {_user(owner)}, and this command runs as "
                f"{_user(os.geteuid())}; run it as {_user(owner)}"
            )
        if directory.is_dir() and not _is_spool(directory, may_be_empty):
            raise click.ClickException(
                f"{_quoted(path)} is not a spool: it has no file {FORMAT!r}"
            )
        return prepare_directory(path, to_write=to_write)
    except OSError as error:
        raise click.ClickException(f"{_quoted(path)}: {error.strerror}") from None
    except ConfigError as error:
        raise click.ClickException(_text_of(error)) from None


def read_policy(file: str | None, **options: Any) -> Policy:
    """Return the policy of *options*, variables and a file, if one is given.

    :raises BadConfiguration: with every problem of the configuration.
    """
    try:
        if file is None:
            return Policy.from_env(**options)
        return Policy.from_file(file, **options)
    except ConfigError as error:
        raise BadConfiguration(_text_of(error)) from None


def open_listing(
    policy: Policy, url: str | None = None, key: ApiKey | None = None
) -> Listing:
    """Return a client of OpenMeter's lists for the API version of *policy*.

    *url* and *key* replace those for events, where entitlements have their own.
    """
    client = ListingV3 if policy.api_flavor == "v3" else ListingV1
    return client(url or policy.api_url, key or policy.key, policy.request_timeout)


def _is_spool(directory: Path, may_be_empty: bool) -> bool:
    # A new volume is empty until an application writes to it.
    entries = os.listdir(directory)
    return FORMAT in entries or (may_be_empty and not entries)


def _text_of(error: ConfigError) -> str:
    return printable("; ".join(error.problems))


def _quoted(path: str) -> str:
    return printable(repr(path))


def _user(number: int) -> str:
    try:
        return f"user {pwd.getpwuid(number).pw_name}"
    except KeyError:
        return f"user {number}"


Item = TypeVar("Item")

#: Seconds before the title of a running operation appears, to avoid flicker.
_TITLE_DELAY = 0.4


def printable(text: str) -> str:
    """Return *text* with all control characters escaped.

    The contents of a spool come from requests. Colours, cursor movements and changes of
    the writing direction could falsify a listing.
    """
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    # Surrogates cannot be encoded without "surrogatepass".
    return character.encode("unicode_escape", "surrogatepass").decode()


def print_json(document: object, *, indent: int | None = None) -> None:
    """Print a document in ASCII, without control characters for a terminal."""
    text = json.dumps(document, ensure_ascii=True, indent=indent)
    click.echo(text.replace("\x7f", "\\u007f"))


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    numbers: Collection[str] = (),
) -> None:
    """Print rows: as a table on a terminal, else as lines of fields between tabs.

    :param numbers: the columns that are aligned to the right.
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
    """Yield *items*, with a progress bar on stderr if that is a terminal."""
    console = Console(stderr=True)
    with Progress(
        console=console, transient=True, disable=not console.is_terminal
    ) as p:
        yield from p.track(items, description=title, total=total)


@contextlib.contextmanager
def busy(title: str) -> Iterator[Callable[[str], None]]:
    """Show a running operation on stderr if that is a terminal.

    Yields a function that changes the title. Print nothing else in the meantime.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    status = console.status(Text(printable(title)))
    timer = threading.Timer(_TITLE_DELAY, status.start)
    timer.start()
    try:
        yield lambda text: status.update(Text(printable(text)))
    finally:
        timer.cancel()
        timer.join()
        status.stop()


def age(seconds: float | None) -> str | None:
    """Return a duration for people, such as ``3 h``."""
    if seconds is None:
        return None
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def size(amount: float) -> str:
    """Return a number of bytes for people, such as ``3.0 MiB``."""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB"):
        if amount < 1_024:
            break
        amount, unit = amount / 1_024, larger
    return f"{amount:.1f} {unit}"


def name_of(event: Any, attribute: str) -> str | None:
    """Return an attribute of an event, None if there is no event or no attribute."""
    value = event.get(attribute) if isinstance(event, dict) else None
    return value if isinstance(value, str) else None

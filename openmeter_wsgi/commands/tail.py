"""``openmeter-wsgi tail``: the events of this host, as they are settled."""

from __future__ import annotations

import itertools
import json
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import msgspec
from rich.console import Console
from rich.text import Text

from openmeter_wsgi.commands.exit_codes import exit_codes
from openmeter_wsgi.commands.following import Following
from openmeter_wsgi.commands.opening import open_spool, spool_dir_option
from openmeter_wsgi.commands.output import name_of, print_json, printable
from openmeter_wsgi.commands.stop_signals import stop_signals

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator

#: Seconds between two looks into the directory.
_INTERVAL = 0.1
_NAMES = ("time", "type", "subject", "id")
_STYLES = ("dim", "cyan", "bold", "dim", "default")


class _Filter(NamedTuple):
    """Which events are wanted: one of the types, and one of the subjects."""

    types: tuple[str, ...]
    subjects: tuple[str, ...]

    def wants(self, event: Any) -> bool:
        """Say whether *event* is wanted."""
        return _matches(name_of(event, "type"), self.types) and _matches(
            name_of(event, "subject"), self.subjects
        )


def _matches(value: str | None, patterns: tuple[str, ...]) -> bool:
    return not patterns or any(fnmatchcase(value or "", one) for one in patterns)


@click.command("tail", epilog=exit_codes(_0="done, or ended by a signal"))
@spool_dir_option
@click.option(
    "--type",
    "types",
    multiple=True,
    metavar="PATTERN",
    help="Only events of this type; * stands for anything. May be repeated.",
)
@click.option(
    "--subject",
    "subjects",
    multiple=True,
    metavar="PATTERN",
    help="Only events of this subject, likewise.",
)
@click.option("--all", "everything", is_flag=True, help="First what is there already.")
@click.option(
    "-n",
    "--count",
    type=click.IntRange(1),
    metavar="NUMBER",
    help="End after so many events.  [default: at SIGTERM or SIGINT]",
)
@click.option("--json", "as_json", is_flag=True, help="Print events as JSON lines.")
def command(
    spool_dir: str | None,
    types: tuple[str, ...],
    subjects: tuple[str, ...],
    everything: bool,
    count: int | None,
    as_json: bool,
) -> None:
    """Print the events of a spool as applications on this host settle them.

    It reads beside the processes that write, and those that deliver. Run it as the
    user whom the directory belongs to.
    """
    directory = open_spool(spool_dir, may_be_empty=True)
    wanted = _Filter(types, subjects)
    show = print_json if as_json else _printer()
    with stop_signals() as stopped, Following(directory, everything=everything) as all_:
        # Only now does nothing escape that is settled from here on.
        click.echo(f"following {printable(str(directory))}", err=True)
        events = filter(wanted.wants, _events(all_, stopped))
        for event in itertools.islice(events, count):
            show(event)


def _events(following: Following, stopped: threading.Event) -> Iterator[Any]:
    while not stopped.is_set():
        yield from map(msgspec.json.decode, following.poll())
        stopped.wait(_INTERVAL)


def _printer() -> Callable[[Any], None]:
    """Return what prints an event: a line, on a terminal a coloured one."""
    console = Console(markup=False, highlight=False, soft_wrap=True)

    def show(event: Any) -> None:
        data = json.dumps(event.get("data"), ensure_ascii=False)
        names = (name_of(event, name) for name in _NAMES)
        cells = [*(printable(name or "-") for name in names), printable(data)]
        if console.is_terminal:
            pairs = zip(cells, _STYLES, strict=True)
            console.print(Text("  ").join(Text(*pair) for pair in pairs))
        else:
            click.echo("\t".join(cells))

    return show

"""Output of commands: tables for people, tabs for pipes, JSON for programs."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

Item = TypeVar("Item")

#: What takes no longer than so many seconds would only flicker.
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
    """Return an attribute of what may or may not be an event."""
    value = event.get(attribute) if isinstance(event, dict) else None
    return value if isinstance(value, str) else None

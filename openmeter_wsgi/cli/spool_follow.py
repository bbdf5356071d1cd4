"""``openmeter-wsgi spool list --follow``: print events as they are written.

Nothing here writes, locks or deletes. A segment is held open while it is read, so
that its sender may delete it at any moment.
"""

from __future__ import annotations

import contextlib
import json
import os
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import click
import msgspec
from rich.console import Console
from rich.text import Text

from openmeter_wsgi.cli.common import name_of, print_json, printable, stop_signals
from openmeter_wsgi.spool.files import (
    SegmentName,
    is_event,
    open_file,
    read_final,
    read_live,
    read_name,
    whole_end,
)
from openmeter_wsgi.spool.server_directories import spool_directories

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator
    from pathlib import Path


class _Reader:
    """One segment that is being written, and how far it is read."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._at = 0

    def skip(self) -> None:
        """Pass over what is there already."""
        self._at = whole_end(self._fd, 0)

    def read(self, *, final: bool) -> Iterator[bytes]:
        """Yield the events that have come since; *final*: nobody writes any more."""
        read = read_final if final else read_live
        # Most segments are quiet, and to find that out one byte is enough.
        while final or os.pread(self._fd, 1, self._at) not in {b"", b"\0"}:
            pieces = read(self._fd, self._at)
            if not pieces:
                return
            for piece in pieces:
                whole = len(piece.text) < piece.end - piece.start
                if whole and is_event(piece.text):
                    yield piece.text
            self._at = pieces[-1].end

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


class Following:
    """The segments of a spool, read on at every `poll`.

    :param everything: whether what is there already is read, too.
    """

    def __init__(self, root: Path, *, everything: bool = False) -> None:
        self._root = root
        self._readers: dict[str, _Reader] = {}
        #: Segments that are read to their end, until they are deleted.
        self._read: set[str] = set()
        if not everything:
            self._pass_over()

    def poll(self) -> Iterator[bytes]:
        """Yield the events that have come since the last time."""
        there = self._listed()
        self._read &= there.keys()
        for key, listed in there.items():
            if key not in self._read and key not in self._readers:
                self._open(*listed)
        for key, reader in list(self._readers.items()):
            still = there.get(key)
            final = still is None or still[1].sealed
            yield from reader.read(final=final)
            if final:
                self._readers.pop(key).close()
                self._read.add(key)

    def _pass_over(self) -> None:
        for key, (directory, name) in self._listed().items():
            if name.sealed:
                self._read.add(key)
            elif (reader := self._open(directory, name)) is not None:
                reader.skip()

    def _open(self, directory: Path, name: SegmentName) -> _Reader | None:
        # It may be sealed, or deleted, since it was listed.
        for path in (name, name._replace(sealed=True)):
            with contextlib.suppress(FileNotFoundError):
                reader = _Reader(open_file(directory / str(path)))
                self._readers[name.key] = reader
                return reader
        return None

    def _listed(self) -> dict[str, tuple[Path, SegmentName]]:
        found = [
            (name, directory)
            for directory in spool_directories(self._root)
            for entry in _entries(directory)
            if (name := read_name(entry)) and not name.being_made
        ]
        return {name.key: (directory, name) for name, directory in sorted(found)}

    def close(self) -> None:
        """Close all files."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _entries(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:  # removed meanwhile, as nothing was left in it
        return []


#: Seconds between two looks into the directory.
_INTERVAL = 0.1
_NAMES = ("time", "type", "subject", "id")
_STYLES = ("dim", "cyan", "bold", "dim", "default")


class EventFilter(NamedTuple):
    """Patterns of the wanted types and subjects; none means all of them."""

    types: tuple[str, ...]
    subjects: tuple[str, ...]

    def wants(self, event: Any) -> bool:
        """Return True if *event* has one of the types and one of the subjects."""
        return _matches(name_of(event, "type"), self.types) and _matches(
            name_of(event, "subject"), self.subjects
        )


def _matches(value: str | None, patterns: tuple[str, ...]) -> bool:
    return not patterns or any(fnmatchcase(value or "", one) for one in patterns)


def follow(
    directory: Path, wanted: EventFilter, *, everything: bool, as_json: bool
) -> None:
    """Print the events of *directory* until a signal, as applications settle them.

    With *everything*, the events that wait there come first.
    """
    show = print_json if as_json else _printer()
    with stop_signals() as stopped, Following(directory, everything=everything) as all_:
        # Only now does no event escape that is settled from here on.
        click.echo(f"following {printable(str(directory))}", err=True)
        for event in filter(wanted.wants, _events(all_, stopped)):
            show(event)


def _events(following: Following, stopped: threading.Event) -> Iterator[Any]:
    while not stopped.is_set():
        yield from map(msgspec.json.decode, following.poll())
        stopped.wait(_INTERVAL)


def _printer() -> Callable[[Any], None]:
    """Return a function that prints an event in one line, coloured on a terminal."""
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

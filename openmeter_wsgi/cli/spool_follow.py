"""``openmeter-wsgi spool list --follow``: print events as they are written.

This module does not write, lock or delete. A segment is kept open while it is read, so
that the sender may delete it at any time.
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
from openmeter_wsgi.cli.spool_access import events_of
from openmeter_wsgi.spool.files import (
    SegmentName,
    open_file,
    read_final,
    read_live,
    read_name,
    whole_end,
)
from openmeter_wsgi.spool.server_directories import spool_directories

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from openmeter_wsgi.cli.common import StopEvent


class _Reader:
    """A segment that is being written, and the offset up to which it is read."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._offset = 0

    def skip(self) -> None:
        """Skip the events that are already written."""
        self._offset = whole_end(self._fd, 0)

    def read(self, *, final: bool) -> Iterator[bytes]:
        """Yield the new events. *final*: nothing is appended any more."""
        read = read_final if final else read_live
        # Most segments do not grow, and one byte is enough to find that out.
        while final or os.pread(self._fd, 1, self._offset) not in {b"", b"\0"}:
            lines = read(self._fd, self._offset)
            if not lines:
                return
            yield from events_of(lines)
            self._offset = lines[-1].end

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


class Following:
    """The segments of a spool; each `poll` reads their new events.

    :param everything: True to read the existing events as well.
    """

    def __init__(self, root: Path, *, everything: bool = False) -> None:
        self._root = root
        self._readers: dict[str, _Reader] = {}
        #: Existing segments that are read to their end.
        self._finished: set[str] = set()
        if not everything:
            self._skip_existing()

    def poll(self) -> Iterator[bytes]:
        """Yield the events written since the last call."""
        segments = self._segments()
        self._finished &= segments.keys()
        for key, segment in segments.items():
            if key not in self._finished and key not in self._readers:
                self._open(*segment)
        for key, reader in list(self._readers.items()):
            existing = segments.get(key)
            final = existing is None or existing[1].sealed
            yield from reader.read(final=final)
            if final:
                self._readers.pop(key).close()
                self._finished.add(key)

    def _skip_existing(self) -> None:
        for key, (directory, name) in self._segments().items():
            if name.sealed:
                self._finished.add(key)
            elif (reader := self._open(directory, name)) is not None:
                reader.skip()

    def _open(self, directory: Path, name: SegmentName) -> _Reader | None:
        # It may have been sealed or deleted since it was listed.
        for path in (name, name._replace(sealed=True)):
            with contextlib.suppress(FileNotFoundError):
                reader = _Reader(open_file(directory / str(path)))
                self._readers[name.key] = reader
                return reader
        return None

    def _segments(self) -> dict[str, tuple[Path, SegmentName]]:
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
    except FileNotFoundError:  # an empty directory is removed
        return []


#: Seconds between two polls of the directory.
_INTERVAL = 0.1
#: Attributes that are printed before the data, and the styles of all columns.
_NAMES = ("time", "type", "subject", "id")
_STYLES = ("dim", "cyan", "bold", "dim", "default")


class EventFilter(NamedTuple):
    """Patterns of types and of subjects; no patterns match everything."""

    types: tuple[str, ...]
    subjects: tuple[str, ...]

    def matches(self, event: Any) -> bool:
        """Return True if *event* has one of the types and one of the subjects."""
        return _matches(name_of(event, "type"), self.types) and _matches(
            name_of(event, "subject"), self.subjects
        )


def _matches(value: str | None, patterns: tuple[str, ...]) -> bool:
    return not patterns or any(
        fnmatchcase(value or "", pattern) for pattern in patterns
    )


def follow(
    directory: Path, wanted: EventFilter, *, everything: bool, as_json: bool
) -> None:
    """Print the events of *directory* until a signal, as applications settle them.

    With *everything*, the waiting events come first.
    """
    show = print_json if as_json else _printer()
    with (
        stop_signals() as stopped,
        Following(directory, everything=everything) as following,
    ):
        # Printed only now, when no later event is missed.
        click.echo(f"following {printable(str(directory))}", err=True)
        for event in filter(wanted.matches, _events(following, stopped)):
            show(event)


def _events(following: Following, stopped: StopEvent) -> Iterator[Any]:
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

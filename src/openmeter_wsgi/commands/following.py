"""Following a spool: its events as they are written, beside whoever writes them.

Nothing here writes, locks or deletes. A segment is held open while it is read, so
that its sender may delete it at any moment.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Self

from openmeter_wsgi.spool.files import (
    SegmentName,
    is_event,
    open_file,
    read_final,
    read_live,
    read_name,
    whole_end,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
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
    """The segments of a directory, read on at every `poll`.

    :param everything: whether what is there already is read, too.
    """

    def __init__(self, directory: Path, *, everything: bool = False) -> None:
        self._directory = directory
        self._readers: dict[str, _Reader] = {}
        #: Segments that are read to their end, until they are deleted.
        self._read: set[str] = set()
        if not everything:
            self._pass_over()

    def poll(self) -> Iterator[bytes]:
        """Yield the events that have come since the last time."""
        there = self._listed()
        self._read &= there.keys()
        for key, name in there.items():
            if key not in self._read and key not in self._readers:
                self._open(name)
        for key, reader in list(self._readers.items()):
            listed = there.get(key)
            final = listed is None or listed.sealed
            yield from reader.read(final=final)
            if final:
                self._readers.pop(key).close()
                self._read.add(key)

    def _pass_over(self) -> None:
        for key, name in self._listed().items():
            if name.sealed:
                self._read.add(key)
            elif (reader := self._open(name)) is not None:
                reader.skip()

    def _open(self, name: SegmentName) -> _Reader | None:
        # It may be sealed, or deleted, since it was listed.
        for path in (name, name._replace(sealed=True)):
            with contextlib.suppress(FileNotFoundError):
                reader = _Reader(open_file(self._directory / str(path)))
                self._readers[name.key] = reader
                return reader
        return None

    def _listed(self) -> dict[str, SegmentName]:
        names = map(read_name, os.listdir(self._directory))
        found = sorted(name for name in names if name and not name.unfinished)
        return {name.key: name for name in found}

    def close(self) -> None:
        """Close all files."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

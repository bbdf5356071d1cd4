"""The reader that counts the records of newline-delimited JSON."""

from __future__ import annotations

import re

from openmeter_wsgi.bodies.media_types import NDJSON, is_compressed, media_type
from openmeter_wsgi.bodies.reader import BodyReader, Reader, Unreadable

#: Media types that say nothing of the lines.
_UNSAID = frozenset({"", "text/plain", "application/octet-stream"})
_BLANK_LINE = re.compile(rb"\n[ \t\r]*(?=\n)")
_SPACE = b" \t\r"


def records_reader(
    content_type: str | None, content_encoding: str | None
) -> BodyReader[int]:
    """Return a reader of the number of records for a response with these headers.

    The lines of a page or of indented JSON are no records: ``not_ndjson``.
    """
    if is_compressed(content_encoding):
        return Unreadable("compressed")
    if media_type(content_type) not in NDJSON | _UNSAID:
        return Unreadable("not_ndjson")
    return RecordsReader()


class RecordsReader(Reader[int]):
    """Counts the lines that are not blank; the last one needs no newline."""

    def __init__(self) -> None:
        self._ended = 0
        #: Whether the line that has not ended holds anything.
        self._has_open = False

    def _read(self, piece: bytes) -> None:
        first = piece.find(b"\n")
        if first < 0:
            self._has_open = self._has_open or bool(piece.strip(_SPACE))
            return
        if self._has_open or piece[:first].strip(_SPACE):
            self._ended += 1
        # Of the lines that begin and end in here, all but the blank ones.
        self._has_open = False
        if first == len(piece) - 1:
            return  # a line a chunk, as most streams are sent
        self._ended += piece.count(b"\n", first + 1)
        self._ended -= len(_BLANK_LINE.findall(piece, first))
        self._has_open = bool(piece[piece.rfind(b"\n") + 1 :].strip(_SPACE))

    def _result(self) -> int:
        return self._ended + self._has_open

"""Streams: bodies cut into frames, and counted lines.

A frame is an event of a stream, a line, or the body as a whole. It is held until it is
complete. One that is larger than the bound is handed on in pieces instead, so that the
memory of a stream does not depend on what is in it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Protocol

from openmeter_wsgi.bodies.base import (
    MAX_DOCUMENT_BYTES,
    NDJSON,
    PIECE_BYTES,
    BodyReader,
    Reader,
    Unreadable,
    is_compressed,
    media_type,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

#: A larger event or line is read in pieces. Images travel in such events.
MAX_FRAME_BYTES = 2**18


class FrameSink(Protocol):
    """The reader of frames."""

    def read_whole(self, frames: bytes) -> None:
        """Read one or more whole frames, each with its separator."""

    def read_piece(self, piece: bytes) -> None:
        """Read a part of a frame that is too large."""

    def end_large(self) -> None:
        """Note that the frame whose parts were read is over."""


class Frames:
    """Cuts a body at each *separator*; without one the body is a single frame."""

    def __init__(self, separator: bytes = b"") -> None:
        self.separator = separator
        # A separator may begin in one chunk and end in the next.
        self._overlap = max(0, len(separator) - 1)
        self._bound = MAX_FRAME_BYTES if separator else MAX_DOCUMENT_BYTES
        #: The frame that is not whole yet, or the end of one that is too large.
        self.rest: bytearray = bytearray()
        #: That frame is read in pieces.
        self.is_large: bool = False

    def feed(self, text: bytes, sink: FrameSink) -> None:
        """Read the next bytes of the body, and hand to *sink* what they complete."""
        rest, separator = self.rest, self.separator
        if separator and not rest and not self.is_large and text.endswith(separator):
            sink.read_whole(text)  # the form in which most streams are sent
            return
        start = max(0, len(rest) - self._overlap)
        rest += text
        if self.is_large:
            start = self._end_large(start, sink)
        if separator and not self.is_large:
            end = rest.rfind(separator, start)
            if end >= 0:
                sink.read_whole(_taken(rest, end + len(separator)))
        if self.is_large or len(rest) > self._bound:
            self._hand_on(sink)

    def documents(self, frames: bytes) -> Iterator[bytes]:
        """Yield the document of each of some whole frames."""
        yield from frames.split(self.separator) if self.separator else (frames,)

    def _end_large(self, start: int, sink: FrameSink) -> int:
        end = self.rest.find(self.separator, start) if self.separator else -1
        if end < 0:
            return start
        self._hand_on_piece(_taken(self.rest, end), sink)
        sink.end_large()
        self.is_large = False
        return 0

    def _hand_on(self, sink: FrameSink) -> None:
        self.is_large = True
        end = len(self.rest) - self._overlap
        for start in range(0, end, PIECE_BYTES):
            piece = bytes(self.rest[start : min(end, start + PIECE_BYTES)])
            self._hand_on_piece(piece, sink)
        del self.rest[: max(0, end)]

    def _hand_on_piece(self, piece: bytes, sink: FrameSink) -> None:
        sink.read_piece(piece)


_DATA = b"data:"
_DATA_LINES = re.compile(rb"^data:([^\n]*\n?)", re.MULTILINE)


class EventStream(Frames):
    """Server-sent events, by the rules of the WHATWG HTML standard, 9.2.6.

    A line ends in LF, CR or both, a blank one ends the event; several ``data``
    lines are one text; what begins with a colon is a comment.
    """

    def __init__(self) -> None:
        super().__init__(b"\n\n")
        self._after_cr = False
        # For an event that is too large: the first bytes of a line that may become a
        # data line, and whether the present line is one; None at the start of a line.
        self._line_start = b""
        self._is_data: bool | None = None

    def feed(self, text: bytes, sink: FrameSink) -> None:
        """Read the next bytes of the body, and hand to *sink* what they complete."""
        if self._after_cr and text:
            self._after_cr = False
            if text[0] == 0x0A:
                text = text[1:]
        if b"\r" in text:
            self._after_cr = text.endswith(b"\r")
            text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        Frames.feed(self, text, sink)  # quicker than super(), for every chunk

    def documents(self, frames: bytes) -> Iterator[bytes]:
        """Yield the data of each event."""
        for event in frames.split(b"\n\n"):
            lines = [line[5:] for line in event.split(b"\n") if line.startswith(_DATA)]
            if lines:
                # One space after the colon is no part of the data; JSON minds none.
                yield b"\n".join(lines)

    def _end_large(self, start: int, sink: FrameSink) -> int:
        position = Frames._end_large(self, start, sink)
        if not self.is_large:
            self._line_start, self._is_data = b"", None
        return position

    def _hand_on_piece(self, piece: bytes, sink: FrameSink) -> None:
        """Hand on the data in a part of an event, without the names of the fields."""
        if data := self._data_in(self._line_start + piece):
            sink.read_piece(data)

    def _data_in(self, text: bytes) -> bytes:
        """Return the data in *text*, the next part of a large event."""
        self._line_start = data = b""
        if self._is_data is not None:
            line, newline, text = text.partition(b"\n")
            data = line + newline if self._is_data else b""
            if not newline:
                return data
        lines = _DATA_LINES.findall(text)
        last = text[text.rfind(b"\n") + 1 :]
        if len(last) < len(_DATA) and _DATA.startswith(last):
            self._line_start, self._is_data = last, None
        else:
            self._is_data = last.startswith(_DATA)
        return data + b"".join(lines)


def _taken(rest: bytearray, end: int) -> bytes:
    """Take the first *end* bytes out, copying them once."""
    with memoryview(rest) as view:
        taken = bytes(view[:end])
    del rest[:end]
    return taken


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

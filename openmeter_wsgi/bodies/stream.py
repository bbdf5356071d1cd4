"""Streams: a splitter of bodies into frames, and a counter of lines.

A frame is a server-sent event, a line, or the whole body. :class:`Frames` holds a frame
until it is complete, then passes it to a :class:`FrameSink`. A frame that grows larger
than the maximum size is passed on in pieces instead, so that memory is bounded.
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

#: Maximum size of an event or line that is held whole. Events with images are larger.
MAX_FRAME_BYTES = 2**18


class FrameSink(Protocol):
    """The interface of a consumer of frames."""

    def read_whole(self, frames: bytes) -> None:
        """Read one or more whole frames, each with its separator."""

    def read_piece(self, piece: bytes) -> None:
        """Read the next piece of a frame that is too large to be held."""

    def end_large(self) -> None:
        """End the frame that was read in pieces."""


class Frames:
    """A splitter of a body at each *separator*.

    Without a separator the whole body is one frame, which `feed` never completes.
    """

    def __init__(self, separator: bytes = b"") -> None:
        self.separator = separator
        # Bytes to search again: a separator may begin in one chunk and end in the next.
        self._overlap = max(0, len(separator) - 1)
        self._max_bytes = MAX_FRAME_BYTES if separator else MAX_DOCUMENT_BYTES
        #: The bytes of the incomplete frame that were not passed to the sink yet.
        self.rest: bytearray = bytearray()
        #: True if the incomplete frame is too large and is passed on in pieces.
        self.is_large: bool = False

    def feed(self, text: bytes, sink: FrameSink) -> None:
        """Read the next bytes of the body and pass complete frames to *sink*."""
        rest, separator = self.rest, self.separator
        if separator and not rest and not self.is_large and text.endswith(separator):
            sink.read_whole(text)  # most streams send whole frames in each chunk
            return
        start = max(0, len(rest) - self._overlap)
        rest += text
        if self.is_large:
            start = self._end_large(start, sink)
        if separator and not self.is_large:
            end = rest.rfind(separator, start)
            if end >= 0:
                sink.read_whole(_taken(rest, end + len(separator)))
        if self.is_large or len(rest) > self._max_bytes:
            self._pass_on(sink)

    def documents(self, frames: bytes) -> Iterator[bytes]:
        """Yield the document in each of several whole frames."""
        yield from frames.split(self.separator) if self.separator else (frames,)

    def _end_large(self, start: int, sink: FrameSink) -> int:
        """End the large frame if its separator is in `rest`.

        Return the position in `rest` at which to search for the next separator.
        """
        end = self.rest.find(self.separator, start) if self.separator else -1
        if end < 0:
            return start
        self._pass_on_piece(_taken(self.rest, end), sink)
        sink.end_large()
        self.is_large = False
        return 0

    def _pass_on(self, sink: FrameSink) -> None:
        """Pass `rest` on in pieces, except for the start of a possible separator."""
        self.is_large = True
        end = len(self.rest) - self._overlap
        for start in range(0, end, PIECE_BYTES):
            piece = bytes(self.rest[start : min(end, start + PIECE_BYTES)])
            self._pass_on_piece(piece, sink)
        del self.rest[: max(0, end)]

    def _pass_on_piece(self, piece: bytes, sink: FrameSink) -> None:
        sink.read_piece(piece)


_DATA = b"data:"
_DATA_LINES = re.compile(rb"^data:([^\n]*\n?)", re.MULTILINE)


class EventStream(Frames):
    """A splitter of server-sent events, after the WHATWG HTML standard, section 9.2.6.

    A line ends in LF, CR or CRLF, and a blank line ends the event. The ``data`` lines
    of an event are joined. A line that begins with a colon is a comment.
    """

    def __init__(self) -> None:
        super().__init__(b"\n\n")
        self._after_cr = False
        # The next two are used for an event that is too large:
        #: The first bytes of a line, as long as they may still become ``data:``.
        self._line_start = b""
        #: True if the current line is a data line; None if this is not known yet.
        self._is_data: bool | None = None

    def feed(self, text: bytes, sink: FrameSink) -> None:
        """Read the next bytes of the body and pass complete events to *sink*."""
        if self._after_cr and text:
            self._after_cr = False
            if text[0] == 0x0A:
                text = text[1:]
        if b"\r" in text:
            self._after_cr = text.endswith(b"\r")
            text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        Frames.feed(self, text, sink)  # faster than super(), and called for each chunk

    def documents(self, frames: bytes) -> Iterator[bytes]:
        """Yield the data of each event."""
        for event in frames.split(b"\n\n"):
            lines = [line[5:] for line in event.split(b"\n") if line.startswith(_DATA)]
            if lines:
                # The space after the colon is left in: JSON ignores it.
                yield b"\n".join(lines)

    def _end_large(self, start: int, sink: FrameSink) -> int:
        position = Frames._end_large(self, start, sink)
        if not self.is_large:
            self._line_start, self._is_data = b"", None
        return position

    def _pass_on_piece(self, piece: bytes, sink: FrameSink) -> None:
        """Pass on the content of the data lines in a piece of an event."""
        if data := self._data_in(self._line_start + piece):
            sink.read_piece(data)

    def _data_in(self, text: bytes) -> bytes:
        """Return the content of the data lines in *text*, a piece of a large event."""
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
    """Remove the first *end* bytes from *rest* and return them, copied only once."""
    with memoryview(rest) as view:
        taken = bytes(view[:end])
    del rest[:end]
    return taken


#: Media types of bodies whose lines may be records or not.
_UNSPECIFIC = frozenset({"", "text/plain", "application/octet-stream"})
_BLANK_LINE = re.compile(rb"\n[ \t\r]*(?=\n)")
_SPACE = b" \t\r"


def records_reader(
    content_type: str | None, content_encoding: str | None
) -> BodyReader[int]:
    """Return a reader of the number of records for a response with these headers.

    Other media types, such as HTML or a JSON document, give ``not_ndjson``.
    """
    if is_compressed(content_encoding):
        return Unreadable("compressed")
    if media_type(content_type) not in NDJSON | _UNSPECIFIC:
        return Unreadable("not_ndjson")
    return RecordsReader()


class RecordsReader(Reader[int]):
    """A counter of the lines that are not blank. The last line needs no newline."""

    def __init__(self) -> None:
        self._ended = 0
        #: True if the line that has not ended is not blank.
        self._has_open = False

    def _read(self, piece: bytes) -> None:
        first = piece.find(b"\n")
        if first < 0:
            self._has_open = self._has_open or bool(piece.strip(_SPACE))
            return
        if self._has_open or piece[:first].strip(_SPACE):
            self._ended += 1
        self._has_open = False
        if first == len(piece) - 1:
            return  # most streams send one line per chunk
        # Count the lines that begin and end in this piece, without the blank ones.
        self._ended += piece.count(b"\n", first + 1)
        self._ended -= len(_BLANK_LINE.findall(piece, first))
        self._has_open = bool(piece[piece.rfind(b"\n") + 1 :].strip(_SPACE))

    def _result(self) -> int:
        return self._ended + self._has_open

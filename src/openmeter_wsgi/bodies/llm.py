"""The reader of what a call of a language model used.

It reads JSON, a stream of server-sent events, and documents line by line or in a
list, and takes what it sees for what it is: handlers often leave the media type at
``text/html``.
"""

from __future__ import annotations

from openmeter_wsgi.bodies.json import EACH, JSONScanner, Selection
from openmeter_wsgi.bodies.llm_reports import LLMReports
from openmeter_wsgi.bodies.llm_usage import LLMUsage
from openmeter_wsgi.bodies.reader import (
    NDJSON,
    BodyReader,
    Reader,
    Unknown,
    Unreadable,
    is_compressed,
    media_type,
)
from openmeter_wsgi.bodies.stream import EventStream, Frames

_BOM = b"\xef\xbb\xbf"
_REPORT = dict.fromkeys(
    (
        b"type", b"model", b"modelVersion", b"usage", b"usageMetadata", b"meta",
        b"prompt_eval_count", b"eval_count",
    )
)  # fmt: skip
_WRAPPED = (b"response", b"message", b"delta", b"interaction", b"x_groq")
#: What of a document that is too large to be kept can matter.
WANTED = Selection({
    **_REPORT,
    **dict.fromkeys(_WRAPPED, Selection(_REPORT)),
    b"choices": EACH,
})  # fmt: skip


def llm_reader(
    content_type: str | None, content_encoding: str | None
) -> BodyReader[LLMUsage]:
    """Return a reader of :class:`LLMUsage` for a response with these headers."""
    if is_compressed(content_encoding):
        return Unreadable("compressed")
    return LLMReader(content_type)


class LLMReader(Reader[LLMUsage]):
    """Gathers what the documents of a body report of tokens.

    Unknown are: ``no_usage`` (read, and none was reported), ``not_json``,
    ``cut_off`` (ended within a document), ``too_large`` (see :attr:`skipped`).
    """

    def __init__(self, content_type: str | None = None) -> None:
        self._media_type = media_type(content_type)
        #: The first bytes, until they tell what the body is.
        self._head = b""
        #: None until then, and for what is no documents at all.
        self._frames: Frames | None = None
        self._is_foreign = False
        reports = self._reports = LLMReports()
        # Not a method of this reader: a cycle would keep bodies until the next gc.
        self._scanner = JSONScanner(WANTED, lambda document, _: reports.add(document))

    @property
    def skipped(self) -> int:
        """How many values were too large to be read, in documents that were so too."""
        return self._scanner.too_large

    def read_whole(self, frames: bytes) -> None:
        """Read one or more whole frames. Most hold a bit of text and no report."""
        if self._matters(self._reports, frames):
            self._add_documents(self._reports, frames)

    def read_piece(self, piece: bytes) -> None:
        """Read a part of a document that is too large to be kept."""
        self._scanner.feed(piece)

    def end_large(self) -> None:
        """Take in what was found of that document, if it was not closed."""
        self._reports.add(self._scanner.unfinished())
        self._scanner.reset()

    def _read(self, piece: bytes) -> None:
        if self._frames:
            self._frames.feed(piece, self)
        elif not self._is_foreign:
            self._begin(piece)

    def _begin(self, piece: bytes) -> None:
        """Tell by the first bytes what the body is."""
        head = self._head + piece
        if _BOM.startswith(head):
            self._head = head
            return
        head = head.removeprefix(_BOM).lstrip()
        if head:
            self._frames = self._frames_for(head[:1])
            self._is_foreign = self._frames is None
        self._head = b""
        if self._frames:
            self._frames.feed(head, self)

    def _frames_for(self, first: bytes) -> Frames | None:
        if self._media_type == "text/event-stream":
            return EventStream()
        if first == b"{" and self._media_type in NDJSON:
            return Frames(b"\n")
        if first in (b"{", b"["):
            return Frames()
        # The fields of an event stream: data, event, id, retry; a comment.
        return EventStream() if first in b":deir" else None

    @staticmethod
    def _matters(reports: LLMReports, text: bytes) -> bool:
        """Say whether *text* can hold a report.

        All figures are called ``…_tokens``, ``…TokenCount`` or ``…eval_count``.
        """
        if b"oken" in text or b"eval_count" in text:
            return True
        return reports.model is None and b'"model' in text

    def _add_documents(self, reports: LLMReports, frames: bytes) -> None:
        if self._frames is None:
            return
        for document in self._frames.documents(frames):
            if self._matters(reports, document) and not reports.add(document):
                reports.add_list(document)

    def _result(self) -> LLMUsage | Unknown:
        frames = self._frames
        if frames is None:
            return Unknown("not_json" if self._is_foreign else "no_usage")
        reports = self._reports.copy()
        reason = self._add_rest(reports, frames)
        return reports.usage() or Unknown("too_large" if self.skipped else reason)

    def _add_rest(self, reports: LLMReports, frames: Frames) -> str:
        """Add what the body ends with; return why there may be no usage."""
        if frames.is_large:
            reports.add(self._scanner.unfinished())
            return "cut_off" if self._scanner.is_inside else "no_usage"
        rest = frames.rest
        if frames.separator:
            self._add_documents(reports, bytes(rest))
            return "cut_off" if rest.strip() else "no_usage"
        if reports.add(rest) or reports.add_list(rest):
            return "no_usage"
        return _scan(reports, rest)


def _scan(reports: LLMReports, text: bytearray) -> str:
    """Add what is found in a body that was cut off, or holds several documents."""
    found = 0

    def add(document: bytes, _is_element: bool) -> None:
        nonlocal found
        found += 1
        reports.add(document)

    scanner = JSONScanner(WANTED, add)
    scanner.feed(bytes(text))
    reports.add(scanner.unfinished())
    if scanner.too_large or scanner.is_inside:
        return "too_large" if scanner.too_large else "cut_off"
    return "no_usage" if found else "not_json"

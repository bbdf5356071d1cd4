"""Multi-status responses: many parts, each with a status, as WebDAV XML or as JSON.

In XML (WebDAV's Multi-Status, RFC 4918, 13) a part is a ``response`` element:

- One with a ``status`` has that status.
- One with ``propstat`` elements succeeded if any of them did. PROPFIND (9.1) states 404
  for each property that a resource lacks; PROPPATCH (9.2) changes all properties or
  none, so that a failed one states no success.

A document type declaration is refused. WebDAV has none, and without it no entity can
expand endlessly or be fetched.

In JSON a part is an element of a list: ``[{"status": 200}]``, ``{"responses":
[{"statusCode": "404"}]}``, ``{"results": […]}``, ``{"items": [{"index": {"status":
201}}]}``.

A part without a status counts neither as succeeded nor as failed.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from xml.parsers import expat

import msgspec

from openmeter_wsgi.bodies.base import (
    BodyReader,
    Reader,
    Unknown,
    Unreadable,
    is_compressed,
)
from openmeter_wsgi.bodies.json import EACH, JSONScanner, Selection
from openmeter_wsgi.bodies.stream import Frames

if TYPE_CHECKING:
    from collections.abc import Mapping


class MultiStatus(msgspec.Struct, frozen=True):
    """The numbers of parts of a response that succeeded (2xx) and that failed."""

    succeeded: int
    failed: int


def multi_status_reader(
    _content_type: str | None, content_encoding: str | None
) -> BodyReader[MultiStatus]:
    """Return a reader of a :class:`MultiStatus` for a response with these headers.

    The first byte distinguishes XML from JSON; the media type is ignored.
    """
    if is_compressed(content_encoding):
        return Unreadable("compressed")
    return MultiStatusReader()


class MultiStatusReader(Reader[MultiStatus]):
    """A reader that counts the complete parts, even if the body is cut off.

    The reasons of `Unknown`: ``not_multi_status``, ``no_status`` (no part states one),
    ``not_xml``, ``doctype``, ``too_large`` (the XML exceeds a maximum below).
    """

    def __init__(self) -> None:
        #: The first bytes of the body, until they show its format.
        self._head = b""
        self._parts: MultiStatusXML | MultiStatusJSON | None = None
        #: True if the body has neither format.
        self._is_foreign = False

    def _read(self, piece: bytes) -> None:
        if self._parts is None and not self._is_foreign:
            piece = self._begin(piece)
        if self._parts is not None:
            self._parts.feed(piece)

    def _begin(self, piece: bytes) -> bytes:
        """Detect the format; return the bytes to parse, or b"" while it is unknown."""
        head = (self._head + piece).lstrip(b" \t\r\n")
        self._head = head[:4]
        if len(head) < 4:
            return b""
        self._head = b""
        first = head.removeprefix(b"\xef\xbb\xbf").strip(b"\xff\xfe\0")[:1]
        if first == b"<":
            self._parts = MultiStatusXML()
        elif first in (b"{", b"["):
            self._parts = MultiStatusJSON()
        else:
            self._is_foreign = True
        return head

    def _result(self) -> MultiStatus | Unknown:
        if self._parts is None:
            return Unknown("not_multi_status")
        counted = self._parts.counted()
        if isinstance(counted, str):
            return Unknown(counted)
        return MultiStatus(counted.succeeded, counted.failed)


#: ``207``, ``207 Multi-Status``, ``HTTP/1.1 207 Multi-Status``.
_STATUS = re.compile(
    r"\s*(?:HTTP/[\d.]+\s+)?([1-5]\d\d)(?:\s.*)?", re.ASCII | re.DOTALL
)


def status_code(status: object) -> int | None:
    """Return the code in *status*: a number, or the text of a code or status line."""
    if isinstance(status, str):
        match = _STATUS.fullmatch(status)
        return int(match[1]) if match else None
    if isinstance(status, int) and not isinstance(status, bool):
        return status if 100 <= status <= 599 else None
    return None


class Tally:
    """The numbers of parts that have succeeded and failed so far."""

    __slots__ = ("failed", "succeeded")

    def __init__(self) -> None:
        self.succeeded: int = 0
        self.failed: int = 0

    def count_code(self, code: int | None) -> None:
        """Count a part with the status *code*; do nothing if *code* is None."""
        if code is not None:
            self.count(is_success=200 <= code <= 299)

    def count(self, *, is_success: bool) -> None:
        """Count one more part."""
        if is_success:
            self.succeeded += 1
        else:
            self.failed += 1


_STATUSES = dict.fromkeys((b"status", b"statusCode", b"status_code", b"code"))
#: Elasticsearch wraps each result in an object under the name of the action.
_ACTIONS = (b"index", b"create", b"update", b"delete")
_LISTS = (b"responses", b"results", b"items")
_SELECTION = Selection({
    **_STATUSES,
    **dict.fromkeys(_ACTIONS, Selection(_STATUSES)),
    **dict.fromkeys(_LISTS, EACH),
})  # fmt: skip


class _Status(msgspec.Struct, gc=False):
    status: object = None
    camel: object = msgspec.field(default=None, name="statusCode")
    snake: object = msgspec.field(default=None, name="status_code")
    code: object = None

    def find_own_code(self) -> int | None:
        """Return the first member that is a status code, or None."""
        for value in (self.status, self.camel, self.snake, self.code):
            if (code := status_code(value)) is not None:
                return code
        return None


class _Part(_Status, gc=False):
    index: object = None
    create: object = None
    update: object = None
    delete: object = None

    def find_code(self) -> int | None:
        """Return the status of the part's action if it has one, else its own status."""
        for action in (self.index, self.create, self.update, self.delete):
            if isinstance(action, dict):
                return msgspec.convert(action, _Status).find_own_code()
        return self.find_own_code()


class _Lists(msgspec.Struct, gc=False):
    responses: list[_Part] | None = None
    results: list[_Part] | None = None
    items: list[_Part] | None = None

    def parts(self) -> list[_Part]:
        """Return the parts in all lists."""
        return [
            *(self.responses or ()), *(self.results or ()), *(self.items or ()),
        ]  # fmt: skip


_decode = msgspec.json.Decoder(list[_Part] | _Lists).decode
_decode_part = msgspec.json.Decoder(_Part).decode
#: All exceptions of decoding bytes; UnicodeDecodeError is a ValueError.
_UNDECODABLE = (msgspec.MsgspecError, ValueError, RecursionError)


class MultiStatusJSON:
    """A counter of the parts of a JSON body.

    A body of limited size is kept and decoded at the end. A larger one is scanned.
    """

    def __init__(self) -> None:
        self._frames = Frames()
        self._tally = Tally()
        self._scanner = _scanner(self._tally)

    def feed(self, text: bytes) -> None:
        """Read the next bytes of the document."""
        self._frames.feed(text, self)

    def read_whole(self, frames: bytes) -> None:
        """Never called: the body is one frame, which has no separator."""

    def read_piece(self, piece: bytes) -> None:
        """Read the next piece of a body that is too large to be kept."""
        self._scanner.feed(piece)

    def end_large(self) -> None:
        """Never called: the body is one frame."""

    def counted(self) -> Tally | str:
        """Return the counts, or the reason why there are none."""
        tally = self._tally
        if not self._frames.is_large:
            tally = _count(self._frames.rest)
        return tally if tally.succeeded or tally.failed else "no_status"


def _count(body: bytearray) -> Tally:
    tally = Tally()
    try:
        document = _decode(body)
    except _UNDECODABLE:  # cut off, or some parts are of another form
        _scanner(tally).feed(bytes(body))
        return tally
    for part in document.parts() if isinstance(document, _Lists) else document:
        tally.count_code(part.find_code())
    return tally


def _scanner(tally: Tally) -> JSONScanner:
    """Return a scanner that counts parts in *tally*."""

    # It must not refer to the `MultiStatusJSON`: that would make a reference cycle.
    def count_part(document: bytes, is_element: bool) -> None:
        if is_element:
            try:
                part = _decode_part(document)
            except _UNDECODABLE:
                return
            tally.count_code(part.find_code())

    return JSONScanner(_SELECTION, count_part)


# Limits of the memory that expat uses for a document:
#: Maximum depth of nesting: expat holds all open elements.
MAX_DEPTH = 256
#: Maximum number of different names of elements and attributes: expat holds all names.
MAX_NAMES = 10_000
#: Maximum size of a tag or comment: expat holds it until it is complete.
MAX_HELD_BYTES = 2**16
_MAX_STATUS_LENGTH = 256

_ROOT = "DAV: multistatus"
_RESPONSE = [_ROOT, "DAV: response"]
_OWN_STATUS = [*_RESPONSE, "DAV: status"]
_PROPSTAT_STATUS = [*_RESPONSE, "DAV: propstat", "DAV: status"]


class _Refused(Exception):
    """The document must not be read any further; the text is the reason."""


class MultiStatusXML:
    """A counter of the complete ``response`` elements of an XML body."""

    def __init__(self) -> None:
        self._responses = _Responses()
        self._problem = ""
        self._fed = 0
        self._names: dict[str, str] = {}
        parser = expat.ParserCreate(namespace_separator=" ", intern=self._names)
        parser.StartDoctypeDeclHandler = _refuse_doctype
        parser.StartElementHandler = self._responses.start
        parser.EndElementHandler = self._responses.end
        parser.CharacterDataHandler = self._responses.text
        self._parser = parser

    def counted(self) -> Tally | str:
        """Return the counts, or the reason why there are none."""
        if self._problem or self._responses.has_root:
            return self._problem or self._responses.tally
        return "not_multi_status"

    def feed(self, text: bytes) -> None:
        """Read the next bytes of the document."""
        if self._problem:
            return
        try:
            self._parser.Parse(text, False)
        except _Refused as refused:
            self._problem = str(refused)
        except (expat.ExpatError, LookupError, ValueError):
            self._problem = "not_xml"
        else:
            self._fed += len(text)
            held = self._fed - self._parser.CurrentByteIndex
            if held > MAX_HELD_BYTES or len(self._names) > MAX_NAMES:
                self._problem = "too_large"


class _Responses:
    """The handlers of the parser's events.

    It is separate from `MultiStatusXML`, which holds the parser: otherwise both would
    make a reference cycle.
    """

    def __init__(self) -> None:
        self.tally = Tally()
        self.has_root = False
        #: The names of the open elements.
        self._path: list[str] = []
        #: The text of the open ``status`` element, or None.
        self._status: str | None = None
        #: The status code of the open ``response`` itself.
        self._own: int | None = None
        #: For each status in its ``propstat`` elements: True if that is a success.
        self._propstats: set[bool] = set()

    def start(self, name: str, _attributes: Mapping[str, str]) -> None:
        """Handle the start of an element."""
        path = self._path
        if not path:
            if name != _ROOT:
                raise _Refused("not_multi_status")
            self.has_root = True
        if len(path) >= MAX_DEPTH:
            raise _Refused("too_large")
        path.append(name)
        if path == _RESPONSE:
            self._own, self._propstats = None, set()
        elif path in (_OWN_STATUS, _PROPSTAT_STATUS):
            self._status = ""

    def text(self, text: str) -> None:
        """Handle a piece of text."""
        if self._status is not None and len(self._status) < _MAX_STATUS_LENGTH:
            self._status += text

    def end(self, _name: str) -> None:
        """Handle the end of an element."""
        path = self._path
        if path == _RESPONSE:
            self._count()
        elif self._status is not None and path in (_OWN_STATUS, _PROPSTAT_STATUS):
            code = status_code(self._status)
            self._status = None
            if path == _OWN_STATUS:
                self._own = code
            elif code is not None:
                self._propstats.add(200 <= code <= 299)
        path.pop()

    def _count(self) -> None:
        """Count the response that ends. Without a status it is not counted."""
        if self._own is None and self._propstats:
            self.tally.count(is_success=any(self._propstats))
        else:
            self.tally.count_code(self._own)


def _refuse_doctype(*_declaration: object) -> None:
    raise _Refused("doctype")

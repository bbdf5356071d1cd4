"""The reader of a response that answers for many resources, each with a status."""

from __future__ import annotations

import msgspec

from openmeter_wsgi.bodies.media_types import is_compressed
from openmeter_wsgi.bodies.members import EACH, MemberScanner, Wanted
from openmeter_wsgi.bodies.multi_status_codes import Tally, status_code, succeeds
from openmeter_wsgi.bodies.multi_status_xml import MultiStatusXML
from openmeter_wsgi.bodies.reader import BodyReader, Reader, Unknown, Unreadable

_STATUS_NAMES = (b"status", b"statusCode", b"status_code", b"code")
#: Elasticsearch puts each result below the name of its action.
_ACTIONS = (b"index", b"create", b"update", b"delete")
_LISTS = (b"responses", b"results", b"items")
_STATUS = dict.fromkeys(_STATUS_NAMES)
_WANTED = Wanted({
    **_STATUS,
    **dict.fromkeys(_ACTIONS, Wanted(_STATUS)),
    **dict.fromkeys(_LISTS, EACH),
})  # fmt: skip
#: Everything that decoding bytes can raise; UnicodeDecodeError is a ValueError.
_UNDECODABLE = (msgspec.MsgspecError, ValueError, RecursionError)


class MultiStatus(msgspec.Struct, frozen=True):
    """How many parts of a response have succeeded (2xx), how many have not."""

    succeeded: int
    failed: int


def multi_status_reader(
    _content_type: str | None, content_encoding: str | None
) -> BodyReader[MultiStatus]:
    """Return a reader of a :class:`MultiStatus` for a response with these headers.

    The first byte tells XML from JSON; the media type is not asked.
    """
    if is_compressed(content_encoding):
        return Unreadable("compressed")
    return MultiStatusReader()


class MultiStatusReader(Reader[MultiStatus]):
    """Counts the parts that ended, also of a body that was cut off.

    Unknown are: ``not_multi_status``, ``no_status`` (no part states one),
    ``not_xml``, ``doctype`` and ``too_large`` (see :mod:`.multi_status_xml`).
    """

    def __init__(self) -> None:
        self._head = b""
        self._parts: MultiStatusXML | _MultiStatusJSON | None = None
        self._is_foreign = False

    def _read(self, piece: bytes) -> None:
        if self._parts is None and not self._is_foreign:
            piece = self._begin(piece)
        if self._parts is not None:
            self._parts.feed(piece)

    def _begin(self, piece: bytes) -> bytes:
        head = (self._head + piece).lstrip(b" \t\r\n")
        self._head = head[:4]
        if len(head) < 4:
            return b""
        self._head = b""
        first = head.removeprefix(b"\xef\xbb\xbf").strip(b"\xff\xfe\0")[:1]
        if first == b"<":
            self._parts = MultiStatusXML()
        elif first in (b"{", b"["):
            self._parts = _MultiStatusJSON()
        else:
            self._is_foreign = True
        return head

    def _result(self) -> MultiStatus | Unknown:
        if self._parts is None:
            return Unknown("not_multi_status")
        if reason := self._parts.problem():
            return Unknown(reason)
        tally = self._parts.tally
        return MultiStatus(tally.succeeded, tally.failed)


class _MultiStatusJSON:
    """A list of objects with a status, at the top or below a usual name.

    ``[{"status": 200}]``, ``{"responses": [{"statusCode": "404"}]}``,
    ``{"items": [{"index": {"status": 201}}]}``.
    """

    def __init__(self) -> None:
        tally = self.tally = Tally()

        def found(document: bytes, is_element: bool) -> None:
            if is_element and (code := _code_of(document)) is not None:
                tally.count(is_success=succeeds(code))

        self._scanner = MemberScanner(_WANTED, found)

    def feed(self, text: bytes) -> None:
        """Read the next bytes of the document."""
        self._scanner.feed(text)

    def problem(self) -> str:
        """Say why there are no counts, or nothing."""
        return "" if self.tally.succeeded or self.tally.failed else "no_status"


def _code_of(element: bytes) -> int | None:
    """Return the status of an element: its own, or that of its action."""
    try:
        members = msgspec.json.decode(element, type=dict[str, object])
    except _UNDECODABLE:
        return None
    for name in map(bytes.decode, _ACTIONS):
        if isinstance(inner := members.get(name), dict):
            members = inner
    codes = (status_code(members.get(name.decode())) for name in _STATUS_NAMES)
    return next((code for code in codes if code is not None), None)

"""The reader of a response that answers for many resources, each with a status."""

from __future__ import annotations

import msgspec

from openmeter_wsgi.bodies.media_types import is_compressed
from openmeter_wsgi.bodies.multi_status_json import MultiStatusJSON
from openmeter_wsgi.bodies.multi_status_xml import MultiStatusXML
from openmeter_wsgi.bodies.reader import BodyReader, Reader, Unknown, Unreadable


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
        self._parts: MultiStatusXML | MultiStatusJSON | None = None
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

"""The reader of a JSON document as a whole."""

from __future__ import annotations

import msgspec

from openmeter_wsgi.bodies.media_types import is_compressed
from openmeter_wsgi.bodies.reader import (
    MAX_DOCUMENT_BYTES,
    BodyReader,
    Reader,
    Unknown,
    Unreadable,
)

_decode = msgspec.json.Decoder().decode


class Document(msgspec.Struct, frozen=True):
    """A body that is JSON, decoded. It may be ``null``."""

    value: object


def json_reader(
    _content_type: str | None,
    content_encoding: str | None,
    max_bytes: int = MAX_DOCUMENT_BYTES,
) -> BodyReader[Document]:
    """Return a reader of a :class:`Document` for a response with these headers.

    The media type is not asked: handlers often leave it at ``text/html``.
    """
    if is_compressed(content_encoding):
        return Unreadable("compressed")
    return JSONReader(max_bytes)


class JSONReader(Reader[Document]):
    """Keeps up to *max_bytes* of a body and decodes it at the end.

    Unknown are: ``too_large``, ``not_json``, ``too_deep`` (beyond what is decoded),
    ``cut_off`` (ended within the document), ``empty``.
    """

    def __init__(self, max_bytes: int = MAX_DOCUMENT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._body = bytearray()
        #: Why nothing more is kept.
        self._reason = ""

    def _read(self, piece: bytes) -> None:
        if self._reason:
            return
        if not self._body:
            piece = piece.lstrip()
            if piece and piece[0] not in b'{["-0123456789tfn\xef':
                self._reason = "not_json"  # a page of HTML is not kept for nothing
                return
        self._body += piece
        if len(self._body) > self._max_bytes:
            self._reason = "too_large"
            self._body.clear()

    def _result(self) -> Document | Unknown:
        if self._reason:
            return Unknown(self._reason)
        text = self._body.removeprefix(b"\xef\xbb\xbf")
        if not text:
            return Unknown("empty")
        try:
            return Document(_decode(text))
        except RecursionError:
            return Unknown("too_deep")
        except (msgspec.MsgspecError, ValueError) as error:
            is_cut = "truncated" in str(error)
            return Unknown("cut_off" if is_cut else "not_json")

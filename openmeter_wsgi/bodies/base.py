"""The base class of all readers of response bodies.

A reader is made for one response, when the response's headers are known, and is fed
the chunks in the order in which they are sent. It is used by one thread, the one that
sends the response. Its memory is bounded for any length of body, and it never raises.
"""

from __future__ import annotations

from typing import Final, Generic, Protocol, TypeVar

import msgspec

from openmeter_wsgi.log import get_logger

logger: Final = get_logger(__name__)

#: Maximum size of a document that is kept whole and decoded at the end.
MAX_DOCUMENT_BYTES = 2**20
#: Size of the pieces in which a chunk is read, so that no huge chunk is copied whole.
PIECE_BYTES = 2**16

#: Media types of bodies with one JSON document per line.
NDJSON = frozenset({
    "application/x-ndjson", "application/ndjson", "application/jsonl",
    "application/x-jsonl", "application/jsonlines", "application/x-jsonlines",
    "application/json-lines", "application/stream+json",
})  # fmt: skip

T_co = TypeVar("T_co", covariant=True)


class Unknown(msgspec.Struct, frozen=True):
    """The absence of a value: the body states none. It does not mean zero."""

    #: The reason in a word or two: ``compressed``, ``too_large``, ``cut_off``,
    #: ``failed``, or a reason that the reader's docstring lists.
    reason: str


class BodyReader(Protocol[T_co]):
    """The interface of a reader."""

    def feed(self, chunk: bytes) -> None:
        """Read the next chunk. Never raises."""

    def result(self) -> T_co | Unknown:
        """Return the result so far; more chunks may follow. Never raises."""


class Reader(Generic[T_co]):
    """A :class:`BodyReader` that logs an exception and stops reading.

    A subclass implements `_read`, which gets at most :data:`PIECE_BYTES` at once, and
    `_result`.
    """

    _failed = False

    def feed(self, chunk: bytes) -> None:
        """Read the next chunk. Never raises."""
        if self._failed:
            return
        try:
            if len(chunk) <= PIECE_BYTES:
                self._read(chunk)
                return
            for start in range(0, len(chunk), PIECE_BYTES):
                self._read(chunk[start : start + PIECE_BYTES])
        except Exception as error:  # noqa: BLE001 - no error may stop the response
            self._fail(error)

    def result(self) -> T_co | Unknown:
        """Return the result so far; more chunks may follow. Never raises."""
        if not self._failed:
            try:
                return self._result()
            except Exception as error:  # noqa: BLE001
                self._fail(error)
        return Unknown("failed")

    def _read(self, piece: bytes) -> None:
        raise NotImplementedError

    def _result(self) -> T_co | Unknown:
        raise NotImplementedError

    def _fail(self, error: Exception) -> None:
        self._failed = True
        logger.error(
            "%s failed; the usage of this body is unknown",
            type(self).__name__,
            exc_info=error,
        )


class Unreadable(Reader[Unknown]):
    """A reader that ignores the body; its result is an `Unknown` with *reason*."""

    def __init__(self, reason: str) -> None:
        self._unknown = Unknown(reason)

    def feed(self, chunk: bytes) -> None:
        """Ignore the chunk."""

    def _result(self) -> Unknown:
        return self._unknown


def media_type(content_type: str | None) -> str:
    """Return the media type without its parameters, in lower case, or ``""``."""
    return (content_type or "").partition(";")[0].strip().lower()


def is_compressed(content_encoding: str | None) -> bool:
    """Return True if a ``Content-Encoding`` compresses the bytes."""
    codings = (coding.strip().lower() for coding in (content_encoding or "").split(","))
    return any(coding not in ("", "identity") for coding in codings)

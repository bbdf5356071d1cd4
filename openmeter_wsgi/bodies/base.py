"""The base of every reader of a response body.

A reader is made for one response, when its headers are known, and is fed the chunks
in the order in which they are sent. It belongs to the thread that sends them, keeps
bounded memory whatever the length of the body, and never raises.
"""

from __future__ import annotations

from typing import Final, Generic, Protocol, TypeVar

import msgspec

from openmeter_wsgi.log import get_logger

logger: Final = get_logger(__name__)

#: A document up to this size is kept whole and decoded at the end, in bytes.
MAX_DOCUMENT_BYTES = 2**20
#: A chunk is read in pieces of this size, so that a huge one is not copied whole.
PIECE_BYTES = 2**16

#: Media types of one JSON document a line.
NDJSON = frozenset({
    "application/x-ndjson", "application/ndjson", "application/jsonl",
    "application/x-jsonl", "application/jsonlines", "application/x-jsonlines",
    "application/json-lines", "application/stream+json",
})  # fmt: skip

T_co = TypeVar("T_co", covariant=True)


class Unknown(msgspec.Struct, frozen=True):
    """No value: the body does not state one. It is not zero."""

    #: Why, in a word or two: ``compressed``, ``too_large``, ``cut_off``, ``failed``,
    #: and what each reader adds to these.
    reason: str


class BodyReader(Protocol[T_co]):
    """The interface of a reader."""

    def feed(self, chunk: bytes) -> None:
        """Read the next chunk. Never raises."""

    def result(self) -> T_co | Unknown:
        """Return the result so far; more chunks may follow. Never raises."""


class Reader(Generic[T_co]):
    """A :class:`BodyReader` that logs an exception and gives up instead of raising.

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
        except Exception as error:  # noqa: BLE001 - the response goes on, whatever it is
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
            "%s failed; the usage of this body stays unknown",
            type(self).__name__,
            exc_info=error,
        )


class Unreadable(Reader[Unknown]):
    """Reads nothing, and gives the reason as its result."""

    def __init__(self, reason: str) -> None:
        self._unknown = Unknown(reason)

    def feed(self, chunk: bytes) -> None:
        """Let the chunk pass."""

    def _result(self) -> Unknown:
        return self._unknown


def media_type(content_type: str | None) -> str:
    """Return the media type without its parameters, in lower case, or ``""``."""
    return (content_type or "").partition(";")[0].strip().lower()


def is_compressed(content_encoding: str | None) -> bool:
    """Return True if a ``Content-Encoding`` compresses the bytes."""
    codings = (coding.strip().lower() for coding in (content_encoding or "").split(","))
    return any(coding not in ("", "identity") for coding in codings)

"""What every reader of a response body has in common.

A reader is made for one response, when its headers are known, and is fed the
chunks in the order in which they are sent. It belongs to the thread that sends
them, keeps bounded memory whatever the length of the body, and never raises.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

import msgspec

from openmeter_wsgi.log import get_logger

logger = get_logger(__name__)

#: A document up to this size is kept whole and decoded at the end, in bytes.
MAX_DOCUMENT_BYTES = 2**20
#: A chunk is read in pieces of this size, so that a huge one is not copied whole.
PIECE_BYTES = 2**16

T_co = TypeVar("T_co", covariant=True)


class Unknown(msgspec.Struct, frozen=True):
    """The body does not say, which is not the same as zero."""

    #: Why, in a word or two: ``compressed``, ``too_large``, ``cut_off``, ``failed``,
    #: and what each reader adds to these.
    reason: str


class BodyReader(Protocol[T_co]):
    """What the settlement sees of a reader."""

    def feed(self, chunk: bytes) -> None:
        """Read the next chunk. Never raises."""

    def result(self) -> T_co | Unknown:
        """Return what is known now; more chunks may follow. Never raises."""


class Reader(Generic[T_co]):
    """A :class:`BodyReader` that gives up, and says so, rather than raise.

    A subclass reads in `_read`, which gets at most :data:`PIECE_BYTES` at once,
    and answers in `_result`.
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
        """Return what is known now; more chunks may follow. Never raises."""
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
    """The reader of a body that cannot be read at all."""

    def __init__(self, reason: str) -> None:
        self._unknown = Unknown(reason)

    def feed(self, chunk: bytes) -> None:
        """Let the chunk pass."""

    def _result(self) -> Unknown:
        return self._unknown

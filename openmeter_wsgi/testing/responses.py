"""Responses to a test client, which may neither read them to the end nor close them."""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
#: A stream that has so many chunks may have no end: it is closed in the middle.
_MAX_CHUNKS = 10_000


class OpenResponses:
    """The responses that are not closed yet, the oldest first."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._open: weakref.WeakValueDictionary[int, Response] = (
            weakref.WeakValueDictionary()
        )

    def watch(self, settled: Iterable[bytes]) -> Response:
        """Return what a test client gets in place of a response that settles."""
        kind = _SizedResponse if hasattr(settled, "__len__") else Response
        response = kind(settled)
        self._open[next(self._numbers)] = response
        return response

    def finish(self) -> None:
        """Take each response of this thread to its end; what is read stays readable."""
        mine = threading.get_ident()
        for _, response in sorted(self._open.items()):
            if response.thread == mine:  # others have a server that closes theirs
                response.finish()


class Response:
    """A response that its client reads now, later, or never.

    What nobody closes counts as read to its end: so a server would have done.
    """

    def __init__(self, settled: Any) -> None:
        self.thread = threading.get_ident()
        self._settled = settled
        self._chunks: Iterator[bytes] | None = None
        self._read_ahead: deque[bytes] = deque()
        self._error: BaseException | None = None
        self._closed = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._read_ahead:
            return self._read_ahead.popleft()
        error, self._error = self._error, None
        if error is not None:
            raise error
        return next(self._rest())

    def close(self) -> None:
        """End it where it is."""
        self._closed = True
        self._settled.close()

    def finish(self) -> None:
        """Read what is left of it for a later reader, and close it."""
        if self._closed:
            return
        try:
            try:
                self._read_ahead.extend(islice(self._rest(), _MAX_CHUNKS))
            finally:
                self.close()
        except Exception as error:  # noqa: BLE001 - the application's: its reader gets it
            self._error = error

    def _rest(self) -> Iterator[bytes]:
        if self._chunks is None:
            self._chunks = iter(self._settled)
        return self._chunks

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.finish()


class _SizedResponse(Response):
    def __init__(self, settled: Any) -> None:
        super().__init__(settled)
        self._length = len(settled)

    def __len__(self) -> int:
        return self._length

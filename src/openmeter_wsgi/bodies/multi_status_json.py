"""The usual answers in JSON for many resources, each with a status.

``[{"status": 200}]``, ``{"responses": [{"statusCode": "404"}]}``, ``{"results": […]}``,
``{"items": [{"index": {"status": 201}}]}``. A part without a status counts as neither.
"""

from __future__ import annotations

import msgspec

from openmeter_wsgi.bodies.frames import Frames
from openmeter_wsgi.bodies.members import MemberScanner
from openmeter_wsgi.bodies.multi_status_codes import Tally, status_code
from openmeter_wsgi.bodies.wanted import EACH, Wanted

_STATUSES = dict.fromkeys((b"status", b"statusCode", b"status_code", b"code"))
#: Elasticsearch puts each result below the name of its action.
_ACTIONS = (b"index", b"create", b"update", b"delete")
_LISTS = (b"responses", b"results", b"items")
_WANTED = Wanted({
    **_STATUSES,
    **dict.fromkeys(_ACTIONS, Wanted(_STATUSES)),
    **dict.fromkeys(_LISTS, EACH),
})  # fmt: skip


class _Status(msgspec.Struct, gc=False):
    status: object = None
    camel: object = msgspec.field(default=None, name="statusCode")
    snake: object = msgspec.field(default=None, name="status_code")
    code: object = None

    def stated(self) -> int | None:
        """Return the first that is a status."""
        for value in (self.status, self.camel, self.snake, self.code):
            if (code := status_code(value)) is not None:
                return code
        return None


class _Part(_Status, gc=False):
    index: object = None
    create: object = None
    update: object = None
    delete: object = None

    def result(self) -> int | None:
        """Return its own status, or that of its action."""
        for action in (self.index, self.create, self.update, self.delete):
            if isinstance(action, dict):
                return msgspec.convert(action, _Status).stated()
        return self.stated()


class _Answer(msgspec.Struct, gc=False):
    responses: list[_Part] | None = None
    results: list[_Part] | None = None
    items: list[_Part] | None = None

    def parts(self) -> list[_Part]:
        """Return all parts."""
        return [
            *(self.responses or ()), *(self.results or ()), *(self.items or ()),
        ]  # fmt: skip


_decode = msgspec.json.Decoder(list[_Part] | _Answer).decode
_decode_part = msgspec.json.Decoder(_Part).decode
#: Everything that decoding bytes can raise; UnicodeDecodeError is a ValueError.
_UNDECODABLE = (msgspec.MsgspecError, ValueError, RecursionError)


class MultiStatusJSON:
    """Counts the parts of a body at its end, or as they pass if it is large."""

    def __init__(self) -> None:
        self._frames = Frames()
        self._tally = Tally()
        self._scanner = _scanner(self._tally)

    def feed(self, text: bytes) -> None:
        """Read the next bytes of the document."""
        self._frames.feed(text, self)

    def read_whole(self, frames: bytes) -> None:
        """Never called: the body is one frame, which is not over before the end."""

    def read_piece(self, piece: bytes) -> None:
        """Read a part of a body that is too large to be kept."""
        self._scanner.feed(piece)

    def end_large(self) -> None:
        """Never called: the body is one frame."""

    def counted(self) -> Tally | str:
        """Return the counts, or why there are none."""
        tally = self._tally
        if not self._frames.is_large:
            tally = _count(self._frames.rest)
        return tally if tally.succeeded or tally.failed else "no_status"


def _count(body: bytearray) -> Tally:
    tally = Tally()
    try:
        answer = _decode(body)
    except _UNDECODABLE:  # cut off, or not every part is as it should be
        _scanner(tally).feed(bytes(body))
        return tally
    for part in answer.parts() if isinstance(answer, _Answer) else answer:
        tally.count_code(part.result())
    return tally


def _scanner(tally: Tally) -> MemberScanner:
    """Return a scanner that counts into *tally*, and holds nothing else."""

    def found(document: bytes, is_element: bool) -> None:
        if is_element:
            try:
                part = _decode_part(document)
            except _UNDECODABLE:
                return
            tally.count_code(part.result())

    return MemberScanner(_WANTED, found)

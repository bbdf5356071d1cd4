r"""Members of a JSON document found as it passes, without holding the document.

The scanner boils each document down to the members that are asked for: of
``{"data": [0.1, …a gigabyte…], "usage": {"total_tokens": 8}}`` stays
``{"usage": {"total_tokens": 8}}``. A document is an object at the top, or an element
of a list at the top or of a list that is asked for; several may follow each other.

It takes what is well-formed as it is, and of what is not whatever looks like it:
the body is the application's, and nobody is billed for more than it says.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from openmeter_wsgi.bodies.wanted import EACH, NESTED, Wanted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

#: A value that is kept is not larger, in bytes: a usage object has a few hundred.
MAX_VALUE_BYTES = 2**14
_MAX_NAME_BYTES = 64
#: What is nested deeper is not read to its end: it would only cost time.
MAX_NESTING = 1_000

# Possessive, so that going back takes no memory.
_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_SCALAR = re.compile(rb"[^,}\]\s]*+")
_TO_DOCUMENT = re.compile(rb"[^{\[]*+")
_TO_ELEMENT = re.compile(rb'[^"{\[\]]*+')
_TO_NAME = re.compile(rb'[^"}]*+')
_TO_VALUE = re.compile(rb"[\s:]*+")


class _Level:
    """An object, or a list of documents, that is open and looked into."""

    __slots__ = ("is_list", "members", "name", "wanted")

    def __init__(self, wanted: Wanted, name: bytes, *, is_list: bool) -> None:
        self.wanted = wanted
        self.name = name
        self.is_list = is_list
        self.members: dict[bytes, bytes] = {}


class MemberScanner:
    """Hands each document, boiled down to *wanted*, to *found*.

    *found* also learns whether the document was an element of a list. Keeps a few
    kilobytes whatever passes. Each step reads on from a position to another one, and
    names the step that follows: a document may be cut anywhere.
    """

    def __init__(self, wanted: Wanted, found: Callable[[bytes, bool], object]) -> None:
        self._wanted = wanted
        self._found = found
        #: Values that were asked for and are too large to be kept, or nested too deep.
        self.too_large = 0
        self.reset()

    def reset(self) -> None:
        """Forget the document that has not ended: another one begins."""
        self._levels: list[_Level] = []
        # No bound method: with a cycle it would live until the next collection.
        self._step = MemberScanner._outside
        self._name = b""
        self._value: bytearray | None = None
        self._nesting = 0
        self._after_backslash = False

    @property
    def is_inside(self) -> bool:
        """Whether a document, or a list of them, has begun and not ended."""
        return bool(self._levels)

    def feed(self, text: bytes) -> None:
        """Read the next bytes, cut anywhere."""
        position, end = 0, len(text)
        while position < end:
            position = self._step(self, text, position)

    def unfinished(self) -> bytes:
        """Return what was found so far of the document that has not ended."""
        document, name = b"{}", b""
        for level in reversed(self._levels):
            if level.is_list:
                break
            inner = {name: document} if name else {}
            document, name = _joined(level.members | inner), level.name
        return document

    def _outside(self, text: bytes, position: int) -> int:
        position = _TO_DOCUMENT.match(text, position).end()  # type: ignore[union-attr]
        if position < len(text):
            self._open(self._wanted, b"", is_list=text[position] == 0x5B)
        return position + 1

    def _in_list(self, text: bytes, position: int) -> int:
        position = _TO_ELEMENT.match(text, position).end()  # type: ignore[union-attr]
        first = text[position : position + 1]
        if first == b"{":
            self._open(self._levels[-1].wanted, b"", is_list=False)
        elif first == b"]":
            self._levels.pop()
            self._go_on()
        elif first:
            self._begin_value(first)
        return position + 1

    def _in_object(self, text: bytes, position: int) -> int:
        others = self._levels[-1].wanted.others
        position = others.match(text, position).end()  # type: ignore[union-attr]
        position = _TO_NAME.match(text, position).end()  # type: ignore[union-attr]
        if position < len(text):
            if text[position] == 0x7D:
                self._close()
            else:
                self._name = b""
                self._step = MemberScanner._in_name
        return position + 1

    def _in_name(self, text: bytes, position: int) -> int:
        end = self._end_of_string(text, position)
        if len(self._name) <= _MAX_NAME_BYTES:
            self._name += text[position:end]
        if end < len(text):
            self._step = MemberScanner._to_value
        return end + 1

    def _to_value(self, text: bytes, position: int) -> int:
        position = _TO_VALUE.match(text, position).end()  # type: ignore[union-attr]
        first = text[position : position + 1]
        if not first:
            return position
        level = self._levels[-1]
        is_wanted = self._name in level.wanted.members
        inner = level.wanted.members.get(self._name)
        if inner is EACH and first == b"[":
            self._open(level.wanted, self._name, is_list=True)
            return position + 1
        if inner not in (None, EACH) and first == b"{":
            self._open(inner, self._name, is_list=False)
            return position + 1
        if is_wanted and inner is None:
            self._value = bytearray()
        return position + self._begin_value(first)

    def _begin_value(self, first: bytes) -> int:
        """Choose the step that reads a value; return how much of it is read."""
        self._nesting = 0
        if first in (b"{", b"["):
            self._nesting = 1
            self._step = MemberScanner._in_nested
        elif first == b'"':
            self._step = MemberScanner._in_string
        else:
            self._step = MemberScanner._in_scalar
            return 0
        self._keep(first)
        return 1

    def _in_nested(self, text: bytes, position: int) -> int:
        end = NESTED.match(text, position).end()  # type: ignore[union-attr]
        self._keep(text[position : end + 1])
        last = text[end : end + 1]
        if last == b'"':
            self._step = MemberScanner._in_string
        elif last in (b"{", b"["):
            self._nesting += 1
            if self._nesting > MAX_NESTING:
                self.too_large += 1
                self._step = MemberScanner._ignore
        elif last:
            self._nesting -= 1
            if not self._nesting:
                self._end_value()
        return end + 1

    def _ignore(self, text: bytes, position: int) -> int:
        return max(position, len(text))

    def _in_string(self, text: bytes, position: int) -> int:
        end = self._end_of_string(text, position)
        self._keep(text[position : end + 1])
        if end < len(text):
            if self._nesting:
                self._step = MemberScanner._in_nested
            else:
                self._end_value()
        return end + 1

    def _in_scalar(self, text: bytes, position: int) -> int:
        end = _SCALAR.match(text, position).end()  # type: ignore[union-attr]
        self._keep(text[position:end])
        if end < len(text):
            self._end_value()
        return end

    def _end_of_string(self, text: bytes, position: int) -> int:
        """Return where the closing quote is, or the end of *text*."""
        start = position + self._after_backslash
        end = _STRING.match(text, start).end()  # type: ignore[union-attr]
        # Only the last byte can be a backslash that escapes nothing yet.
        self._after_backslash = text[end : end + 1] == b"\\"
        return end + self._after_backslash

    def _keep(self, part: bytes) -> None:
        if self._value is not None and len(self._value) <= MAX_VALUE_BYTES:
            self._value += part

    def _end_value(self) -> None:
        if self._value is not None:
            if len(self._value) <= MAX_VALUE_BYTES:
                self._levels[-1].members[self._name] = bytes(self._value)
            else:
                self.too_large += 1
            self._value = None
        self._go_on()

    def _open(self, wanted: Wanted, name: bytes, *, is_list: bool) -> None:
        self._levels.append(_Level(wanted, name, is_list=is_list))
        self._go_on()

    def _close(self) -> None:
        level = self._levels.pop()
        document = _joined(level.members)
        if level.name:
            self._levels[-1].members[level.name] = document
        else:
            self._found(document, self.is_inside)
        self._go_on()

    def _go_on(self) -> None:
        if not self._levels:
            self._step = MemberScanner._outside
        elif self._levels[-1].is_list:
            self._step = MemberScanner._in_list
        else:
            self._step = MemberScanner._in_object


def _joined(members: Mapping[bytes, bytes]) -> bytes:
    found = (b'"%b":%b' % member for member in members.items())
    return b"{" + b",".join(found) + b"}"

r"""JSON: a document as a whole, a number in it, and members found as it passes.

:class:`JSONScanner` reads a document without holding it, and reduces it to the members
that are selected: ``{"data": [0.1, …a gigabyte…], "usage": {"total_tokens": 8}}`` to
``{"usage": {"total_tokens": 8}}``. A document is an object at the top, or an element of
a list at the top or of a list that is selected; several may follow each other.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import msgspec

from openmeter_wsgi.bodies.base import (
    MAX_DOCUMENT_BYTES,
    BodyReader,
    Reader,
    Unknown,
    Unreadable,
    is_compressed,
)
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.values import is_finite

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

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


class NumberPath:
    """A JSONPath, compiled once; any thread may use it.

    :raises ConfigError: if *path* is no JSONPath, or the library is not installed.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._path = _compiled(path)

    def __repr__(self) -> str:
        return f"NumberPath({self.path!r})"

    def find_number(self, document: object) -> int | float | Unknown:
        """Return the number that the path leads to; several are added up.

        Unknown are: ``no_match``, ``too_deep`` (nested beyond what the library
        follows), and ``null``, ``negative`` or ``not_a_number`` where any of what it
        leads to is that. Text is no number, nor is a boolean. No term is negative, or
        what a customer sends, and the response echoes, would lower a sum.
        """
        try:
            found = self._path.findall(document)
        except RecursionError:
            return Unknown("too_deep")
        except Exception:  # noqa: BLE001 - a filter that does not suit the document
            return Unknown("no_match")
        if not found:
            return Unknown("no_match")
        if any(value is None for value in found):
            return Unknown("null")
        if not all(map(_is_number, found)):
            return Unknown("not_a_number")
        if any(value < 0 for value in found):
            return Unknown("negative")
        try:
            total = sum(found)
        except OverflowError:  # of integers that no float can hold, and a float
            return Unknown("not_a_number")
        return total if _is_number(total) else Unknown("not_a_number")


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return is_finite(value)


def _compiled(path: str) -> Any:
    try:
        import jsonpath  # here, for only who names a path needs the library
    except ModuleNotFoundError:
        problem = (
            f"{path!r}: a JSONPath needs python-jsonpath; "
            "run: pip install 'openmeter_wsgi[jsonpath]'"
        )
        raise ConfigError([problem]) from None
    problem = f"expected a JSONPath such as '$.usage.total_tokens', got {path!r}"
    if path == "":  # the library takes it for the whole document
        raise ConfigError([problem])
    try:
        return jsonpath.compile(path)
    except (jsonpath.JSONPathError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError([f"{problem}: {error}"]) from None


# One expression skips members at once, down to some depth: a step in Python costs as
# much as a hundred bytes here. Possessive, so that going back takes no memory.
_TEXT = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_FLAT = rb'[^"{}\[\]]*+(?:%b[^"{}\[\]]*+)*+' % _TEXT
_DEEP = rb"%b(?:[{\[]%b[}\]]%b)*+" % (_FLAT, _FLAT, _FLAT)
_DEEPER = rb"%b(?:[{\[]%b[}\]]%b)*+" % (_FLAT, _DEEP, _FLAT)
#: The inside of a list or object, as far as it is not nested too deep.
NESTED = re.compile(_DEEPER, re.DOTALL)
_VALUE = rb"(?:%b|[{\[]%b[}\]]|[^][{}\",\s]++(?=[],}\s]))" % (_TEXT, _DEEPER)
_MEMBER = rb'[^"}]*+"(?!(?:%b)")[^"\\]*+"\s*+:\s*+%b'


class Selection:
    """The members of a document that are kept.

    None keeps a value. Another `Selection` looks into an object, or into the objects of
    a list, of which it keeps the last one that has any of the members. :data:`EACH`
    makes documents of the elements of a list, with the selection of the object around.
    """

    def __init__(self, members: Mapping[bytes, Selection | None]) -> None:
        self.members = members
        names = b"|".join(map(re.escape, members))
        #: Skips the members that are not selected, one by one.
        self.others: re.Pattern[bytes] = re.compile(
            rb"(?:%b)*+" % (_MEMBER % (names, _VALUE)), re.DOTALL
        )


#: See :class:`Selection`.
EACH = Selection({})

#: A value that is kept is not larger, in bytes: a usage object has a few hundred.
MAX_VALUE_BYTES = 2**14
_MAX_NAME_BYTES = 64
#: What is nested deeper is not read to its end. Python's own JSON goes less deep, so
#: that nothing a handler has decoded hides what follows it.
MAX_NESTING = 100_000

# Possessive, so that going back takes no memory.
_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_SCALAR = re.compile(rb"[^,}\]\s]*+")
#: White space, commas, the separator of RFC 7464, a byte order mark.
_TO_DOCUMENT = re.compile(rb"[\s,\x1e\xef\xbb\xbf]*+")
_TO_ELEMENT = re.compile(rb'[^"{\[\]]*+')
_TO_NAME = re.compile(rb'[^"}]*+')
_TO_VALUE = re.compile(rb"[\s:]*+")
#: The key of the last object of a list that is kept.
_LAST = b"last"


class _Level:
    """An object or a list that is open and looked into."""

    __slots__ = ("is_kept", "is_list", "members", "name", "selection")

    def __init__(
        self, selection: Selection, name: bytes, *, is_list: bool, is_kept: bool
    ) -> None:
        self.selection = selection
        self.name = name
        self.is_list = is_list
        #: The last object of this list is kept under the name of the list.
        self.is_kept = is_kept
        self.members: dict[bytes, bytes] = {}

    def value(self) -> bytes:
        """Return the kept members as JSON."""
        if self.is_kept:
            return b"[%b]" % self.members.get(_LAST, b"")
        found = (b'"%b":%b' % member for member in self.members.items())
        return b"{%b}" % b",".join(found)


class JSONScanner:
    """Reduces each document to *selection* and hands it to *found*.

    *found* also learns whether the document was an element of a list. The scanner keeps
    a few kilobytes whatever passes. It skips text that is no JSON: all of it where the
    text begins so, and after a document the rest of the line.

    Each step reads on from a position to another one, and sets the step that follows: a
    document may be cut anywhere.
    """

    def __init__(
        self, selection: Selection, found: Callable[[bytes, bool], object]
    ) -> None:
        self._selection = selection
        self._found = found
        #: Selected values that are too large to be kept, and documents nested too deep.
        self.too_large: int = 0
        self.reset()

    def reset(self) -> None:
        """Forget the document that has not ended: another one begins."""
        self._levels: list[_Level] = []
        # No bound method: with a cycle it would live until the next collection.
        self._step = JSONScanner._outside
        #: Whether there has been a document, or a list of them.
        self.has_begun: bool = False
        self._name = b""
        self._value: bytearray | None = None
        self._nesting = 0
        self._after_backslash = False

    @property
    def is_inside(self) -> bool:
        """True if a document, or a list of them, has begun and not ended."""
        return bool(self._levels)

    def feed(self, text: bytes) -> None:
        """Read the next bytes, cut anywhere."""
        position, end = 0, len(text)
        while position < end:
            position = self._step(self, text, position)

    def unfinished(self) -> bytes:
        """Return the members found in a document that has not ended."""
        document, name = b"{}", b""
        for level in reversed(self._levels):
            if level.is_list and not level.is_kept:
                break
            key = _LAST if level.is_kept else name
            if key and document != b"{}":
                level.members[key] = document
            document, name = b"{}", level.name
            if level.members:
                document = level.value()
        return document

    def _outside(self, text: bytes, position: int) -> int:
        position = _TO_DOCUMENT.match(text, position).end()  # type: ignore[union-attr]
        first = text[position : position + 1]
        if first in (b"{", b"["):
            self.has_begun = True
            self._open(self._selection, b"", is_list=first == b"[")
        elif first:
            to_line, ignore = JSONScanner._to_next_line, JSONScanner._ignore
            self._step = to_line if self.has_begun else ignore
        return position + 1

    def _to_next_line(self, text: bytes, position: int) -> int:
        end = text.find(b"\n", position)
        if end < 0:
            return len(text)
        self._step = JSONScanner._outside
        return end

    def _in_list(self, text: bytes, position: int) -> int:
        position = _TO_ELEMENT.match(text, position).end()  # type: ignore[union-attr]
        first = text[position : position + 1]
        if first == b"{":
            self._open(self._levels[-1].selection, b"", is_list=False)
        elif first == b"]":
            level = self._levels.pop()
            if level.is_kept and level.members:
                self._levels[-1].members[level.name] = level.value()
            self._go_on()
        elif first:
            self._begin_value(first)
        return position + 1

    def _in_object(self, text: bytes, position: int) -> int:
        others = self._levels[-1].selection.others
        position = others.match(text, position).end()  # type: ignore[union-attr]
        position = _TO_NAME.match(text, position).end()  # type: ignore[union-attr]
        if position < len(text):
            if text[position] == 0x7D:
                self._close()
            else:
                self._name = b""
                self._step = JSONScanner._in_name
        return position + 1

    def _in_name(self, text: bytes, position: int) -> int:
        end = self._end_of_string(text, position)
        if len(self._name) <= _MAX_NAME_BYTES:
            self._name += text[position:end]
        if end < len(text):
            self._step = JSONScanner._to_value
        return end + 1

    def _to_value(self, text: bytes, position: int) -> int:
        position = _TO_VALUE.match(text, position).end()  # type: ignore[union-attr]
        first = text[position : position + 1]
        if not first:
            return position
        level = self._levels[-1]
        is_selected = self._name in level.selection.members
        inner = level.selection.members.get(self._name)
        if inner is EACH and first == b"[":
            self._open(level.selection, self._name, is_list=True)
            return position + 1
        if inner not in (None, EACH) and first in (b"{", b"["):
            self._open(inner, self._name, is_list=first == b"[", is_kept=first == b"[")
            return position + 1
        if is_selected and inner is None:
            self._value = bytearray()
        return position + self._begin_value(first)

    def _begin_value(self, first: bytes) -> int:
        """Choose the step that reads a value; return how much of it is read."""
        self._nesting = 0
        if first in (b"{", b"["):
            self._nesting = 1
            self._step = JSONScanner._in_nested
        elif first == b'"':
            self._step = JSONScanner._in_string
        else:
            self._step = JSONScanner._in_scalar
            return 0
        self._keep(first)
        return 1

    def _in_nested(self, text: bytes, position: int) -> int:
        end = NESTED.match(text, position).end()  # type: ignore[union-attr]
        self._keep(text[position : end + 1])
        last = text[end : end + 1]
        if last == b'"':
            self._step = JSONScanner._in_string
        elif last in (b"{", b"["):
            self._nesting += 1
            if self._nesting > MAX_NESTING:
                self.too_large += 1
                self._step = JSONScanner._ignore
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
                self._step = JSONScanner._in_nested
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
        """Return the place of the closing quote, or the end of *text*."""
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

    def _open(
        self,
        selection: Selection,
        name: bytes,
        *,
        is_list: bool,
        is_kept: bool = False,
    ) -> None:
        self._levels.append(_Level(selection, name, is_list=is_list, is_kept=is_kept))
        self._go_on()

    def _close(self) -> None:
        level = self._levels.pop()
        outer = self._levels[-1] if self._levels else None
        if level.name and outer:
            outer.members[level.name] = level.value()
        elif outer is None or not outer.is_kept:
            self._found(level.value(), self.is_inside)
        elif level.members:
            outer.members[_LAST] = level.value()
        self._go_on()

    def _go_on(self) -> None:
        if not self._levels:
            self._step = JSONScanner._outside
        elif self._levels[-1].is_list:
            self._step = JSONScanner._in_list
        else:
            self._step = JSONScanner._in_object

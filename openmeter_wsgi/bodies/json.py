r"""JSON: decode a whole body, find a number in it, or scan a body of any size.

- :class:`JSONReader` keeps a body of limited size and decodes it at the end.
- :class:`NumberPath` finds a number in a decoded document.
- :class:`JSONScanner` reads documents of any size, in chunks, and keeps the selected
  members alone: it reduces ``{"data": [0.1, …a gigabyte…], "usage": {"total": 8}}`` to
  ``{"usage": {"total": 8}}``. The scanner's *document* is a top-level object, or an
  object in a top-level list or in a selected list. A body may hold several documents.
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
    """A decoded JSON body. Its value may be None, for ``null``."""

    value: object


def json_reader(
    _content_type: str | None,
    content_encoding: str | None,
    max_bytes: int = MAX_DOCUMENT_BYTES,
) -> BodyReader[Document]:
    """Return a reader of a :class:`Document` for a response with these headers.

    The media type is ignored: handlers often leave it at ``text/html``.
    """
    if is_compressed(content_encoding):
        return Unreadable("compressed")
    return JSONReader(max_bytes)


class JSONReader(Reader[Document]):
    """A reader that keeps up to *max_bytes* of a body and decodes it at the end.

    The reasons of `Unknown`: ``too_large``, ``not_json``, ``too_deep`` (nested deeper
    than the decoder goes), ``cut_off`` (the body ended within the document), ``empty``.
    """

    def __init__(self, max_bytes: int = MAX_DOCUMENT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._body = bytearray()
        #: The reason why the body is no longer kept, or "".
        self._reason = ""

    def _read(self, piece: bytes) -> None:
        if self._reason:
            return
        if not self._body:
            piece = piece.lstrip()
            if piece and piece[0] not in b'{["-0123456789tfn\xef':
                self._reason = "not_json"  # saves the memory for a page of HTML
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
    """A compiled JSONPath that finds a number in a document. Thread-safe.

    :raises ConfigError: if *path* is no JSONPath, or python-jsonpath is not installed.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._path = _compiled(path)

    def __repr__(self) -> str:
        return f"NumberPath({self.path!r})"

    def find_number(self, document: object) -> int | float | Unknown:
        """Return the sum of all values that the path matches in *document*.

        The reasons of `Unknown`: ``no_match``, ``too_deep`` (nested deeper than the
        library goes), and ``null``, ``negative`` or ``not_a_number`` if any matched
        value is. Text and booleans are not numbers. A negative value is rejected
        because a customer might lower the sum by a value that the response echoes.
        """
        try:
            values = self._path.findall(document)
        except RecursionError:
            return Unknown("too_deep")
        except Exception:  # noqa: BLE001 - a filter that does not suit the document
            return Unknown("no_match")
        if not values:
            return Unknown("no_match")
        if any(value is None for value in values):
            return Unknown("null")
        if not all(map(_is_number, values)):
            return Unknown("not_a_number")
        if any(value < 0 for value in values):
            return Unknown("negative")
        try:
            total = sum(values)
        except OverflowError:  # a float added to an integer larger than any float
            return Unknown("not_a_number")
        return total if _is_number(total) else Unknown("not_a_number")


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return is_finite(value)


def _compiled(path: str) -> Any:
    try:
        import jsonpath  # here: the library is optional
    except ModuleNotFoundError:
        problem = (
            f"{path!r}: a JSONPath needs python-jsonpath; "
            "run: pip install 'openmeter_wsgi[jsonpath]'"
        )
        raise ConfigError([problem]) from None
    problem = f"expected a JSONPath such as '$.usage.total_tokens', got {path!r}"
    if path == "":  # python-jsonpath matches the whole document with it
        raise ConfigError([problem])
    try:
        return jsonpath.compile(path)
    except (jsonpath.JSONPathError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError([f"{problem}: {error}"]) from None


# Regular expressions that skip a whole value or member, nested up to three levels deep.
# They are there for speed: a step in Python takes as long as matching a hundred bytes.
# All quantifiers are possessive, so that no memory is used for backtracking.
_TEXT = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_FLAT = rb'[^"{}\[\]]*+(?:%b[^"{}\[\]]*+)*+' % _TEXT
_DEEP = rb"%b(?:[{\[]%b[}\]]%b)*+" % (_FLAT, _FLAT, _FLAT)
_DEEPER = rb"%b(?:[{\[]%b[}\]]%b)*+" % (_FLAT, _DEEP, _FLAT)
# Matches the content of a list or object up to its end, or up to a bracket nested
# deeper than three levels, or up to a string or bracket that does not end in the chunk.
_NESTED = re.compile(_DEEPER, re.DOTALL)
_VALUE = rb"(?:%b|[{\[]%b[}\]]|[^][{}\",\s]++(?=[],}\s]))" % (_TEXT, _DEEPER)
_MEMBER = rb'[^"}]*+"(?!(?:%b)")[^"\\]*+"\s*+:\s*+%b'


class Selection:
    """The members of a document that are kept.

    Maps the name of a member to one of these:

    - None: keep its value.
    - a `Selection`: keep the selected members of its value, an object. If the value is
      a list, keep the last object in it that has any of the selected members.
    - :data:`EACH`: treat each object in its value, a list, as a document, and apply
      to it the selection in which EACH stands.
    """

    def __init__(self, members: Mapping[bytes, Selection | None]) -> None:
        self.members = members
        names = b"|".join(map(re.escape, members))
        #: Matches a run of members that are not selected.
        self.unselected: re.Pattern[bytes] = re.compile(
            rb"(?:%b)*+" % (_MEMBER % (names, _VALUE)), re.DOTALL
        )


#: See :class:`Selection`.
EACH = Selection({})

#: Maximum size of a value that is kept. A usage object has a few hundred bytes.
MAX_VALUE_BYTES = 2**14
_MAX_NAME_BYTES = 64
#: Maximum depth of nesting; a document nested deeper is read no further. Python's JSON
#: decodes no such document, so a handler cannot send one that hides a later report.
MAX_NESTING = 100_000

_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_SCALAR = re.compile(rb"[^,}\]\s]*+")
# Each `_TO_…` matches the text before the next token of interest.
#: White space, commas, the separator of RFC 7464, a byte order mark.
_TO_DOCUMENT = re.compile(rb"[\s,\x1e\xef\xbb\xbf]*+")
_TO_ELEMENT = re.compile(rb'[^"{\[\]]*+')
_TO_NAME = re.compile(rb'[^"}]*+')
_TO_VALUE = re.compile(rb"[\s:]*+")
#: The key, in the level of a list, of the last object that is kept.
_LAST = b"last"


class _Level:
    """An object or list that has begun and whose members are looked at."""

    __slots__ = ("is_list", "keeps_last", "members", "name", "selection")

    def __init__(
        self, selection: Selection, name: bytes, *, is_list: bool, keeps_last: bool
    ) -> None:
        self.selection = selection
        self.name = name
        self.is_list = is_list
        #: True for a list of which the last object is kept.
        self.keeps_last = keeps_last
        self.members: dict[bytes, bytes] = {}

    def value(self) -> bytes:
        """Return the kept members, or a list of the kept object, as JSON."""
        if self.keeps_last:
            return b"[%b]" % self.members.get(_LAST, b"")
        members = (b'"%b":%b' % member for member in self.members.items())
        return b"{%b}" % b",".join(members)


class JSONScanner:
    """A state machine that reduces each document to the members of *selection*.

    It calls ``on_document(reduced, is_element)`` with each reduced document as JSON;
    *is_element* is True if the document was in a list. It keeps a few kilobytes, for
    any size of document. If the text does not begin with JSON, it skips all of the
    text. If other text follows a document, it skips the rest of the line.

    The state is the method in `_step`. It reads from a position in a chunk, returns the
    position at which the next step continues, and sets `_step` where the state changes.
    So a chunk may end anywhere in a document.
    """

    def __init__(
        self, selection: Selection, on_document: Callable[[bytes, bool], object]
    ) -> None:
        self._selection = selection
        self._on_document = on_document
        #: Number of selected values that were too large to keep, and of documents that
        #: were nested too deep.
        self.skipped: int = 0
        self.reset()

    def reset(self) -> None:
        """Drop the document that has not ended, and begin with another text."""
        self._levels: list[_Level] = []
        # A function: a bound method would make a reference cycle, which would keep the
        # scanner in memory until the next garbage collection.
        self._step = JSONScanner._between_documents
        #: True if a document, or a list of documents, has begun.
        self.has_begun: bool = False
        self._name = b""
        self._value: bytearray | None = None
        self._nesting = 0
        self._after_backslash = False

    @property
    def is_inside(self) -> bool:
        """True if a document, or a list of documents, has begun and not ended."""
        return bool(self._levels)

    def feed(self, text: bytes) -> None:
        """Read the next bytes. They may begin and end anywhere in a document."""
        position, end = 0, len(text)
        while position < end:
            position = self._step(self, text, position)

    def unfinished(self) -> bytes:
        """Return the members kept so far of a document that has not ended."""
        document, name = b"{}", b""
        for level in reversed(self._levels):
            if level.is_list and not level.keeps_last:
                break
            key = _LAST if level.keeps_last else name
            if key and document != b"{}":
                level.members[key] = document
            document, name = b"{}", level.name
            if level.members:
                document = level.value()
        return document

    def _between_documents(self, text: bytes, position: int) -> int:
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
        self._step = JSONScanner._between_documents
        return end

    def _in_list(self, text: bytes, position: int) -> int:
        position = _TO_ELEMENT.match(text, position).end()  # type: ignore[union-attr]
        first = text[position : position + 1]
        if first == b"{":
            self._open(self._levels[-1].selection, b"", is_list=False)
        elif first == b"]":
            level = self._levels.pop()
            if level.keeps_last and level.members:
                self._levels[-1].members[level.name] = level.value()
            self._continue_in_level()
        elif first:
            self._begin_value(first)
        return position + 1

    def _in_object(self, text: bytes, position: int) -> int:
        unselected = self._levels[-1].selection.unselected
        position = unselected.match(text, position).end()  # type: ignore[union-attr]
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
            self._open(
                inner, self._name, is_list=first == b"[", keeps_last=first == b"["
            )
            return position + 1
        if is_selected and inner is None:
            self._value = bytearray()
        return position + self._begin_value(first)

    def _begin_value(self, first: bytes) -> int:
        """Set the step that reads a value; return the number of its bytes read here."""
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
        end = _NESTED.match(text, position).end()  # type: ignore[union-attr]
        self._keep(text[position : end + 1])
        last = text[end : end + 1]
        if last == b'"':
            self._step = JSONScanner._in_string
        elif last in (b"{", b"["):
            self._nesting += 1
            if self._nesting > MAX_NESTING:
                self.skipped += 1
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
        """Return the position of the closing quote, or the end of *text*."""
        start = position + self._after_backslash
        end = _STRING.match(text, start).end()  # type: ignore[union-attr]
        # The match stops at a backslash only where that is the last byte of the chunk.
        self._after_backslash = text[end : end + 1] == b"\\"
        return end + self._after_backslash

    def _keep(self, part: bytes) -> None:
        """Append *part* to the value that is being read, if that value is selected."""
        if self._value is not None and len(self._value) <= MAX_VALUE_BYTES:
            self._value += part

    def _end_value(self) -> None:
        if self._value is not None:
            if len(self._value) <= MAX_VALUE_BYTES:
                self._levels[-1].members[self._name] = bytes(self._value)
            else:
                self.skipped += 1
            self._value = None
        self._continue_in_level()

    def _open(
        self,
        selection: Selection,
        name: bytes,
        *,
        is_list: bool,
        keeps_last: bool = False,
    ) -> None:
        self._levels.append(
            _Level(selection, name, is_list=is_list, keeps_last=keeps_last)
        )
        self._continue_in_level()

    def _close(self) -> None:
        level = self._levels.pop()
        outer = self._levels[-1] if self._levels else None
        if level.name and outer:
            outer.members[level.name] = level.value()
        elif outer is None or not outer.keeps_last:
            self._on_document(level.value(), self.is_inside)
        elif level.members:
            outer.members[_LAST] = level.value()
        self._continue_in_level()

    def _continue_in_level(self) -> None:
        if not self._levels:
            self._step = JSONScanner._between_documents
        elif self._levels[-1].is_list:
            self._step = JSONScanner._in_list
        else:
            self._step = JSONScanner._in_object

"""WebDAV's Multi-Status (RFC 4918, 13), read as it passes.

A ``response`` with a ``status`` has that one. One with ``propstat`` elements
succeeded if any of these did: PROPFIND (9.1) answers 404 for each property that a
resource happens not to have, and PROPPATCH (9.2) does all or nothing, so that a
failed one has no success in it.

No document type is accepted. WebDAV has none, and without one there are neither
entities that expand without end nor entities that are fetched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.parsers import expat

from openmeter_wsgi.bodies.multi_status_codes import Tally, status_code

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Deeper XML is no Multi-Status; expat holds every element that is open.
MAX_DEPTH = 256
#: Expat holds every name it has seen, and a tag or comment until it is whole.
MAX_NAMES = 10_000
MAX_HELD_BYTES = 2**16
_MAX_STATUS_LENGTH = 256

_ROOT = "DAV: multistatus"
_RESPONSE = [_ROOT, "DAV: response"]
_OWN_STATUS = [*_RESPONSE, "DAV: status"]
_PROPSTAT_STATUS = [*_RESPONSE, "DAV: propstat", "DAV: status"]


class _Refused(Exception):
    """The document is not read any further."""


class MultiStatusXML:
    """Counts the responses that have ended."""

    def __init__(self) -> None:
        self._responses = _Responses()
        self._problem = ""
        self._fed = 0
        self._names: dict[str, str] = {}
        parser = expat.ParserCreate(namespace_separator=" ", intern=self._names)
        parser.StartDoctypeDeclHandler = _refuse_doctype
        parser.StartElementHandler = self._responses.start
        parser.EndElementHandler = self._responses.end
        parser.CharacterDataHandler = self._responses.text
        self._parser = parser

    def counted(self) -> Tally | str:
        """Return the counts, or why there are none to be believed."""
        if self._problem or self._responses.has_root:
            return self._problem or self._responses.tally
        return "not_multi_status"

    def feed(self, text: bytes) -> None:
        """Read the next bytes of the document."""
        if self._problem:
            return
        try:
            self._parser.Parse(text, False)
        except _Refused as refused:
            self._problem = str(refused)
        except (expat.ExpatError, LookupError, ValueError):
            self._problem = "not_xml"
        else:
            self._fed += len(text)
            held = self._fed - self._parser.CurrentByteIndex
            if held > MAX_HELD_BYTES or len(self._names) > MAX_NAMES:
                self._problem = "too_large"


class _Responses:
    """What the parser calls. It does not hold the parser: there is no cycle."""

    def __init__(self) -> None:
        self.tally = Tally()
        self.has_root = False
        #: The elements that are open.
        self._path: list[str] = []
        #: The text of the status that is open.
        self._status: str | None = None
        #: The codes of the response that is open.
        self._own: int | None = None
        self._propstats: set[bool] = set()

    def start(self, name: str, _attributes: Mapping[str, str]) -> None:
        """Enter an element."""
        path = self._path
        if not path:
            if name != _ROOT:
                raise _Refused("not_multi_status")
            self.has_root = True
        if len(path) >= MAX_DEPTH:
            raise _Refused("too_large")
        path.append(name)
        if path == _RESPONSE:
            self._own, self._propstats = None, set()
        elif path in (_OWN_STATUS, _PROPSTAT_STATUS):
            self._status = ""

    def text(self, text: str) -> None:
        """Read text, which comes in pieces."""
        if self._status is not None and len(self._status) < _MAX_STATUS_LENGTH:
            self._status += text

    def end(self, _name: str) -> None:
        """Leave an element."""
        path = self._path
        if path == _RESPONSE:
            self._count()
        elif self._status is not None and path in (_OWN_STATUS, _PROPSTAT_STATUS):
            code = status_code(self._status)
            self._status = None
            if path == _OWN_STATUS:
                self._own = code
            elif code is not None:
                self._propstats.add(200 <= code <= 299)
        path.pop()

    def _count(self) -> None:
        """Count the response that ends. One that states no status counts as neither."""
        if self._own is None and self._propstats:
            self.tally.count(is_success=any(self._propstats))
        else:
            self.tally.count_code(self._own)


def _refuse_doctype(*_declaration: object) -> None:
    raise _Refused("doctype")

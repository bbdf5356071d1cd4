"""Language models: the reader of the usage that a response body reports.

:class:`LLMReader` splits the body into frames (JSON, server-sent events, or documents
in lines or in a list). It detects the format by the first bytes, since handlers often
leave the media type at ``text/html``. Each document goes to :class:`LLMReports`. A
`_Finder` finds the reports in the document, at the places listed in :mod:`.llm_shapes`,
and `_Calls` merges the reports of a call: streams repeat and complete their figures.

A document too large to be kept is reduced by a :class:`JSONScanner` to the members
that matter here, and then handled like the others.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypedDict

import msgspec

from openmeter_wsgi.bodies.base import (
    NDJSON,
    BodyReader,
    Reader,
    Unknown,
    Unreadable,
    is_compressed,
    media_type,
)
from openmeter_wsgi.bodies.json import JSONScanner, Selection
from openmeter_wsgi.bodies.llm_shapes import (
    PLACES,
    PROVIDERS,
    LLMUsage,
    Place,
    Provider,
    costliest,
    figures_in,
    left_out,
    tokens,
    usage_from,
)
from openmeter_wsgi.bodies.stream import EventStream, Frames

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_BOM = b"\xef\xbb\xbf"
#: All exceptions of decoding bytes; UnicodeDecodeError is a ValueError.
_UNDECODABLE = (msgspec.MsgspecError, ValueError, RecursionError)

# -- The members that are decoded, computed from the table of places. A *wrapper* is a
# -- member that holds an object with the report; the *inner* members are that object's.

_WRAPPERS = {place.report[0] for place in PLACES if len(place.report) > 1}
_INNER_MEMBERS = {
    name
    for place in PLACES
    if len(place.report) > 1
    for name in (place.report[-1], place.beside, place.model, place.call)
    if name
}
_TOP_MEMBERS = {
    name
    for place in PLACES
    for name in (
        *(place.report if len(place.report) == 1 else ()),
        *(place.figures if not place.report else ()),
        *place.kind[:1],
        place.continues[0],
        place.model,
        place.call,
    )
    if name
}


def _members(name: str, members: Iterable[str], raw: Iterable[str] = ()) -> Any:
    """Return the type of an object of which only *members* and *raw* are read.

    The members in *raw*, which may be large, are left as JSON, to be decoded on demand.
    """
    types = dict.fromkeys(members, Any) | dict.fromkeys(raw, msgspec.Raw)
    make_type: Any = TypedDict
    return make_type(name, types, total=False)


_Document = _members("_Document", _TOP_MEMBERS, _WRAPPERS)
_Inner = _members("_Inner", _INNER_MEMBERS)
_decode = msgspec.json.Decoder(_Document | list[_Document]).decode  # type: ignore[valid-type]
_decode_inner = msgspec.json.Decoder(_Inner).decode
_decode_raws = msgspec.json.Decoder(list[msgspec.Raw]).decode
#: The same members, for the scanner of documents that are too large to be kept.
_INNER_SELECTION = Selection(dict.fromkeys(map(str.encode, sorted(_INNER_MEMBERS))))
SELECTION = Selection(
    dict.fromkeys(map(str.encode, sorted(_TOP_MEMBERS)))
    | dict.fromkeys(map(str.encode, sorted(_WRAPPERS)), _INNER_SELECTION)
)


def llm_reader(
    content_type: str | None,
    content_encoding: str | None,
    provider: Provider | None = None,
) -> BodyReader[LLMUsage]:
    """Return a reader of :class:`LLMUsage` for a response with these headers.

    With a *provider*, only reports in the shape of that provider are read.
    """
    if is_compressed(content_encoding):
        return Unreadable("compressed")
    return LLMReader(content_type, provider)


class LLMReader(Reader[LLMUsage]):
    """A reader that collects the reports in all documents of a body.

    The reasons of `Unknown`: ``no_usage`` (no document reports any), ``not_json``,
    ``cut_off`` (the body ended within a document), ``too_large`` (no usage was found,
    and a value was too large to read or a document was nested too deep).
    """

    def __init__(
        self, content_type: str | None = None, provider: Provider | None = None
    ) -> None:
        self._media_type = media_type(content_type)
        #: The first bytes of the body, until they show its format.
        self._head = b""
        #: None until the format is detected, and for a body of another format.
        self._frames: Frames | None = None
        #: True if the body has another format.
        self._is_foreign = False
        self._reports = LLMReports(FINDERS[provider])
        #: Reads the documents that are too large to be kept.
        self._scanner = _scanner(self._reports)
        #: True if a value in a smaller document was too large to read.
        self._has_skipped = False

    def read_whole(self, frames: bytes) -> None:
        """Read one or more whole frames. Most hold a bit of text and no report."""
        if self._reports.is_relevant(frames):
            self._has_skipped |= self._add_documents(self._reports, frames)

    def read_piece(self, piece: bytes) -> None:
        """Read the next piece of a document that is too large to be kept."""
        self._scanner.feed(piece)

    def end_large(self) -> None:
        """Add the report of that document, even if the document was not closed."""
        self._reports.add_reduced(self._scanner.unfinished())
        self._scanner.reset()

    def _read(self, piece: bytes) -> None:
        if self._frames:
            self._frames.feed(piece, self)
        elif not self._is_foreign:
            self._begin(piece)

    def _begin(self, piece: bytes) -> None:
        """Detect the format by the first bytes of the body."""
        head = self._head + piece
        if _BOM.startswith(head):
            self._head = head
            return
        head = head.removeprefix(_BOM).lstrip()
        if head:
            self._frames = self._frames_for(head[:1])
            self._is_foreign = self._frames is None
        self._head = b""
        if self._frames:
            self._frames.feed(head, self)

    def _frames_for(self, first: bytes) -> Frames | None:
        if self._media_type == "text/event-stream":
            return EventStream()
        if first == b"{" and self._media_type in NDJSON:
            return Frames(b"\n")
        if first in (b"{", b"["):
            return Frames()
        # An event stream begins with `data`, `event`, `id`, `retry` or a colon.
        return EventStream() if first in b":deir" else None

    def _add_documents(self, reports: LLMReports, frames: bytes) -> bool:
        """Add the documents in *frames*; return True if a value was too large."""
        has_skipped = False
        if self._frames is None:
            return has_skipped
        for document in self._frames.documents(frames):
            if reports.is_relevant(document) and not reports.add(document):
                has_skipped |= _scan(reports, document) == "too_large"
        return has_skipped

    def _result(self) -> LLMUsage | Unknown:
        frames = self._frames
        if frames is None:
            return Unknown("not_json" if self._is_foreign else "no_usage")
        reports = self._reports.copy()
        reason = self._add_rest(reports, frames)
        if self._has_skipped or self._scanner.skipped:
            reason = "too_large"
        return reports.usage() or Unknown(reason)

    def _add_rest(self, reports: LLMReports, frames: Frames) -> str:
        """Add the incomplete frame; return the reason in case no usage was found."""
        if frames.is_large:
            reports.add_reduced(self._scanner.unfinished())
            return "cut_off" if self._scanner.is_inside else "no_usage"
        rest = frames.rest
        if frames.separator:
            if self._add_documents(reports, bytes(rest)):
                return "too_large"
            return "cut_off" if rest.strip() else "no_usage"
        # Without a separator the whole body is in the rest.
        return "no_usage" if reports.add(rest) else _scan(reports, rest)


def _scanner(reports: LLMReports) -> JSONScanner:
    # Not a method of the reader: that would make a reference cycle, which would keep
    # the body in memory until the next garbage collection.
    return JSONScanner(SELECTION, lambda document, _: reports.add_reduced(document))


def _scan(reports: LLMReports, text: bytes | bytearray) -> str:
    """Add the reports in *text* that is not one document of strict JSON.

    It may be cut off, hold several documents, or hold NaN or Infinity. Return the
    reason in case no usage was found.
    """
    scanner = _scanner(reports)
    scanner.feed(bytes(text))
    reports.add_reduced(scanner.unfinished())
    if scanner.skipped:
        return "too_large"
    if scanner.is_inside:
        return "cut_off"
    return "no_usage" if scanner.has_begun else "not_json"


class LLMReports:
    """The reports of a body, and the usage that they amount to.

    Reports with the same key (see `_key`: their provider, and their place in the
    document) belong to the same sequence of calls, of which the last call counts. The
    reports of one call are cumulative: a later figure replaces an earlier one, unless
    the later one is 0. Of several sequences the one with the most tokens counts, and
    each of its figures is raised to the `costliest` one.
    """

    def __init__(self, finder: _Finder) -> None:
        self._finder = finder
        #: The calls by the key of their reports.
        self._calls: dict[object, _Calls] = {}
        #: The highest figures of reports that were not used because another report in
        #: the same document has the same key.
        self._rival: LLMUsage | None = None
        #: The first model named by a document, and the id of the call in that document.
        self._model: str | None = None
        self._model_call: str | None = None

    def copy(self) -> LLMReports:
        """Return an independent copy."""
        copy = LLMReports(self._finder)
        copy._calls = {key: calls.copy() for key, calls in self._calls.items()}
        copy._rival = self._rival
        copy._model, copy._model_call = self._model, self._model_call
        return copy

    def is_relevant(self, text: bytes) -> bool:
        """Return True if *text* may hold a report, or a model if none is known yet.

        The names of all figures end in ``_tokens``, ``Tokens``, ``TokenCount`` or
        ``eval_count``.
        """
        if b"oken" in text or b"eval_count" in text:
            return True
        return self._model is None and b'"model' in text

    def add(self, text: bytes | bytearray) -> bool:
        """Add a document or a list of documents; return False if *text* is neither."""
        try:
            documents = _decode(text)
        except _UNDECODABLE:
            return False
        for document in documents if isinstance(documents, list) else (documents,):
            self.add_document(document)
        return True

    def add_reduced(self, text: bytes) -> None:
        """Add a document that a scanner has reduced.

        Unlike :meth:`add` it accepts the extensions of Python's JSON: NaN, Infinity and
        escapes of single surrogates.
        """
        if self.add(text):
            return
        try:
            document = json.loads(text)
        except _UNDECODABLE:
            return
        if isinstance(document, dict):
            self.add_document(document)

    def usage(self) -> LLMUsage | None:
        """Return the reported usage, or None if nothing was reported."""
        usages = [calls.usage() for calls in self._calls.values()]
        if not usages:
            return None
        usage = max(usages, key=tokens)
        calls = [*self._calls.values()][usages.index(usage)]
        remarks = []
        if self._rival or any(_differ(usage, other) for other in usages):
            usage = costliest(usage, [*usages, *filter(None, (self._rival,))])
            remarks.append("ambiguous_usage")
        if calls.are_several:
            remarks.append("several_calls")
        return msgspec.structs.replace(usage, remarks=(*remarks,)) if remarks else usage

    def add_document(self, document: dict[str, Any]) -> None:
        """Add a decoded document."""
        if self._model is None:
            get = document.get
            self._model = _text(get("model")) or _text(get("modelVersion"))
            self._model_call = _text(get("id")) or _text(get("responseId"))
        reports = self._finder.find(document)
        if len(reports) > 1:
            reports = self._without_rivals(reports)
        for report in reports:
            calls = self._calls.get(report.key)
            if calls is None:
                calls = self._calls[report.key] = _Calls(report.provider)
            if calls.add(report) and report.model is None:
                calls.name_model(self._model, self._model_call)

    def _without_rivals(self, reports: list[_Report]) -> list[_Report]:
        """Return one of the reports with the same key in a document; keep the others.

        A report that begins a call is preferred to one with more tokens, because later
        reports of that call complete it.
        """
        kept: dict[object, tuple[LLMUsage, _Report]] = {}
        for report in reports:
            usage = usage_from(report.provider, report.model, report.figures)
            known = kept.setdefault(report.key, (usage, report))
            if not _differ(usage, known[0]):
                continue
            rival, kept[report.key] = sorted(
                (known, (usage, report)), key=lambda e: (e[1].begins, tokens(e[0]))
            )
            rivals = [self._rival] if self._rival else []
            self._rival = costliest(rival[0], rivals)
        return [report for _, report in kept.values()]


class _Report(msgspec.Struct, gc=False):
    """One report, as found in a document."""

    #: Reports with the same key belong to the same sequence of calls.
    key: object
    provider: Provider
    #: The figures by the provider's names for them.
    figures: dict[str, int]
    model: str | None
    #: The id of the call, if the document names one.
    call: str | None
    #: See `Place.begins`.
    begins: bool


class _Calls:
    """The calls in a body whose reports have the same key. The last call counts."""

    __slots__ = ("_call", "_earlier", "_figures", "_model", "_provider")

    def __init__(self, provider: Provider) -> None:
        self._provider = provider
        #: The usage of the last call before the current one that has any tokens.
        self._earlier: LLMUsage | None = None
        # The current call: its id, its model and the figures reported so far.
        self._call: str | None = None
        self._model: str | None = None
        self._figures: dict[str, int] = {}

    def copy(self) -> _Calls:
        """Return an independent copy."""
        copy = _Calls(self._provider)
        copy._earlier, copy._call, copy._model = self._earlier, self._call, self._model
        copy._figures = dict(self._figures)
        return copy

    @property
    def are_several(self) -> bool:
        """True if more than one call has any tokens."""
        return self._earlier is not None and any(self._figures.values())

    def add(self, report: _Report) -> bool:
        """Add a report; return True if it is the first report of its call."""
        figures = self._figures
        is_first = not figures or self._is_new_call(report)
        if is_first:
            if any(figures.values()):
                self._earlier = usage_from(self._provider, self._model, figures)
            self._call, self._model = report.call, report.model
            self._figures = report.figures
            return True
        self._call = self._call or report.call
        self._model = self._model or report.model
        if 0 in report.figures.values():
            for name, count in report.figures.items():
                figures[name] = count or figures.get(name, 0)
        else:
            figures.update(report.figures)
        return False

    def _is_new_call(self, report: _Report) -> bool:
        if report.call is None or self._call is None:
            return report.begins
        return report.call != self._call

    def name_model(self, model: str | None, call: str | None) -> None:
        """Set the model named by a document of *call*, if that is the current call."""
        if call is None or self._call is None or call == self._call:
            self._model = model

    def usage(self) -> LLMUsage:
        """Return the usage of the last call that has any tokens."""
        if self._earlier is not None and not any(self._figures.values()):
            return self._earlier
        return usage_from(self._provider, self._model, self._figures)


class _Finder:
    """A finder of the reports in a document, for one provider or for all of them.

    It sorts :data:`PLACES` by the member of a document that leads to the report.
    """

    def __init__(self, provider: Provider | None) -> None:
        #: Places of reports that are a member of the document, by that member.
        self._top: dict[str, list[Place]] = {}
        #: Places of reports in a wrapper, in documents of a certain kind: by the member
        #: that states the kind (such as ``type``), and by the kind.
        self._of_kind: dict[str, dict[str, list[Place]]] = {}
        #: Places of reports in a wrapper, in documents of any kind, by the wrapper.
        self._inside: dict[str, Place] = {}
        #: Places of reports whose figures are members of the document, by each figure.
        self._bare: dict[str, Place] = {}
        for place in PLACES:
            if provider in (None, place.provider):
                self._add_place(place)

    def _add_place(self, place: Place) -> None:
        if not place.report:
            self._bare.update(dict.fromkeys(place.figures, place))
        elif len(place.report) == 1:
            self._top.setdefault(place.report[0], []).append(place)
        elif place.kind:
            member, *kinds = place.kind
            for kind in kinds:
                of_member = self._of_kind.setdefault(member, {})
                of_member.setdefault(kind, []).append(place)
        else:
            self._inside[place.report[0]] = place

    def find(self, document: dict[str, Any]) -> list[_Report]:
        """Return the reports of *document*. Called for each chunk of some streams."""
        reports: list[_Report] = []
        bare: Place | None = None
        for member, value in document.items():
            if member in self._top:
                if isinstance(value, dict):
                    _add_report(reports, self._top[member], value, document)
            elif member in self._of_kind:
                self._find_of_kind(reports, member, value, document)
            elif member in self._inside:
                _add_inner_reports(reports, self._inside[member], document)
            else:
                bare = bare or self._bare.get(member)
        if bare:
            _add_report(reports, [bare], _part(document, bare.figures), document)
        return reports

    def _find_of_kind(
        self,
        reports: list[_Report],
        member: str,
        kind: object,
        document: dict[str, Any],
    ) -> None:
        if isinstance(kind, str):
            for place in self._of_kind[member].get(kind, ()):
                _add_inner_reports(reports, place, document)


def _part(document: dict[str, Any], members: Iterable[str]) -> dict[str, Any]:
    return {name: document[name] for name in members if name in document}


def _add_inner_reports(
    reports: list[_Report], place: Place, document: dict[str, Any]
) -> None:
    """Add the reports that stand in the wrapper of *place* in *document*."""
    wrapper, *_, name = place.report
    for inner in _unwrapped(document.get(wrapper), is_list="*" in place.report):
        usage = inner.get(name)
        if isinstance(usage, dict) and (not place.beside or place.beside in inner):
            naming = inner if place.is_wrapped else document
            _add_report(reports, [place], usage, naming)


def _unwrapped(value: Any, *, is_list: bool) -> list[dict[str, Any]]:
    """Return the objects in the value of a wrapper: an object, or a list of objects."""
    values = _decoded(_decode_raws, value) if is_list else [value]
    if not isinstance(values, list):
        return []
    objects = (_decoded(_decode_inner, each) for each in values)
    return [each for each in objects if isinstance(each, dict)]


def _decoded(decode: Callable[[msgspec.Raw], Any], value: Any) -> Any:
    """Return *value*, decoded if it is raw JSON; None if it cannot be decoded."""
    if not isinstance(value, msgspec.Raw):
        return value
    try:
        return decode(value)
    except _UNDECODABLE:
        return None


def _add_report(
    reports: list[_Report],
    places: list[Place],
    usage: dict[str, Any],
    naming: dict[str, Any],
) -> None:
    """Add the report in *usage*, as one of the first of *places* with its figures.

    Add none if no place has any of the figures. *naming* is the object with the members
    that name the model and the call.
    """
    figures = figures_in(usage)
    for place in places:
        if not place.figures.isdisjoint(figures):
            break
    else:
        return
    if place.provider == "anthropic" and "iterations" in usage:
        figures |= left_out(usage["iterations"], figures)
    model, call = _text(naming.get(place.model)), _text(naming.get(place.call))
    member, kind = place.continues
    if member and naming.get(member) == kind:
        call = None
    reports.append(
        _Report(_key(place), place.provider, figures, model, call, place.begins)
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _differ(usage: LLMUsage, other: LLMUsage) -> bool:
    return usage is not other and (
        usage.provider, usage.input_tokens, usage.output_tokens, usage.total_tokens,
    ) != (
        other.provider, other.input_tokens, other.output_tokens, other.total_tokens,
    )  # fmt: skip


def _key(place: Place) -> object:
    """Return the key of the reports at *place*: its provider and its path.

    Anthropic's key is the provider alone: ``message_start`` has the first report of a
    call at another path than the later reports.
    """
    if place.provider == "anthropic":
        return place.provider
    return place.provider, place.report


#: The finder for each provider; under None, the finder for all of them.
FINDERS = {provider: _Finder(provider) for provider in (None, *PROVIDERS)}

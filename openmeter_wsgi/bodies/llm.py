"""Language models: the usage that the calls in a body report.

The reader takes JSON, server-sent events, and documents line by line or in a list. It
tells them apart by their first bytes, since handlers often leave the media type at
``text/html``. What counts as a report is in :mod:`.llm_shapes`.
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
    Figures,
    LLMUsage,
    Place,
    Provider,
    dearest,
    tokens,
    usage_from,
)
from openmeter_wsgi.bodies.stream import EventStream, Frames

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_BOM = b"\xef\xbb\xbf"
#: A float, and so OpenMeter, holds no larger count exactly; no call has as many tokens.
_MAX_COUNT = 2**53
#: Everything that decoding bytes can raise; UnicodeDecodeError is a ValueError.
_UNDECODABLE = (msgspec.MsgspecError, ValueError, RecursionError)
#: The figures that an iteration of Anthropic's has.
_MAIN = ("input_tokens", "output_tokens")
_CACHED = ("cache_read_input_tokens", "cache_creation_input_tokens")

# -- The members that are decoded, from the table of places

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
    """Return the type of an object of which *members* are decoded, and *raw* not yet.

    All else is skipped. What is not decoded yet may be large.
    """
    types = dict.fromkeys(members, Any) | dict.fromkeys(raw, msgspec.Raw)
    make_type: Any = TypedDict
    return make_type(name, types, total=False)


_Document = _members("_Document", _TOP_MEMBERS, _WRAPPERS)
_Inner = _members("_Inner", _INNER_MEMBERS)
_decode = msgspec.json.Decoder(_Document | list[_Document]).decode  # type: ignore[valid-type]
_decode_inner = msgspec.json.Decoder(_Inner).decode
_decode_raws = msgspec.json.Decoder(list[msgspec.Raw]).decode
#: The same members, of a document that is too large to be decoded.
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

    With a *provider* it reads reports of that shape alone.
    """
    if is_compressed(content_encoding):
        return Unreadable("compressed")
    return LLMReader(content_type, provider)


class LLMReader(Reader[LLMUsage]):
    """Gathers the token reports of the documents of a body.

    Unknown are: ``no_usage`` (read, and none was reported), ``not_json``,
    ``cut_off`` (ended within a document), ``too_large`` (see :attr:`skipped`).
    """

    def __init__(
        self, content_type: str | None = None, provider: Provider | None = None
    ) -> None:
        self._media_type = media_type(content_type)
        #: The first bytes, until they tell what the body is.
        self._head = b""
        #: None until then, and for what is no documents at all.
        self._frames: Frames | None = None
        self._is_foreign = False
        self._reports = LLMReports(FINDERS[provider])
        self._scanner = _scanner(self._reports)

    @property
    def skipped(self) -> int:
        """The number of values that were too large to read, in too large documents."""
        return self._scanner.too_large

    def read_whole(self, frames: bytes) -> None:
        """Read one or more whole frames. Most hold a bit of text and no report."""
        if self._reports.is_relevant(frames):
            self._add_documents(self._reports, frames)

    def read_piece(self, piece: bytes) -> None:
        """Read a part of a document that is too large to be kept."""
        self._scanner.feed(piece)

    def end_large(self) -> None:
        """Take in what was found of that document, if it was not closed."""
        self._reports.add_reduced(self._scanner.unfinished())
        self._scanner.reset()

    def _read(self, piece: bytes) -> None:
        if self._frames:
            self._frames.feed(piece, self)
        elif not self._is_foreign:
            self._begin(piece)

    def _begin(self, piece: bytes) -> None:
        """Tell by the first bytes what the body is."""
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
        # The fields of an event stream: data, event, id, retry; a comment.
        return EventStream() if first in b":deir" else None

    def _add_documents(self, reports: LLMReports, frames: bytes) -> None:
        if self._frames is None:
            return
        for document in self._frames.documents(frames):
            if reports.is_relevant(document) and not reports.add(document):
                _scan(reports, document)

    def _result(self) -> LLMUsage | Unknown:
        frames = self._frames
        if frames is None:
            return Unknown("not_json" if self._is_foreign else "no_usage")
        reports = self._reports.copy()
        reason = self._add_rest(reports, frames)
        return reports.usage() or Unknown("too_large" if self.skipped else reason)

    def _add_rest(self, reports: LLMReports, frames: Frames) -> str:
        """Add what the body ends with; return why there may be no usage."""
        if frames.is_large:
            reports.add_reduced(self._scanner.unfinished())
            return "cut_off" if self._scanner.is_inside else "no_usage"
        rest = frames.rest
        if frames.separator:
            self._add_documents(reports, bytes(rest))
            return "cut_off" if rest.strip() else "no_usage"
        return "no_usage" if reports.add(rest) else _scan(reports, rest)


def _scanner(reports: LLMReports) -> JSONScanner:
    # Not a method of the reader: a cycle would keep bodies until the next collection.
    return JSONScanner(SELECTION, lambda document, _: reports.add_reduced(document))


def _scan(reports: LLMReports, text: bytes | bytearray) -> str:
    """Add what is found in text that is not one document of strict JSON.

    It was cut off, holds several documents, or NaN and the like. Return why there may
    be no usage.
    """
    scanner = _scanner(reports)
    scanner.feed(bytes(text))
    reports.add_reduced(scanner.unfinished())
    if scanner.too_large:
        return "too_large"
    if scanner.is_inside:
        return "cut_off"
    return "no_usage" if scanner.has_begun else "not_json"


class LLMReports:
    """The reports of a body: of each provider the last call counts.

    The reports of one call are cumulative: a later figure replaces an earlier one,
    unless it is 0. Of several providers the one with more tokens counts.
    """

    def __init__(self, finder: _Finder) -> None:
        self._finder = finder
        #: The calls by where their reports stand.
        self._calls: dict[object, _Calls] = {}
        #: Reports that stand beside another one of the same calls in a document.
        self._rival: LLMUsage | None = None
        #: The first model named by a document, and the call that it was named for.
        self._model: str | None = None
        self._model_call: str | None = None

    def copy(self) -> LLMReports:
        """Return reports that can be added to without changing these."""
        copy = LLMReports(self._finder)
        copy._calls = {key: calls.copy() for key, calls in self._calls.items()}
        copy._rival = self._rival
        copy._model, copy._model_call = self._model, self._model_call
        return copy

    def is_relevant(self, text: bytes) -> bool:
        """Return True if *text* can hold a report, or the name of the model.

        All figures are called ``…_tokens``, ``…Tokens``, ``…TokenCount`` or
        ``…eval_count``.
        """
        if b"oken" in text or b"eval_count" in text:
            return True
        return self._model is None and b'"model' in text

    def add(self, text: bytes | bytearray) -> bool:
        """Take in a document or a list of them; return whether *text* is one."""
        try:
            documents = _decode(text)
        except _UNDECODABLE:
            return False
        for document in documents if isinstance(documents, list) else (documents,):
            self.add_document(document)
        return True

    def add_reduced(self, text: bytes) -> None:
        """Take in a document that a scanner has reduced.

        Unlike :meth:`add` it accepts what Python's own JSON does: NaN and Infinity,
        and the escapes of half a character.
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
        """Return the usage that was reported, or None."""
        usages = [calls.usage() for calls in self._calls.values()]
        if not usages:
            return None
        usage = max(usages, key=tokens)
        calls = [*self._calls.values()][usages.index(usage)]
        remarks = []
        if self._rival or any(_differ(usage, other) for other in usages):
            usage = dearest(usage, [*usages, *filter(None, (self._rival,))])
            remarks.append("ambiguous_usage")
        if calls.are_several:
            remarks.append("several_calls")
        return msgspec.structs.replace(usage, remarks=(*remarks,)) if remarks else usage

    def add_document(self, document: dict[str, Any]) -> None:
        """Take in a document that is decoded."""
        if self._model is None:
            names = document.get
            self._model = _text(names("model")) or _text(names("modelVersion"))
            self._model_call = _text(names("id")) or _text(names("responseId"))
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
        """Return one report of the same calls in a document; keep the others.

        The one that begins a call goes before a larger one, for others will follow it.
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
            self._rival = dearest(rival[0], rivals)
        return [report for _, report in kept.values()]


class _Report(msgspec.Struct, gc=False):
    """The figures of one report, by their provider's names."""

    #: Reports with the same key belong to the same calls.
    key: object
    provider: Provider
    figures: dict[str, int]
    model: str | None
    call: str | None
    begins: bool


class _Calls:
    """The calls of one provider in a body, of which the last one counts."""

    __slots__ = ("_call", "_earlier", "_figures", "_model", "_provider")

    def __init__(self, provider: Provider) -> None:
        self._provider = provider
        #: The call before this one that counted any tokens.
        self._earlier: LLMUsage | None = None
        self._call: str | None = None
        self._model: str | None = None
        self._figures: dict[str, int] = {}

    def copy(self) -> _Calls:
        """Return calls that can be added to without changing these."""
        copy = _Calls(self._provider)
        copy._earlier, copy._call, copy._model = self._earlier, self._call, self._model
        copy._figures = dict(self._figures)
        return copy

    @property
    def are_several(self) -> bool:
        """True if more than one call has counted tokens."""
        return self._earlier is not None and any(self._figures.values())

    def add(self, report: _Report) -> bool:
        """Take in a report; return whether it is the first one of its call."""
        figures = self._figures
        is_first = not figures or self._is_another(report)
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

    def _is_another(self, report: _Report) -> bool:
        if report.call is None or self._call is None:
            return report.begins
        return report.call != self._call

    def name_model(self, model: str | None, call: str | None) -> None:
        """Name the model as an earlier document of the same call did."""
        if call is None or self._call is None or call == self._call:
            self._model = model

    def usage(self) -> LLMUsage:
        """Return the usage of the last call that counted any tokens."""
        if self._earlier is not None and not any(self._figures.values()):
            return self._earlier
        return usage_from(self._provider, self._model, self._figures)


class _Finder:
    """Finds the reports of a document at the places of one provider, or of all."""

    def __init__(self, provider: Provider | None) -> None:
        #: Places at the top of a document, by their member.
        self._top: dict[str, list[Place]] = {}
        #: Places inside a document of a kind, by the member and the kind that it tells.
        self._of_kind: dict[str, dict[str, list[Place]]] = {}
        #: Places inside a document of any kind, by the member that wraps the report.
        self._inside: dict[str, Place] = {}
        #: The places whose figures are members of the document, by these.
        self._bare: dict[str, Place] = {}
        for place in PLACES:
            if provider in (None, place.provider):
                self._sort_in(place)

    def _sort_in(self, place: Place) -> None:
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
        found: list[_Report] = []
        bare: Place | None = None
        for member, value in document.items():
            if member in self._top:
                if isinstance(value, dict):
                    _add_report(found, self._top[member], value, document)
            elif member in self._of_kind:
                self._find_of_kind(found, member, value, document)
            elif member in self._inside:
                _add_inner_reports(found, self._inside[member], document)
            else:
                bare = bare or self._bare.get(member)
        if bare:
            _add_report(found, [bare], _part(document, bare.figures), document)
        return found

    def _find_of_kind(
        self, found: list[_Report], member: str, kind: object, document: dict[str, Any]
    ) -> None:
        if isinstance(kind, str):
            for place in self._of_kind[member].get(kind, ()):
                _add_inner_reports(found, place, document)


def _part(document: dict[str, Any], members: Iterable[str]) -> dict[str, Any]:
    return {name: document[name] for name in members if name in document}


def _add_inner_reports(
    found: list[_Report], place: Place, document: dict[str, Any]
) -> None:
    """Add the reports in what *document* wraps."""
    wrapper, *_, name = place.report
    for inner in _unwrapped(document.get(wrapper), is_list="*" in place.report):
        usage = inner.get(name)
        if isinstance(usage, dict) and (not place.beside or place.beside in inner):
            names = inner if place.is_wrapped else document
            _add_report(found, [place], usage, names)


def _unwrapped(value: Any, *, is_list: bool) -> list[dict[str, Any]]:
    """Return the objects in a member that is a list of them, or else an object."""
    values = _decoded(_decode_raws, value) if is_list else [value]
    if not isinstance(values, list):
        return []
    inner = (_decoded(_decode_inner, each) for each in values)
    return [each for each in inner if isinstance(each, dict)]


def _decoded(decode: Callable[[msgspec.Raw], Any], value: Any) -> Any:
    """Return *value* decoded, if it is not yet; None if it is no JSON of that type."""
    if not isinstance(value, msgspec.Raw):
        return value
    try:
        return decode(value)
    except _UNDECODABLE:
        return None


def _add_report(
    found: list[_Report],
    places: list[Place],
    usage: dict[str, Any],
    names: dict[str, Any],
) -> None:
    """Add the report that *usage* is at the first of *places* that fits, if any.

    *names* has the members that name the model and the call.
    """
    figures = _figures(usage)
    for place in places:
        if not place.figures.isdisjoint(figures):
            break
    else:
        return
    if place.provider == "anthropic" and "iterations" in usage:
        figures |= _left_out(usage["iterations"], figures)
    model, call = _text(names.get(place.model)), _text(names.get(place.call))
    member, kind = place.continues
    if member and names.get(member) == kind:
        call = None
    found.append(
        _Report(_key(place), place.provider, figures, model, call, place.begins)
    )


def _figures(usage: dict[str, Any]) -> dict[str, int]:
    """Return the counts in *usage* and in the objects that it holds."""
    figures: dict[str, int] = {}
    for name, value in usage.items():
        if isinstance(value, dict):
            for inner, inner_value in value.items():
                if (count := _count(inner_value)) is not None:
                    figures[f"{name}.{inner}"] = count
        elif (count := _count(value)) is not None:
            figures[name] = count
    return figures


def _left_out(iterations: object, figures: Figures) -> dict[str, int]:
    """Return the figures of the iterations that those of the report leave out.

    Anthropic counts the iterations of the message itself, but neither compactions nor
    what an advisor used, each of which has its own entry.
    """
    listed = iterations if isinstance(iterations, list) else []
    listed = [each for each in listed if isinstance(each, dict)]
    every = _added(listed)
    if all(figures.get(name, 0) >= every[name] for name in _MAIN):
        return {}
    beside = _added(each for each in listed if each.get("type") != "message")
    return {f"left_out.{name}": count for name, count in beside.items() if count}


def _added(iterations: Iterable[dict[str, Any]]) -> dict[str, int]:
    added = dict.fromkeys((*_MAIN, *_CACHED), 0)
    for iteration in iterations:
        for name in added:
            added[name] += _count(iteration.get(name)) or 0
    return added


def _count(value: object) -> int | None:
    """Return *value* if it counts something. Cohere writes counts as floats."""
    if type(value) is int:
        return value if 0 <= value <= _MAX_COUNT else None
    if isinstance(value, float) and 0 <= value <= _MAX_COUNT and value.is_integer():
        return int(value)
    return None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _differ(usage: LLMUsage, other: LLMUsage) -> bool:
    return usage is not other and (
        usage.provider, usage.input_tokens, usage.output_tokens, usage.total_tokens,
    ) != (
        other.provider, other.input_tokens, other.output_tokens, other.total_tokens,
    )  # fmt: skip


def _key(place: Place) -> object:
    """Return what reports of the same calls have in common: where they stand.

    Of Anthropic's calls ``message_start`` has the first report, at a place of its own.
    """
    if place.provider == "anthropic":
        return place.provider
    return place.provider, place.report


#: The finder for one provider, and for all of them.
FINDERS = {provider: _Finder(provider) for provider in (None, *PROVIDERS)}

"""What the documents of a body report of tokens, gathered as they pass."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec

from openmeter_wsgi.bodies.llm_usage import LLMUsage, Provider, usage_of

if TYPE_CHECKING:
    from collections.abc import Mapping

#: A float, and so OpenMeter, holds no larger count exactly; it is none of tokens.
_MAX_COUNT = 2**53
_NONE = msgspec.Raw()
_TOKENS = re.compile(
    r"put_tokens|(prompt|completion|total)_tokens|TokenCount|eval_count"
)


class _Document(msgspec.Struct, gc=False):
    """What of a provider's document can matter; all else is skipped undecoded."""

    type: msgspec.Raw = _NONE
    model: msgspec.Raw = _NONE
    model_version: msgspec.Raw = msgspec.field(default=_NONE, name="modelVersion")
    usage: msgspec.Raw = _NONE
    usage_metadata: msgspec.Raw = msgspec.field(default=_NONE, name="usageMetadata")
    meta: msgspec.Raw = _NONE
    prompt_eval_count: msgspec.Raw = _NONE
    eval_count: msgspec.Raw = _NONE
    x_groq: msgspec.Raw = _NONE
    choices: msgspec.Raw = _NONE
    # What a report may be wrapped in: OpenAI's responses and Cohere's v1 stream,
    # Anthropic's message_start, Cohere's v2 stream, Gemini's interactions.
    response: msgspec.Raw = _NONE
    message: msgspec.Raw = _NONE
    delta: msgspec.Raw = _NONE
    interaction: msgspec.Raw = _NONE

    def inner(self) -> tuple[msgspec.Raw, ...]:
        """Return what else may hold a report."""
        return (
            self.response, self.message, self.delta, self.interaction, self.x_groq
        )  # fmt: skip


class _Choice(msgspec.Struct, gc=False):
    usage: msgspec.Raw = _NONE


_decode_document = msgspec.json.Decoder(_Document).decode
_decode_documents = msgspec.json.Decoder(list[_Document]).decode
_decode_choices = msgspec.json.Decoder(list[_Choice]).decode
_decode_any = msgspec.json.Decoder().decode
#: Everything that decoding bytes can raise; UnicodeDecodeError is a ValueError.
UNDECODABLE = (msgspec.MsgspecError, ValueError, RecursionError)


class LLMReports:
    """The reports of a body: each is cumulative, so the last figure of a name stands.

    A body is taken for one call of a model. Of several in a row the last one counts.
    """

    def __init__(self) -> None:
        #: The first model named.
        self.model: str | None = None
        self._provider: Provider | None = None
        self._figures: dict[str, int] = {}

    def copy(self) -> LLMReports:
        """Return reports that can be added to without changing these."""
        copy = LLMReports()
        copy.model, copy._provider = self.model, self._provider
        copy._figures = dict(self._figures)
        return copy

    def usage(self) -> LLMUsage | None:
        """Return what was reported, or None where nothing was."""
        if self._provider is None:
            return None
        return usage_of(self._provider, self.model, self._figures)

    def add(self, text: bytes | bytearray) -> bool:
        """Take in a document; return whether *text* is one."""
        try:
            document = _decode_document(text)
        except UNDECODABLE:
            return False
        self._add_document(document, b"")
        return True

    def add_list(self, text: bytes | bytearray) -> bool:
        """Take in a list of documents; return whether *text* is one."""
        try:
            documents = _decode_documents(text)
        except UNDECODABLE:
            return False
        for document in documents:
            self._add_document(document, b"")
        return True

    def _add_document(self, document: _Document, outer_type: bytes) -> None:
        kind = bytes(document.type) or outer_type
        if self.model is None:
            self.model = _text(document.model) or _text(document.model_version)
        if document.usage is not _NONE:
            self._add_usage(document.usage, kind)
        if document.usage_metadata is not _NONE:
            self._add_figures("gemini", _figures(_object(document.usage_metadata)))
        if document.meta is not _NONE:
            self._add_figures("cohere", _figures(_object(document.meta)))
        if document.eval_count is not _NONE or document.prompt_eval_count is not _NONE:
            self._add_figures("ollama", _ollama_figures(document))
        if document.choices is not _NONE:
            self._add_choices(document.choices, kind)
        if not outer_type:
            self._add_inner(document, kind or b"?")

    def _add_inner(self, document: _Document, kind: bytes) -> None:
        for raw in document.inner():
            if raw is not _NONE and (text := bytes(raw)).startswith(b"{"):
                try:
                    inner = _decode_document(text)
                except UNDECODABLE:
                    continue
                self._add_document(inner, kind)

    def _add_choices(self, raw: msgspec.Raw, kind: bytes) -> None:
        """Moonshot reports within the last choice."""
        text = bytes(raw)
        if b'"usage"' not in text:
            return
        try:
            choices = _decode_choices(text)
        except UNDECODABLE:
            return
        for choice in choices:
            self._add_usage(choice.usage, kind)

    def _add_usage(self, raw: msgspec.Raw, kind: bytes) -> None:
        usage = _object(raw)
        if not usage:
            return
        figures = _figures(usage)
        if "tokens" in usage or "billed_units" in usage:
            self._add_figures("cohere", figures)
        elif "total_input_tokens" in usage or "total_output_tokens" in usage:
            self._add_figures("gemini", figures)
        elif _is_anthropic(usage, kind):
            self._add_figures("anthropic", figures | _compactions(usage))
        else:
            self._add_figures("openai", figures)

    def _add_figures(self, provider: Provider, figures: dict[str, int]) -> None:
        if provider != self._provider:
            if not any(map(_TOKENS.search, figures)):
                return  # no tokens: seconds of audio, searches
            self._provider, self._figures = provider, {}
        self._figures |= figures


def _ollama_figures(document: _Document) -> dict[str, int]:
    counts = {
        "prompt_eval_count": _value(document.prompt_eval_count),
        "eval_count": _value(document.eval_count),
    }
    return _figures(counts)


def _is_anthropic(usage: Mapping[str, object], kind: bytes) -> bool:
    if "prompt_tokens" in usage or "total_tokens" in usage:
        return False  # a gateway that adds what Anthropic reports to OpenAI's shape
    return kind.startswith(b'"message') or "input_tokens" in usage


def _compactions(usage: Mapping[str, object]) -> dict[str, int]:
    """Return what compactions used: Anthropic's own figures leave them out."""
    iterations = usage.get("iterations")
    figures: dict[str, int] = {}
    for iteration in iterations if isinstance(iterations, list) else ():
        if isinstance(iteration, dict) and iteration.get("type") == "compaction":
            for name in ("input_tokens", "output_tokens"):
                total = figures.get(f"compaction.{name}", 0)
                figures[f"compaction.{name}"] = total + (
                    _count(iteration.get(name)) or 0
                )
    return figures


def _figures(usage: Mapping[str, object]) -> dict[str, int]:
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


def _count(value: object) -> int | None:
    """Return *value* if it counts something. Cohere writes counts as floats."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not 0 <= value <= _MAX_COUNT or value != int(value):
        return None
    return int(value)


def _object(raw: msgspec.Raw) -> dict[str, object]:
    value = _value(raw)
    return value if isinstance(value, dict) else {}


def _text(raw: msgspec.Raw) -> str | None:
    value = _value(raw)
    return value if isinstance(value, str) and value else None


def _value(raw: msgspec.Raw) -> object:
    text = bytes(raw)
    if not text:
        return None
    try:
        return _decode_any(text)
    except UNDECODABLE:
        return None

"""The reports of language models: where each provider puts one, and what it counts.

Two tables hold what the providers document: :data:`PLACES` says where a report stands,
:data:`COUNTS` which of its figures are input, output and so on. In both the first entry
that fits counts.

- OpenAI: https://platform.openai.com/docs/api-reference (chat, responses, embeddings)
- Anthropic: https://docs.anthropic.com/en/api/messages and …/messages-streaming
- Gemini: https://ai.google.dev/api/generate-content and …/api/interactions-api
- Cohere: https://docs.cohere.com/reference/chat and …/reference/chat-stream
- Ollama: https://docs.ollama.com/api
- Bedrock: https://docs.aws.amazon.com/bedrock/latest/APIReference/API_runtime_Converse.html

Mistral, Groq, xAI, DeepSeek, Moonshot, Perplexity, Azure, vLLM and others report as
OpenAI does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Provider: TypeAlias = Literal[
    "openai", "anthropic", "gemini", "cohere", "ollama", "bedrock"
]
PROVIDERS: tuple[Provider, ...] = get_args(Provider)
#: The figures of a report by their provider's names, dotted where they are nested.
Figures: TypeAlias = "Mapping[str, int]"


class LLMUsage(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens of a call, in one convention for all providers.

    Cached tokens and tokens written to a cache are part of the input, reasoning is part
    of the output. A figure that was not reported is None, never 0.
    """

    #: The shape of the report.
    provider: Provider
    #: The model that answered, by its own name.
    model: str | None = None
    #: All input, cached or not.
    input_tokens: int | None = None
    #: All output, reasoning included.
    output_tokens: int | None = None
    #: The part of the input that was read from a cache.
    cached_input_tokens: int | None = None
    #: The part of the input that was written to a cache.
    cache_creation_tokens: int | None = None
    #: The part of the output that was reasoning.
    reasoning_tokens: int | None = None
    #: The reported total, or the sum of input and output where that is more.
    total_tokens: int | None = None
    #: Why the figures may not be those of the call: ``ambiguous_usage`` (the body holds
    #: several reports, and no figure is lower than in any of them), ``several_calls``
    #: (the body holds several calls, and the last one counts).
    remarks: tuple[str, ...] = ()


#: The fields that a meter can have. The remarks are told in the log and in the counts.
FIELDS = tuple(name for name in LLMUsage.__struct_fields__ if name != "remarks")


class Place(NamedTuple):
    """A place in a document at which a provider reports usage."""

    provider: Provider
    #: The path to the report, ``*`` being the elements of a list. It is empty if the
    #: figures are members of the document itself.
    report: tuple[str, ...]
    #: The figures of which a report has at least one.
    figures: frozenset[str]
    #: The member that tells the kind of a document, and the kinds that have the report.
    #: Nothing else is looked into: what is inside a document may be a caller's.
    kind: tuple[str, ...] = ()
    #: The member that has to stand beside the report, where no member tells the kind.
    beside: str = ""
    #: The member that names the model.
    model: str = "model"
    #: The member that names the call; empty if none does.
    call: str = "id"
    #: *model* and *call* stand beside the report, and not at the top of the document.
    is_wrapped: bool = False
    #: If the call has no name, this report is the first one of a new call.
    begins: bool = False
    #: The member that tells the kind of a document, and a kind that continues the call
    #: before, whatever name is in it.
    continues: tuple[str, str] = ("", "")


_OPENAI = frozenset({"prompt_tokens", "completion_tokens", "total_tokens"})
_INPUT_OUTPUT = frozenset({"input_tokens", "output_tokens"})
_GEMINI = frozenset({
    "promptTokenCount", "candidatesTokenCount", "responseTokenCount", "totalTokenCount",
})  # fmt: skip
_INTERACTION = frozenset({"total_input_tokens", "total_output_tokens"})
_COHERE = frozenset({
    "tokens.input_tokens", "tokens.output_tokens",
    "billed_units.input_tokens", "billed_units.output_tokens",
})  # fmt: skip
_OLLAMA = frozenset({"prompt_eval_count", "eval_count"})
_BEDROCK = frozenset({"inputTokens", "outputTokens", "totalTokens"})
_CHUNK = ("object", "chat.completion.chunk")

#: Of several places with the same path, the first with a figure in the report counts.
PLACES = (
    # A document, or an event that has its report at the top.
    Place("cohere", ("usage",), _COHERE),
    Place("gemini", ("usage",), _INTERACTION),
    Place("bedrock", ("usage",), _BEDROCK, call="", begins=True),
    Place("openai", ("usage",), _OPENAI),
    Place("anthropic", ("usage",), _INPUT_OUTPUT, continues=("type", "message_delta")),
    Place("openai", ("usage",), _INPUT_OUTPUT),
    Place("gemini", ("usageMetadata",), _GEMINI, model="modelVersion",
          call="responseId"),
    Place("cohere", ("meta",), _COHERE),
    Place("ollama", (), _OLLAMA, call="", begins=True),
    # An event that wraps its report.
    Place("anthropic", ("message", "usage"), _INPUT_OUTPUT, ("type", "message_start"),
          is_wrapped=True, begins=True),
    Place("openai", ("response", "usage"), _OPENAI | _INPUT_OUTPUT,
          ("type", "response.completed", "response.incomplete", "response.failed"),
          is_wrapped=True),
    Place("openai", ("x_groq", "usage"), _OPENAI, _CHUNK),  # Groq
    Place("openai", ("choices", "*", "usage"), _OPENAI, _CHUNK),  # Moonshot
    Place("gemini", ("interaction", "usage"), _INTERACTION,
          ("event_type", "interaction.completed", "interaction.complete"),
          is_wrapped=True),
    Place("cohere", ("delta", "usage"), _COHERE, ("type", "message-end")),
    Place("cohere", ("response", "meta"), _COHERE, ("event_type", "stream-end"),
          is_wrapped=True, call="generation_id"),
    Place("bedrock", ("metadata", "usage"), _BEDROCK, beside="metrics", call="",
          begins=True),
)  # fmt: skip

#: Which figures a count is: the first that is reported. ``+`` adds what is counted
#: beside it. ``left_out`` are the iterations that Anthropic's own figures leave out.
COUNTS: dict[Provider, dict[str, tuple[str, ...]]] = {
    "openai": {
        "input_tokens": ("prompt_tokens", "input_tokens"),
        "output_tokens": ("completion_tokens", "output_tokens"),
        "cached_input_tokens": (
            "prompt_tokens_details.cached_tokens",
            "input_tokens_details.cached_tokens",
            "input_token_details.cached_tokens",
            "prompt_cache_hit_tokens",  # DeepSeek
            "cached_tokens",  # Moonshot
            "num_cached_tokens",  # Mistral
            "cache_read_input_tokens",  # gateways to Anthropic
        ),
        "cache_creation_tokens": (
            "prompt_tokens_details.cache_write_tokens",
            "input_tokens_details.cache_write_tokens",
            "cache_creation_input_tokens",
        ),
        "reasoning_tokens": (
            "completion_tokens_details.reasoning_tokens",
            "output_tokens_details.reasoning_tokens",
            "reasoning_tokens",  # Perplexity
        ),
        "total_tokens": ("total_tokens",),
    },
    "anthropic": {
        "input_tokens": (
            "input_tokens + cache_read_input_tokens + cache_creation_input_tokens"
            " + left_out.input_tokens + left_out.cache_read_input_tokens"
            " + left_out.cache_creation_input_tokens",
        ),
        "output_tokens": ("output_tokens + left_out.output_tokens",),
        "cached_input_tokens": (
            "cache_read_input_tokens + left_out.cache_read_input_tokens",
            "left_out.cache_read_input_tokens",
        ),
        "cache_creation_tokens": (
            "cache_creation_input_tokens + left_out.cache_creation_input_tokens",
            "left_out.cache_creation_input_tokens",
        ),
        "reasoning_tokens": ("output_tokens_details.thinking_tokens",),
        "total_tokens": ("total_tokens",),  # gateways
    },
    "gemini": {
        "input_tokens": (
            "promptTokenCount + toolUsePromptTokenCount",
            "total_input_tokens + total_tool_use_tokens",
        ),
        "output_tokens": (
            "candidatesTokenCount",
            "responseTokenCount",
            "total_output_tokens",
        ),
        "cached_input_tokens": ("cachedContentTokenCount", "total_cached_tokens"),
        "reasoning_tokens": ("thoughtsTokenCount", "total_thought_tokens"),
        "total_tokens": ("totalTokenCount", "total_tokens"),
    },
    "cohere": {
        # What the model processed. Embeddings report what is billed alone.
        "input_tokens": ("tokens.input_tokens", "billed_units.input_tokens"),
        "output_tokens": ("tokens.output_tokens", "billed_units.output_tokens"),
        "cached_input_tokens": ("cached_tokens",),
    },
    "ollama": {
        "input_tokens": ("prompt_eval_count",),
        "output_tokens": ("eval_count",),
    },
    "bedrock": {
        "input_tokens": ("inputTokens + cacheReadInputTokens + cacheWriteInputTokens",),
        "output_tokens": ("outputTokens",),
        "cached_input_tokens": ("cacheReadInputTokens",),
        "cache_creation_tokens": ("cacheWriteInputTokens",),
        "total_tokens": ("totalTokens",),
    },
}
#: Providers that count reasoning beside the output, unless the total says otherwise.
REASONING_BESIDE = frozenset({"gemini"})

_TERMS = {
    provider: [
        (field, [alternative.split(" + ") for alternative in alternatives])
        for field, alternatives in counts.items()
    ]
    for provider, counts in COUNTS.items()
}


def usage_from(provider: Provider, model: str | None, figures: Figures) -> LLMUsage:
    """Return the usage that *figures*, as *provider* names them, come to."""
    counts: dict[str, Any] = {
        field: _count(figures, terms) for field, terms in _TERMS[provider]
    }
    given, total = counts["input_tokens"], counts.get("total_tokens")
    made = counts["output_tokens"] = _with_reasoning(
        given,
        counts["output_tokens"],
        counts.get("reasoning_tokens"),
        total,
        is_beside=provider in REASONING_BESIDE,
    )
    if given is not None and made is not None:
        counts["total_tokens"] = max(total or 0, given + made)
    return LLMUsage(provider=provider, model=model, **counts)


def _count(figures: Figures, alternatives: list[list[str]]) -> int | None:
    for first, *others in alternatives:
        if first in figures:
            return figures[first] + sum(figures.get(other, 0) for other in others)
    return None


def _with_reasoning(
    given: int | None,
    made: int | None,
    reasoning: int | None,
    total: int | None,
    *,
    is_beside: bool,
) -> int | None:
    """Return the output with the reasoning, once.

    Some providers count it in the output and some beside it, and some do both. The
    total tells where it is the sum. Reasoning that is larger than the output is not in
    it.
    """
    if not reasoning:
        return made
    if made is None:
        return reasoning if is_beside else None
    if given is not None and total == given + made + reasoning:
        is_beside = True
    elif given is not None and total == given + made:
        is_beside = False
    return made + reasoning if is_beside or reasoning > made else made


def tokens_by_type(usage: LLMUsage) -> dict[str, int]:
    """Return the tokens of *usage* by the types that OpenMeter prices, without zeros.

    No token is counted twice: together they are the input and the output.
    """
    given, made = usage.input_tokens or 0, usage.output_tokens or 0
    read = min(usage.cached_input_tokens or 0, given)
    written = min(usage.cache_creation_tokens or 0, given - read)
    reasoning = min(usage.reasoning_tokens or 0, made)
    counts = {
        "input": given - read - written,
        "output": made - reasoning,
        "cache_read": read,
        "cache_write": written,
        "reasoning": reasoning,
    }
    return {name: count for name, count in counts.items() if count}


def priced_data(usage: LLMUsage, provider: str) -> list[dict[str, Any]]:
    """Return the data of one event for each type of token that was used.

    *provider* is the company that bills them, which the shape does not tell.
    """
    model = {} if usage.model is None else {"model": usage.model}
    return [
        {"tokens": count, "type": name, "provider": provider, **model}
        for name, count in tokens_by_type(usage).items()
    ]


def tokens(usage: LLMUsage) -> int:
    """Return all tokens of *usage* that are known."""
    if usage.total_tokens is not None:
        return usage.total_tokens
    return (usage.input_tokens or 0) + (usage.output_tokens or 0)


def dearest(usage: LLMUsage, others: Iterable[LLMUsage]) -> LLMUsage:
    """Return *usage* with no figure that costs less than in one of *others*.

    A caller who adds a report of their own to a body can raise the bill, and lower
    neither its input, nor the input that no cache held, nor its output.
    """
    every = [usage, *others]
    raised = {
        field: max(known)
        for field in (
            "input_tokens", "output_tokens", "cache_creation_tokens",
            "reasoning_tokens",
        )
        if (known := [n for each in every if (n := getattr(each, field)) is not None])
    }  # fmt: skip
    raised["total_tokens"] = max(map(tokens, every))
    if usage.cached_input_tokens is not None:
        uncached = max(
            (each.input_tokens or 0) - (each.cached_input_tokens or 0) for each in every
        )
        cached = max(0, (raised.get("input_tokens") or 0) - uncached)
        raised["cached_input_tokens"] = cached
    return msgspec.structs.replace(usage, **raised)

"""The formats in which the providers of language models report usage.

A *report* is a JSON object with *figures*: the provider's own names, and their counts.
Two tables hold the formats that the providers document: :data:`PLACES`, the place of a
report in a document, and :data:`COUNTS`, the figures that are input, output and so on.
In both tables the first entry that matches is used.

- OpenAI: https://platform.openai.com/docs/api-reference (chat, responses, embeddings)
- Anthropic: https://docs.anthropic.com/en/api/messages and …/messages-streaming
- Gemini: https://ai.google.dev/api/generate-content and …/api/interactions-api
- Cohere: https://docs.cohere.com/reference/chat and …/reference/chat-stream
- Ollama: https://docs.ollama.com/api
- Bedrock: https://docs.aws.amazon.com/bedrock/latest/APIReference/API_runtime_Converse.html

Mistral, Groq, xAI, DeepSeek, Moonshot, Perplexity, Azure, vLLM and others report in
OpenAI's format. So a `Provider` is the *shape* of a report, not the company that bills.
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
#: The figures of a report by the provider's names; those of nested ones have a dot.
Figures: TypeAlias = "Mapping[str, int]"


class LLMUsage(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens of a call, with the same fields for all providers.

    The input includes cached tokens and tokens written to a cache; the output includes
    reasoning. A figure that was not reported is None, never 0.
    """

    #: The shape of the report.
    provider: Provider
    #: The model that the report names.
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
    #: The reported total, or the sum of input and output if that is larger.
    total_tokens: int | None = None
    #: Reasons why the figures may not be those of the call: ``ambiguous_usage`` (the
    #: body holds several reports that differ, and each figure is the highest in any of
    #: them), ``several_calls`` (the body holds several calls, and the last one counts).
    remarks: tuple[str, ...] = ()


#: The fields that a meter can use. Remarks appear in the log and in the statistics.
FIELDS = tuple(name for name in LLMUsage.__struct_fields__ if name != "remarks")


class Place(NamedTuple):
    """A place in a document at which a provider reports usage."""

    provider: Provider
    #: The path to the report; ``*`` stands for the elements of a list. It is empty if
    #: the figures are members of the document itself.
    report: tuple[str, ...]
    #: The figures that identify a report: it has at least one of them.
    figures: frozenset[str]
    #: The member that states the kind of a document, then the kinds with this report.
    #: Other documents are not searched: they may contain text of the caller.
    kind: tuple[str, ...] = ()
    #: A member that must be next to the report, where no member states the kind.
    beside: str = ""
    #: The member with the name of the model.
    model: str = "model"
    #: The member with the id of the call, or "" if there is none.
    call: str = "id"
    #: True if *model* and *call* are next to the report, not in the document itself.
    is_wrapped: bool = False
    #: True if a report without the id of a call is the first one of a new call.
    begins: bool = False
    #: The member that states the kind of a document, and the kind of those documents
    #: that continue the previous call, even if they have another id.
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

#: The places of reports. If two have the same path, the first whose figures the report
#: contains is used.
PLACES = (
    # The report is a member of the document or event.
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
    # The report is in a member of the event.
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

#: The alternative figures for each field of `LLMUsage`. The first that is reported is
#: used, plus those of the figures after ``+`` that are reported. ``left_out.…`` are the
#: iterations that Anthropic's own figures leave out, see `left_out`.
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
        # `tokens` are processed, `billed_units` billed. Embeddings report the latter.
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
#: Providers whose output excludes reasoning, unless the total proves the opposite.
REASONING_EXCLUDED = frozenset({"gemini"})

#: Maximum count. Larger counts are not exact as a float, which OpenMeter uses.
_MAX_COUNT = 2**53
#: The figures in each of Anthropic's ``usage.iterations``.
_MAIN = ("input_tokens", "output_tokens")
_CACHED = ("cache_read_input_tokens", "cache_creation_input_tokens")

_TERMS = {
    provider: [
        (field, [alternative.split(" + ") for alternative in alternatives])
        for field, alternatives in counts.items()
    ]
    for provider, counts in COUNTS.items()
}


def figures_in(usage: dict[str, Any]) -> dict[str, int]:
    """Return the counts in *usage*, and those nested one level as ``outer.inner``."""
    figures: dict[str, int] = {}
    for name, value in usage.items():
        if isinstance(value, dict):
            for inner, inner_value in value.items():
                if (count := _count(inner_value)) is not None:
                    figures[f"{name}.{inner}"] = count
        elif (count := _count(value)) is not None:
            figures[name] = count
    return figures


def left_out(iterations: object, figures: Figures) -> dict[str, int]:
    """Return the tokens of *iterations* that Anthropic's own *figures* leave out.

    Anthropic's figures include the iterations of type ``message``. They leave out the
    iterations of other types: compactions and the calls of an advisor.
    """
    listed = iterations if isinstance(iterations, list) else []
    listed = [each for each in listed if isinstance(each, dict)]
    totals = _sums(listed)
    if all(figures.get(name, 0) >= totals[name] for name in _MAIN):
        return {}
    others = _sums(each for each in listed if each.get("type") != "message")
    return {f"left_out.{name}": count for name, count in others.items() if count}


def _sums(iterations: Iterable[dict[str, Any]]) -> dict[str, int]:
    sums = dict.fromkeys((*_MAIN, *_CACHED), 0)
    for iteration in iterations:
        for name in sums:
            sums[name] += _count(iteration.get(name)) or 0
    return sums


def _count(value: object) -> int | None:
    """Return *value* if it is a count, else None. Cohere writes counts as floats."""
    if type(value) is int:
        return value if 0 <= value <= _MAX_COUNT else None
    if isinstance(value, float) and 0 <= value <= _MAX_COUNT and value.is_integer():
        return int(value)
    return None


def usage_from(provider: Provider, model: str | None, figures: Figures) -> LLMUsage:
    """Convert the figures of *provider* to an `LLMUsage`."""
    counts: dict[str, Any] = {
        field: _first_reported(figures, terms) for field, terms in _TERMS[provider]
    }
    input_, total = counts["input_tokens"], counts.get("total_tokens")
    output = counts["output_tokens"] = _with_reasoning(
        input_,
        counts["output_tokens"],
        counts.get("reasoning_tokens"),
        total,
        is_excluded=provider in REASONING_EXCLUDED,
    )
    if input_ is not None and output is not None:
        counts["total_tokens"] = max(total or 0, input_ + output)
    return LLMUsage(provider=provider, model=model, **counts)


def _first_reported(figures: Figures, alternatives: list[list[str]]) -> int | None:
    for first, *others in alternatives:
        if first in figures:
            return figures[first] + sum(figures.get(other, 0) for other in others)
    return None


def _with_reasoning(
    input_: int | None,
    output: int | None,
    reasoning: int | None,
    total: int | None,
    *,
    is_excluded: bool,
) -> int | None:
    """Return the output including the reasoning.

    Some providers include reasoning in their output, others exclude it (*is_excluded*),
    and some vary. The total decides if it is the sum with or without the reasoning.
    Reasoning that is larger than the output was not included in it.
    """
    if not reasoning:
        return output
    if output is None:
        return reasoning if is_excluded else None
    if input_ is not None and total == input_ + output + reasoning:
        is_excluded = True
    elif input_ is not None and total == input_ + output:
        is_excluded = False
    return output + reasoning if is_excluded or reasoning > output else output


def tokens_by_type(usage: LLMUsage) -> dict[str, int]:
    """Return the tokens of *usage* by the types that OpenMeter prices, without zeros.

    Each token has one type: the sum of all types is the input plus the output.
    """
    input_, output = usage.input_tokens or 0, usage.output_tokens or 0
    read = min(usage.cached_input_tokens or 0, input_)
    written = min(usage.cache_creation_tokens or 0, input_ - read)
    reasoning = min(usage.reasoning_tokens or 0, output)
    counts = {
        "input": input_ - read - written,
        "output": output - reasoning,
        "cache_read": read,
        "cache_write": written,
        "reasoning": reasoning,
    }
    return {name: count for name, count in counts.items() if count}


def priced_data(usage: LLMUsage, provider: str) -> list[dict[str, Any]]:
    """Return the data of one event for each type of token that was used.

    *provider* is the company that bills the tokens; `usage.provider` is only the shape.
    """
    model = {} if usage.model is None else {"model": usage.model}
    return [
        {"tokens": count, "type": name, "provider": provider, **model}
        for name, count in tokens_by_type(usage).items()
    ]


def tokens(usage: LLMUsage) -> int:
    """Return the total number of tokens in *usage*, with unknown figures as 0."""
    if usage.total_tokens is not None:
        return usage.total_tokens
    return (usage.input_tokens or 0) + (usage.output_tokens or 0)


def costliest(usage: LLMUsage, others: Iterable[LLMUsage]) -> LLMUsage:
    """Return *usage* with the costliest value of each figure in it and in *others*.

    So a caller who gets a report of their own into the body can only raise the bill.
    Cached input costs less than other input, so *cached_input_tokens* is set to leave
    the highest number of tokens that are not cached.
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

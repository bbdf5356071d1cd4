"""What a call of a language model used, whatever provider's words say it.

:class:`LLMUsage` has one convention for all of them: cached tokens and tokens
written to a cache are part of the input, reasoning is part of the output. Where
a provider counts them beside it, they are added:

=========  ==============================  ==================================  ========
shape      input_tokens                    output_tokens                       total
=========  ==============================  ==================================  ========
openai     ``prompt_tokens`` or            ``completion_tokens`` or            reported
           ``input_tokens``                ``output_tokens`` (1)
anthropic  ``input_tokens``                ``output_tokens``                   sum
           + ``cache_read_input_tokens``   + output of compactions
           + ``cache_creation_…``
           + input of compactions
gemini     ``promptTokenCount``            ``candidatesTokenCount``            reported
           + ``toolUsePromptTokenCount``   + ``thoughtsTokenCount`` (1)
cohere     ``tokens.input_tokens`` (2)     ``tokens.output_tokens`` (2)        sum
ollama     ``prompt_eval_count``           ``eval_count``                      sum
=========  ==============================  ==================================  ========

(1) Reasoning is inside for OpenAI and beside for xAI, beside for Gemini and inside
for some of its models: the total that comes along says which, where it says it.
(2) What the model processed. Where only ``billed_units`` are reported, as for
embeddings, these.

The shape is told by the words of the report, not by the address. Mistral, Groq,
DeepSeek, Moonshot, Azure, vLLM and the like speak as OpenAI does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping

Provider: TypeAlias = Literal["openai", "anthropic", "gemini", "cohere", "ollama"]
#: The figures of a report by their provider's names, dotted where they are nested.
Figures: TypeAlias = "Mapping[str, int]"


class LLMUsage(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens of a call. None is what was not reported; it is never 0 for that."""

    #: Whose shape the report has.
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
    #: As reported, else input and output together where both are known.
    total_tokens: int | None = None


def usage_of(provider: Provider, model: str | None, figures: Figures) -> LLMUsage:
    """Say what *figures*, as *provider* names them, come to."""
    counts = _COUNTS[provider](figures)
    if counts.get("total_tokens") is None:
        counts["total_tokens"] = _sum(
            counts.get("input_tokens"), counts.get("output_tokens")
        )
    return LLMUsage(provider=provider, model=model, **counts)


def _openai(figures: Figures) -> dict[str, int | None]:
    given = _first(figures, "prompt_tokens", "input_tokens")
    made = _first(figures, "completion_tokens", "output_tokens")
    total = figures.get("total_tokens")
    reasoning = _first(
        figures,
        "completion_tokens_details.reasoning_tokens",
        "output_tokens_details.reasoning_tokens",
        "reasoning_tokens",
    )
    if total is not None and total == _sum(given, made, reasoning):
        made = _sum(made, reasoning)
    return {
        "input_tokens": given,
        "output_tokens": made,
        "total_tokens": total,
        "reasoning_tokens": reasoning,
        "cached_input_tokens": _first(
            figures,
            "prompt_tokens_details.cached_tokens",
            "input_tokens_details.cached_tokens",
            "prompt_cache_hit_tokens",
            "cached_tokens",
            "num_cached_tokens",
            "cache_read_input_tokens",
        ),
        "cache_creation_tokens": _first(
            figures,
            "prompt_tokens_details.cache_write_tokens",
            "input_tokens_details.cache_write_tokens",
            "cache_creation_input_tokens",
        ),
    }


def _anthropic(figures: Figures) -> dict[str, int | None]:
    cached = figures.get("cache_read_input_tokens")
    created = figures.get("cache_creation_input_tokens")
    return {
        "input_tokens": _plus(
            figures.get("input_tokens"),
            cached,
            created,
            figures.get("compaction.input_tokens"),
        ),
        "output_tokens": _plus(
            figures.get("output_tokens"), figures.get("compaction.output_tokens")
        ),
        "cached_input_tokens": cached,
        "cache_creation_tokens": created,
        "reasoning_tokens": figures.get("output_tokens_details.thinking_tokens"),
    }


def _gemini(figures: Figures) -> dict[str, int | None]:
    given = _plus(
        _first(figures, "promptTokenCount", "total_input_tokens"),
        _first(figures, "toolUsePromptTokenCount", "total_tool_use_tokens"),
    )
    made = _first(
        figures, "candidatesTokenCount", "responseTokenCount", "total_output_tokens"
    )
    thoughts = _first(figures, "thoughtsTokenCount", "total_thought_tokens")
    total = _first(figures, "totalTokenCount", "total_tokens")
    if made is None:
        made = thoughts
    elif total is None or total != _sum(given, made):
        made = _plus(made, thoughts)
    return {
        "input_tokens": given,
        "output_tokens": made,
        "total_tokens": total,
        "reasoning_tokens": thoughts,
        "cached_input_tokens": _first(
            figures, "cachedContentTokenCount", "total_cached_tokens"
        ),
    }


def _cohere(figures: Figures) -> dict[str, int | None]:
    unit = "tokens" if any(name.startswith("tokens.") for name in figures) else ""
    unit = unit or "billed_units"
    return {
        "input_tokens": figures.get(f"{unit}.input_tokens"),
        "output_tokens": figures.get(f"{unit}.output_tokens"),
        "cached_input_tokens": figures.get("cached_tokens"),
    }


def _ollama(figures: Figures) -> dict[str, int | None]:
    return {
        "input_tokens": figures.get("prompt_eval_count"),
        "output_tokens": figures.get("eval_count"),
    }


_COUNTS = {
    "openai": _openai,
    "anthropic": _anthropic,
    "gemini": _gemini,
    "cohere": _cohere,
    "ollama": _ollama,
}


def _first(figures: Figures, *names: str) -> int | None:
    return next((figures[name] for name in names if name in figures), None)


def _sum(*counts: int | None) -> int | None:
    """Add what has to be known in full."""
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _plus(count: int | None, *more: int | None) -> int | None:
    """Add to a known count what else is known."""
    return None if count is None else count + sum(part or 0 for part in more)

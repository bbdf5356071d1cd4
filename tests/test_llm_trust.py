"""No JSON of a caller lowers a bill, wherever an application puts it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bodies import cut, read
from openmeter_wsgi.bodies.base import Unknown
from openmeter_wsgi.exchange import reader_of

FIGURES = ("input_tokens", "output_tokens", "total_tokens")


def _openai(a: int, b: int) -> dict[str, int]:
    return {"prompt_tokens": a, "completion_tokens": b, "total_tokens": a + b}


def _anthropic(a: int, b: int) -> dict[str, int]:
    return {"input_tokens": a, "output_tokens": b}


def _interaction(a: int, b: int) -> dict[str, int]:
    return {"total_input_tokens": a, "total_output_tokens": b, "total_tokens": a + b}


def _cohere(a: int, b: int) -> dict[str, Any]:
    return {"tokens": {"input_tokens": a, "output_tokens": b}}


def _bedrock(a: int, b: int) -> dict[str, int]:
    return {"inputTokens": a, "outputTokens": b, "totalTokens": a + b}


#: The provider, and a function that makes its document from numbers of tokens.
SHAPES: dict[str, Any] = {
    "openai": ("openai", lambda a, b: {"model": "m", "usage": _openai(a, b)}),
    "openai responses": (
        "openai",
        lambda a, b: {
            "object": "response",
            "usage": {**_anthropic(a, b), "total_tokens": a + b},
        },
    ),
    "openai responses, stream": (
        "openai",
        lambda a, b: {
            "type": "response.completed",
            "response": {"usage": {**_anthropic(a, b), "total_tokens": a + b}},
        },
    ),
    "groq, stream": (
        "openai",
        lambda a, b: {
            "object": "chat.completion.chunk",
            "x_groq": {"usage": _openai(a, b)},
        },
    ),
    "moonshot, stream": (
        "openai",
        lambda a, b: {
            "object": "chat.completion.chunk",
            "choices": [{"index": 0, "usage": _openai(a, b)}],
        },
    ),
    "anthropic": ("anthropic", lambda a, b: {"usage": _anthropic(a, b)}),
    "anthropic, start": (
        "anthropic",
        lambda a, b: {"type": "message_start", "message": {"usage": _anthropic(a, b)}},
    ),
    "anthropic, delta": (
        "anthropic",
        lambda a, b: {"type": "message_delta", "usage": _anthropic(a, b)},
    ),
    "gemini": (
        "gemini",
        lambda a, b: {
            "usageMetadata": {
                "promptTokenCount": a,
                "candidatesTokenCount": b,
                "totalTokenCount": a + b,
            }
        },
    ),
    "gemini interaction": ("gemini", lambda a, b: {"usage": _interaction(a, b)}),
    "gemini interaction, stream": (
        "gemini",
        lambda a, b: {
            "event_type": "interaction.completed",
            "interaction": {"usage": _interaction(a, b)},
        },
    ),
    "cohere v1": ("cohere", lambda a, b: {"meta": _cohere(a, b)}),
    "cohere v1, stream": (
        "cohere",
        lambda a, b: {
            "event_type": "stream-end", "response": {"meta": _cohere(a, b)},
        },
    ),
    "cohere v2": ("cohere", lambda a, b: {"usage": _cohere(a, b)}),
    "cohere v2, stream": (
        "cohere",
        lambda a, b: {"type": "message-end", "delta": {"usage": _cohere(a, b)}},
    ),
    "ollama": ("ollama", lambda a, b: {"prompt_eval_count": a, "eval_count": b}),
    "bedrock": ("bedrock", lambda a, b: {"usage": _bedrock(a, b)}),
    "bedrock, stream": (
        "bedrock",
        lambda a, b: {
            "metadata": {"usage": _bedrock(a, b), "metrics": {"latencyMs": 1}}
        },
    ),
}  # fmt: skip
#: The same in several documents of a stream, of which none has all figures.
STREAMS: dict[str, Any] = {
    "anthropic, whole stream": (
        "anthropic",
        lambda a, b: [
            {
                "type": "message_start",
                "message": {"id": "m1", "usage": {**_anthropic(a, 1)}},
            },
            {"type": "message_delta", "usage": {"output_tokens": b}},
        ],
    ),
    "openai, whole stream": (
        "openai",
        lambda a, b: [
            {"object": "chat.completion.chunk", "id": "c1", "usage": _openai(a, 0)},
            {"object": "chat.completion.chunk", "id": "c1", "usage": _openai(0, b)},
        ],
    ),
}
#: The members that can contain a report, or tell its kind.
NAMES = (
    "usage", "usageMetadata", "meta", "metadata", "message", "response", "delta",
    "interaction", "x_groq", "choices", "eval_count", "prompt_eval_count", "type",
    "object", "event_type", "model", "modelVersion", "id", "echo",
)  # fmt: skip
KINDS = (
    "message", "message_start", "message_delta", "message-end", "response.completed",
    "response.created", "stream-end", "interaction.completed", "chat.completion.chunk",
)  # fmt: skip

counts = st.one_of(st.integers(0, 30), st.integers(0, 5_000))
forged = st.builds(
    lambda shape, a, b: SHAPES[shape][1](a, b), st.sampled_from(list(SHAPES)),
    counts, counts,
)  # fmt: skip
usages = st.builds(
    lambda make, a, b: make(a, b),
    st.sampled_from([_openai, _anthropic, _interaction, _cohere, _bedrock]),
    counts,
    counts,
)
scalars = st.one_of(
    st.sampled_from([*KINDS, None, "", 1, "\ud83e", float("nan")]), counts
)
callers_json = st.recursive(
    st.one_of(forged, usages, scalars),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    ),
    max_leaves=8,
)
callers_members = st.one_of(
    st.dictionaries(st.sampled_from(NAMES), callers_json, max_size=5), forged
)
#: The members with the figures: they contain no text of a caller.
REPORTS = {"usage", "usageMetadata", "meta"}


@st.composite
def wrapped(draw: Any, document: dict[str, Any]) -> dict[str, Any]:
    """*document* with a caller's members beside its own, before and after, inside."""
    own: dict[str, Any] = {}
    for name, value in document.items():
        own[name] = value
        if isinstance(value, dict) and name not in REPORTS:
            own[name] = draw(wrapped(value))
        elif isinstance(value, list):
            own[name] = [
                *draw(st.lists(callers_json, max_size=2)),
                *[draw(wrapped(each)) for each in value],
            ]
    before, after = draw(callers_members), draw(callers_members)
    return {
        **{name: value for name, value in before.items() if name not in own},
        **own,
        **{name: value for name, value in after.items() if name not in own},
    }


def is_none_of(provider: str, kind: str, document: dict[str, Any]) -> bool:
    body = json.dumps(document).encode("utf-8", "surrogatepass")
    usage = usage_of(body, "application/json", [], kind)
    return isinstance(usage, Unknown) or usage.provider != provider


def other_documents(provider: str, kind: str) -> st.SearchStrategy[dict[str, Any]]:
    """Documents of a stream that are no report of *provider*."""
    return st.one_of(
        st.builds(lambda value: {"echo": value}, callers_json),
        forged.filter(lambda document: is_none_of(provider, kind, document)),
    )


def as_events(documents: list[dict[str, Any]]) -> str:
    return "".join(f"data: {json.dumps(each)}\n\n" for each in documents)


def as_lines(documents: list[dict[str, Any]]) -> str:
    return "".join(f"{json.dumps(each)}\n" for each in documents)


WAYS: dict[str, Any] = {
    "text/event-stream": as_events,
    "application/x-ndjson": as_lines,
    "application/json": json.dumps,
}


def usage_of(body: bytes, content_type: str, chunks: list[int], kind: str) -> Any:
    reader = reader_of(kind)(content_type, None)  # type: ignore[arg-type]
    return read(reader, *cut(body, [at for at in chunks if at <= len(body)]))


def assert_not_lower(found: Any, expected: Any) -> None:
    assert not isinstance(found, Unknown)
    if "ambiguous_usage" not in found.remarks:
        assert found.provider == expected.provider
        assert [getattr(found, name) for name in FIGURES] == [
            getattr(expected, name) for name in FIGURES
        ]
    for name in FIGURES:
        assert getattr(found, name) >= getattr(expected, name)


@pytest.mark.parametrize("shape", [*SHAPES, *STREAMS])
@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    stated=st.booleans(),
    data=st.data(),
    a=st.integers(0, 3_000),
    b=st.integers(1, 3_000),
    content_type=st.sampled_from(list(WAYS)),
)
def test_a_callers_json_never_lowers_the_bill(
    shape: str, stated: bool, data: Any, a: int, b: int, content_type: str
) -> None:
    provider, make = {**SHAPES, **STREAMS}[shape]
    kind = f"llm:{provider}" if stated else "llm"
    made = make(a, b)
    reports = made if isinstance(made, list) else [made]
    plain = as_lines(reports).encode()
    expected = usage_of(plain, "application/x-ndjson", [], kind)
    assert expected.provider == provider
    assert (expected.input_tokens, expected.output_tokens) == (a, b)

    documents: Any = [data.draw(wrapped(report)) for report in reports]
    if (
        content_type != "application/json"
        or len(reports) > 1
        or data.draw(st.booleans())
    ):
        around = st.lists(other_documents(provider, kind), max_size=2)
        documents = [
            *data.draw(around),
            *[each for one in documents for each in (one, *data.draw(around))],
        ]
    else:
        (documents,) = documents
    body = WAYS[content_type](documents).encode("utf-8", "surrogatepass")
    positions = data.draw(st.lists(st.integers(0, len(body)), max_size=4))

    assert_not_lower(usage_of(body, content_type, positions, kind), expected)


@pytest.mark.parametrize("stated", ["llm", "llm:anthropic"])
def test_a_name_of_the_callers_does_not_part_a_call(stated: str) -> None:
    start, delta = STREAMS["anthropic, whole stream"][1](900, 7)
    body = as_events([start, {"id": "of the caller", **delta}]).encode()

    found = usage_of(body, "text/event-stream", [], stated)

    assert (found.input_tokens, found.output_tokens) == (900, 7)
    assert found.remarks == ()


@pytest.mark.parametrize(
    "extra",
    [
        {"message": {"answer": 1, "usage": _openai(1, 0)}},
        {"response": {"usage": _openai(1, 0)}},
        {"delta": {"usage": _openai(1, 0)}},
        {"interaction": {"usage": _openai(1, 0)}},
        {"choices": [{"usage": _openai(1, 0)}]},
        {"x_groq": {"usage": _openai(1, 0)}},
        {"echo": [{"usage": _openai(1, 0), "eval_count": 9_999}]},
    ],
    ids=lambda extra: next(iter(extra)),
)
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_what_stands_inside_is_no_report(extra: dict[str, Any], first: bool) -> None:
    report = {"model": "m", "usage": _openai(1_000, 500)}
    body = json.dumps({**extra, **report} if first else {**report, **extra}).encode()

    found = usage_of(body, "application/json", [], "llm")

    assert (found.provider, found.model, found.total_tokens) == ("openai", "m", 1_500)
    assert found.remarks == ()


@pytest.mark.parametrize(
    ("extra", "provider", "total"),
    [
        ({"eval_count": 1}, "openai", 1_500),
        ({"meta": _cohere(1, 0)}, "openai", 1_500),
        ({"usageMetadata": {"totalTokenCount": 1}}, "openai", 1_500),
        ({"eval_count": 1_501}, "ollama", 1_501),
        ({"type": "message_start", "message": {"usage": _anthropic(1, 0)}},
         "openai", 1_500),
    ],
)  # fmt: skip
def test_of_two_reports_in_a_document_the_larger_counts(
    extra: dict[str, Any], provider: str, total: int
) -> None:
    for body in (
        json.dumps({"usage": _openai(1_000, 500), **extra}).encode(),
        json.dumps({**extra, "usage": _openai(1_000, 500)}).encode(),
    ):
        found = usage_of(body, "application/json", [], "llm")
        assert (found.provider, found.total_tokens) == (provider, total)
        assert found.remarks == ("ambiguous_usage",)
        stated = usage_of(body, "application/json", [], "llm:openai")
        assert (stated.provider, stated.total_tokens) == ("openai", 1_500)
        assert stated.remarks == ()


@pytest.mark.parametrize("kind", ["llm", "llm:openai"])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("more", [0, 1_000], ids=["smaller", "larger"])
def test_of_two_reports_of_one_provider_the_larger_counts(
    kind: str, first: bool, more: int
) -> None:
    report = {"usage": {**_openai(1_000, 500), "total_tokens": 1_500}}
    usage = {
        "prompt_tokens": 1 + more,
        "completion_tokens": 0,
        "total_tokens": 600 + more,
    }
    forged = {"type": "response.completed", "response": {"usage": usage}}
    body = json.dumps({**forged, **report} if first else {**report, **forged}).encode()

    found = usage_of(body, "application/json", [], kind)

    assert (found.input_tokens, found.output_tokens) == (1_000 + bool(more), 500)
    assert found.total_tokens == max(1_500, 600 + more)
    assert found.remarks == ("ambiguous_usage",)


@pytest.mark.parametrize("shape", STREAMS)
def test_a_report_inside_displaces_no_part_of_a_call(shape: str) -> None:
    provider, make = STREAMS[shape]
    first, last = make(900, 7)
    for forged in (
        {"response": {"usage": {**_openai(0, 0), "total_tokens": 5_000}}},
        {"response": {"usage": _openai(1, 0)}},
    ):
        body = as_events([first, {"type": "response.completed", **last, **forged}])
        found = usage_of(body.encode(), "text/event-stream", [], "llm")
        assert found.input_tokens >= 900
        assert found.output_tokens >= 7
        assert found.total_tokens >= 907
    start = {**first, "usage": {"input_tokens": 1, "output_tokens": 5_000}}
    found = usage_of(as_events([start, last]).encode(), "text/event-stream", [], "llm")
    if provider == "anthropic":
        assert (found.input_tokens, found.output_tokens) == (900, 5_000)


def test_no_figure_of_the_larger_report_undercuts_the_other() -> None:
    report = {**_openai(100, 1_000), "prompt_tokens_details": {"cached_tokens": 0}}
    cheap = {"promptTokenCount": 1_101, "cachedContentTokenCount": 1_101}
    body = json.dumps({"usage": report, "usageMetadata": cheap}).encode()

    found = usage_of(body, "application/json", [], "llm")

    assert (found.input_tokens, found.output_tokens) == (1_101, 1_000)
    assert found.input_tokens - found.cached_input_tokens >= 100


@pytest.mark.parametrize("depth", [900, 3_000, 50_000])
def test_no_depth_of_a_callers_json_hides_the_report(depth: int) -> None:
    echo = b"[" * depth + b"]" * depth
    body = b'{"echo":%b,"usage":{"prompt_tokens":2,"total_tokens":9}}' % echo

    for content_type, text in (
        ("application/json", body),
        ("text/event-stream", b"data: %b\n\n" % body),
    ):
        assert usage_of(text, content_type, [], "llm").total_tokens == 9

"""One event for each type of token, in the words by which OpenMeter finds a price."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing import bill
from bodies import LLM, LLM_NAMES, llm_body, llm_expected, media_type_of
from openmeter_wsgi import (
    ConfigError,
    MeterValueError,
    OpenMeterMiddleware,
    Policy,
    add_meters,
    llm_usage,
    usage_of,
)
from openmeter_wsgi.bodies.base import Unknown
from openmeter_wsgi.bodies.llm_shapes import LLMUsage, tokens_by_type
from servers import Consumer, make_environ

if TYPE_CHECKING:
    from openmeter_server import OpenMeterServer

TYPES = ("input", "output", "cache_read", "cache_write", "reasoning")
#: Recorded answers with caching and reasoning: who bills them, in which shape, and the
#: tokens in the order of TYPES, worked out by hand from what each provider documents.
RECORDED: dict[str, tuple[str, str, tuple[int, ...], int]] = {
    "openai_chat.json": ("azure", "openai", (93, 34, 1024, 0, 12), 1163),
    "openai_responses_completed.sse": ("openai", "openai", (72, 20, 256, 0, 32), 380),
    "deepseek_chat.json": ("deepseek", "openai", (6, 10, 64, 0, 80), 160),
    # The total tells that reasoning is beside the completion.
    "xai_chat.json": ("xai", "openai", (26, 9, 6, 0, 94), 135),
    "moonshot_chat_stream.sse": ("moonshotai", "openai", (11, 13, 8, 0, 0), 32),
    "openai_compatible_gateway.json": ("proxy", "openai", (25, 98, 1000, 200, 0), 1323),
    # 25 + 1,000 + 200 of input, 98 of output.
    "anthropic_message.json": ("anthropic", "anthropic", (25, 98, 1000, 200, 0), 1323),
    "anthropic_server_tool_stream.sse": (
        "anthropic", "anthropic", (425, 246, 1000, 200, 64), 1935,
    ),
    # 40 + 5 of tools; thoughts are beside the candidates.
    "gemini_generate.json": ("gemini", "gemini", (13, 15, 32, 0, 30), 90),
    "gemini_interaction_stream.sse": ("vertex_ai", "gemini", (8, 20, 3, 0, 22), 53),
    "cohere_chat_v2.json": ("cohere", "cohere", (27, 36, 480, 0, 0), 543),
    "bedrock_converse_cached.json": ("bedrock", "bedrock", (4, 57, 1700, 40, 0), 1801),
}  # fmt: skip


def expected(name: str) -> list[dict[str, Any]]:
    """Return the data of the events of a recorded answer."""
    provider, _, counts, _ = RECORDED[name]
    model = llm_expected(name).model
    return [
        {"tokens": count, "type": kind, "provider": provider}
        | ({"model": model} if model else {})
        for kind, count in zip(TYPES, counts, strict=True)
        if count
    ]


def documents(name: str) -> list[dict[str, Any]]:
    """Return the chunks of a recorded stream, or the one document of an answer."""
    text = (LLM / name).read_text()
    if name.endswith(".json"):
        return [json.loads(text)]
    lines = [line.removeprefix("data:") for line in text.splitlines()]
    return [json.loads(line) for line in lines if line.strip().startswith("{")]


def answered(openmeter: OpenMeterServer, name: str, **options: Any) -> list[Any]:
    """Return the events of a response that passes on a recorded answer."""

    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Type", media_type_of(name))])
        return [llm_body(name)]

    middleware = OpenMeterMiddleware(
        app, api_url=openmeter.url, on_missing_subject="acme", **options
    )
    Consumer().serve(middleware, make_environ())
    middleware.close(40)
    return openmeter.taken


def test_there_are_twelve_with_caching_or_reasoning() -> None:
    assert len(RECORDED) == 12
    assert all(sum(counts[2:]) for _, _, counts, _ in RECORDED.values())


@pytest.mark.parametrize("name", RECORDED)
def test_the_events_add_up_to_the_total_that_the_provider_bills(
    openmeter: OpenMeterServer, name: str
) -> None:
    provider, shape, counts, total = RECORDED[name]
    data = llm_usage(split="type", provider=provider, shape=shape)  # type: ignore[arg-type]
    events = answered(
        openmeter, name, meter={"type": "llm", "data": data}, meters={"calls": 1}
    )

    llm = [event for event in events if event["type"] == "llm"]
    assert [event["data"] for event in llm] == expected(name)
    assert sum(event["data"]["tokens"] for event in llm) == sum(counts) == total
    assert len({event["id"] for event in events}) == len(llm) + 1


@pytest.mark.parametrize("name", RECORDED)
def test_the_same_answer_or_its_chunks_state_the_same_in_a_handler(name: str) -> None:
    provider = RECORDED[name][0]
    chunks = documents(name)

    found = usage_of(iter(chunks), meter="llm", provider=provider)
    assert [each["data"] for each in found] == expected(name)
    assert {each["type"] for each in found} == {"llm"}
    if len(chunks) == 1:
        assert usage_of(chunks[0], meter="llm", provider=provider) == found


@pytest.mark.parametrize("name", LLM_NAMES)
def test_of_every_answer_the_types_add_up_to_input_and_output(name: str) -> None:
    usage = llm_expected(name)
    if not isinstance(usage, Unknown):
        given, made = usage.input_tokens or 0, usage.output_tokens or 0
        assert sum(tokens_by_type(usage).values()) == given + made


counts = st.none() | st.integers(0, 50)


@given(
    st.builds(
        LLMUsage, provider=st.just("openai"), input_tokens=counts,
        output_tokens=counts, cached_input_tokens=counts, cache_creation_tokens=counts,
        reasoning_tokens=counts,
    )
)  # fmt: skip
def test_no_token_is_counted_twice_or_negative(usage: LLMUsage) -> None:
    found = tokens_by_type(usage)

    assert set(found) <= set(TYPES)
    assert all(count > 0 for count in found.values())
    given, made = usage.input_tokens or 0, usage.output_tokens or 0
    assert sum(found.values()) == given + made


# -- How it is stated


def test_a_file_states_it_as_text(openmeter: OpenMeterServer) -> None:
    name = "deepseek_chat.json"
    text = "$llm:openai/type:deepseek"
    events = answered(openmeter, name, meter={"type": "llm", "data": text})

    assert [event["data"] for event in events] == expected(name)
    short = llm_usage(split="type", provider="deepseek")
    assert repr(short) == text
    assert repr(llm_usage(split="type", provider="gemini")) == "$llm:gemini/type:gemini"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"split": "type"}, "provider: expected the company"),
        ({"split": "type", "provider": ""}, "provider: expected the company"),
        ({"split": "model", "provider": "groq"}, "split: expected 'type', without"),
        ({"split": "type", "provider": "groq", "field": "model"}, "without a field"),
        ({"split": "type", "provider": "groq", "shape": "groq"}, "shape: expected one"),
        ({"provider": "groq"}, "provider: expected one of 'openai'"),
        ({"provider": "groq"}, "so write provider='openai' .*llm:openai/type:groq in"),
        ({"shape": "openai"}, "shape: expected only with split"),
    ],
)
def test_what_cannot_be_split_is_refused(arguments: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        llm_usage(**arguments)


@pytest.mark.parametrize(
    "options",
    [
        {"meters": {"tokens": "$llm/type:groq"}},
        {"meter": {"type": "llm", "data": {"all": "$llm/type:groq"}}},
        {"meter": {"type": "llm", "data": "$llm/type:"}},
        {"meter": {"type": "llm", "data": "$llm:groq/type:groq"}},
    ],
)
def test_it_stands_for_the_whole_data_of_a_document(options: Any) -> None:
    with pytest.raises(ConfigError, match=r"whole data|provider: exp|shape: exp"):
        Policy(api_url="http://127.0.0.1:1", **options)


def test_without_tokens_there_is_no_event(openmeter: OpenMeterServer) -> None:
    name = "openai_chat_stream_without_usage.sse"
    data = llm_usage(split="type", provider="openai")

    assert answered(openmeter, name, meter={"type": "llm", "data": data}) == []


# -- In a handler


class Answer:
    """A response as the SDKs have them, as far as they are alike."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document

    def model_dump(self, **how: Any) -> dict[str, Any]:
        assert how["by_alias"]
        return self._document


def test_a_handler_adds_what_a_call_used(openmeter: OpenMeterServer) -> None:
    answer = Answer(documents("openai_chat.json")[0])
    events = bill(openmeter, lambda request: add_meters(request, usage_of(answer)))

    found = [(event["type"], event["data"]["tokens"]) for event in events]
    assert found == [("llm_tokens", n) for n in (93, 34, 1024, 12)]
    assert {event["data"]["provider"] for event in events} == {"openai"}


def test_a_stream_without_usage_bills_nothing_and_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    chunks = documents("openai_chat_stream_without_usage.sse")

    assert usage_of(chunks) == usage_of([]) == []
    assert "a list reports no usage" in caplog.text
    assert "include_usage" in caplog.text


def test_several_calls_at_once_are_told(caplog: pytest.LogCaptureFixture) -> None:
    first, second = ({**documents("openai_chat.json")[0], "id": i} for i in "ab")

    assert len(usage_of([first, second])) == 4
    assert "holds several reports (several_calls)" in caplog.text


@pytest.mark.parametrize("response", [None, 5, "text", b"bytes", [5], object()])
def test_what_is_no_response_is_refused(response: Any) -> None:
    with pytest.raises(
        MeterValueError, match="usage_of: expected a response of the SDK"
    ):
        usage_of(response)

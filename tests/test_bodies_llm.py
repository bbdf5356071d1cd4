import gc
import json
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bodies import (
    LLM_NAMES,
    cut,
    cuts_of,
    damaged,
    in_steps,
    llm_body,
    llm_expected,
    media_type_of,
    read,
)
from openmeter_wsgi.bodies.base import MAX_DOCUMENT_BYTES, Unknown
from openmeter_wsgi.bodies.json import MAX_VALUE_BYTES
from openmeter_wsgi.bodies.llm import LLMReader, llm_reader
from openmeter_wsgi.bodies.llm_shapes import LLMUsage
from openmeter_wsgi.bodies.stream import MAX_FRAME_BYTES

BOM = b"\xef\xbb\xbf"
STREAMS = [name for name in LLM_NAMES if name.endswith((".sse", ".ndjson"))]
DOCUMENTS = [name for name in LLM_NAMES if name.endswith(".json")]
OBJECTS = [name for name in DOCUMENTS if "_list" not in name]
bodies = st.sampled_from([llm_body(name) for name in LLM_NAMES])
media_types = st.sampled_from(
    [None, "text/html", "application/json", "text/event-stream", "application/jsonl"]
)


@pytest.fixture(autouse=True)
def no_reader_fails(caplog):
    """A failure of a reader is hidden from the application, not from these tests."""
    yield
    assert caplog.records == []


@pytest.mark.parametrize("name", LLM_NAMES)
@pytest.mark.parametrize("is_declared", [True, False])
def test_what_a_provider_reports_is_read(name, is_declared):
    declared = media_type_of(name) if is_declared else None

    assert read(llm_reader(declared, None), llm_body(name)) == llm_expected(name)


@pytest.mark.parametrize(
    "name",
    [
        "anthropic_stream.sse",
        "gemini_stream_list.json",
        "ollama_chat_stream.ndjson",
        "openai_chat.json",
    ],
)
def test_a_body_may_be_cut_at_any_byte(name):
    body, expected = llm_body(name), llm_expected(name)

    for position in range(len(body)):
        chunks = cut(body, [position])
        assert read(LLMReader(media_type_of(name)), *chunks) == expected, position


@pytest.mark.parametrize("name", LLM_NAMES)
@pytest.mark.parametrize("size", [1, 2, 7])
def test_a_body_may_come_in_small_chunks(name, size):
    chunks = in_steps(llm_body(name), size)

    assert read(LLMReader(), *chunks) == llm_expected(name)


@pytest.mark.parametrize("name", [name for name in STREAMS if name.endswith(".sse")])
@pytest.mark.parametrize("end_of_line", [b"\n", b"\r", b"\r\n"])
@pytest.mark.parametrize("start", [b"", BOM, b": a comment", BOM + b"retry: 10"])
def test_an_event_stream_may_end_its_lines_in_three_ways(name, end_of_line, start):
    body = llm_body(name).replace(b"\r\n", b"\n").replace(b"\n", end_of_line)
    body = start + (end_of_line if b":" in start else b"") + body

    for size in (1, 3, len(body)):
        reader = LLMReader("text/event-stream")
        assert read(reader, *in_steps(body, size)) == llm_expected(name)


@pytest.mark.parametrize("name", OBJECTS)
def test_data_may_be_spread_over_lines(name):
    lines = llm_body(name).splitlines()
    body = b"".join(b"data: %b\n" % line for line in lines) + b"\n"

    for size in (1, 5, len(body)):
        assert read(LLMReader(), *in_steps(body, size)) == llm_expected(name)


def test_a_line_that_ends_in_two_bytes_may_be_cut_between_them():
    body = b'data: {"usage":\r\ndata: {"prompt_tokens": 1,\r\ndata: "total_tokens": 3}}'

    for position in range(len(body)):
        chunks = cut(body + b"\r\n\r\n", [position])
        assert read(LLMReader("text/event-stream"), *chunks).total_tokens == 3


@pytest.mark.parametrize(
    ("media_type", "body"),
    [
        (None, b"data: %b"),
        ("text/event-stream", b"data: %b"),
        ("text/event-stream", b"data: [%b]"),
        (None, b"%b"),
        ("application/json", b" [%b]"),
        ("application/x-ndjson", b"%b\n"),
    ],
)
def test_a_byte_order_mark_is_no_part_of_the_body(media_type, body):
    body = BOM + body % b'{"usage":{"prompt_tokens":1,"total_tokens":3}}'

    for size in (1, 2, 3, 4, len(body)):
        reader = LLMReader(media_type)
        assert read(reader, *in_steps(body, size)).total_tokens == 3


def test_fields_other_than_data_are_no_data():
    body = (
        b'event: {"usage":{"total_tokens":1}}\ndatas: {"usage":{"total_tokens":2}}\n\n'
    )

    assert read(LLMReader("text/event-stream"), body) == Unknown("no_usage")


def test_the_last_event_needs_no_blank_line():
    body = b'data: {"usage":{"prompt_tokens":1,"total_tokens":3}}'

    assert read(LLMReader(), body).total_tokens == 3


@given(cuts_of(bodies), media_types)
def test_chunks_make_no_difference(case, media_type):
    body, chunks = case

    assert read(LLMReader(media_type), *chunks) == read(LLMReader(media_type), body)


@given(cuts_of(damaged(bodies)), media_types)
def test_chunks_of_a_damaged_body_make_no_difference(case, media_type):
    body, chunks = case

    assert read(LLMReader(media_type), *chunks) == read(LLMReader(media_type), body)


@given(st.lists(st.binary()), media_types)
def test_no_bytes_make_a_reader_fail(chunks, media_type):
    assert read(LLMReader(media_type), *chunks) != Unknown("failed")


@given(
    st.lists(
        st.sampled_from(
            [
                b'{"usage":',
                b"[",
                b"{",
                b"}",
                b"]",
                b'"',
                b"\\",
                b"data: ",
                b"\n\n",
                b"input_tokens",
                b":1",
                b",",
            ]
        )
    )
)
def test_no_json_makes_a_reader_fail(pieces):
    assert read(LLMReader(), b"".join(pieces)) == read(LLMReader(), *pieces)


@pytest.mark.parametrize("name", [n for n in STREAMS if "two_calls" not in n])
def test_what_is_known_only_grows(name):
    reader = LLMReader(media_type_of(name))
    last = {}

    for chunk in in_steps(llm_body(name), 1):
        known = read(reader, chunk)
        if isinstance(known, Unknown):
            assert last == {}
            continue
        counts = {f: getattr(known, f) for f in known.__struct_fields__ if "tok" in f}
        assert all(counts[f] >= n for f, n in last.items() if n is not None)
        last = counts
    assert reader.result() == llm_expected(name)


def test_a_result_on_the_way_changes_nothing():
    for name in DOCUMENTS:
        reader = LLMReader()
        for chunk in in_steps(llm_body(name), 10):
            read(reader, chunk)
        assert reader.result() == llm_expected(name)


#: A list of vectors, a long text and a deep structure, all with misleading parts.
PADDING = b"[[%b], %b, [%b]]" % (
    b"-0.0123456, " * 80_000 + b"1",
    b'"' + rb"lorem \"usage\": {\\" * 10_000 + b'"',
    b'{"a":{"usage":{"b":[{"c":["}",{}]}]}}}, ' * 1_000 + b"{}",
)


@pytest.mark.parametrize("name", OBJECTS)
def test_usage_is_found_behind_and_before_a_large_member(name):
    members = llm_body(name).strip()[1:-1]
    large = b'"padding": ' + PADDING
    expected = llm_expected(name)
    assert len(large) > MAX_DOCUMENT_BYTES

    for body in (b"{%b,%b}" % (large, members), b"{%b,%b}" % (members, large)):
        assert read(LLMReader(), *in_steps(body, 9_999)) == expected
        assert read(LLMReader(), body) == expected


@pytest.mark.parametrize("name", STREAMS)
def test_an_event_too_large_to_be_kept_is_read_all_the_same(name):
    padding = b'{"padding":"' + b"x" * MAX_FRAME_BYTES + b'",'
    body = llm_body(name).replace(b"data: {", b"data: " + padding)
    if name.endswith(".ndjson"):
        body = b"\n".join(padding + line[1:] for line in body.splitlines())
    expected = llm_expected(name)

    assert read(LLMReader(media_type_of(name)), *in_steps(body, 50_001)) == expected
    assert read(LLMReader(), *in_steps(body, 8_191)) == expected


LARGE = b"x" * MAX_FRAME_BYTES
USAGE = b'"usage":{"prompt_tokens":1,"total_tokens":3}'


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"x":"%b",\ndata: "usage":{"prompt_tokens":1,\ndata:"total_tokens":3}}',
        b'data: {"x":"%b"}\ndata: {"usage":{"prompt_tokens":1,"total_tokens":3}}',
        b'event: {\nid: [\ndata: {"x":"%b",\n: {"usage":\ndata: ' + USAGE + b"}",
        b'data: {"x":"%b","y":NaN,"z":"\\ud83e",' + USAGE[:-1] + b',"cost":NaN}}',
    ],
    ids=["spread over lines", "a document a line", "other fields", "not strict"],
)
def test_an_event_too_large_to_be_kept_is_read_as_a_small_one_is(event):
    for filling in (b"x", LARGE):
        body = event % filling + b"\n\ndata: [DONE]\n\n"
        for size in (7, 50_001) if filling is LARGE else (1, 7):
            found = read(LLMReader("text/event-stream"), *in_steps(body, size))
            assert (found.input_tokens, found.total_tokens) == (1, 3)


@pytest.mark.parametrize(
    "event",
    [b"data: %b {" + USAGE + b"}", b"data: x\ndata: %b\ndata: {" + USAGE + b"}",
     b': %b {"\n: ' + USAGE + b'}\ndata: {"x":1}'],
    ids=["behind text", "a line of text", "a comment"],
)  # fmt: skip
def test_text_that_holds_a_report_is_none(event):
    for filling in (b"x", LARGE):
        body = event % filling + b"\n\n"
        for size in (11, len(body)):
            found = read(LLMReader("text/event-stream"), *in_steps(body, size))
            assert found == Unknown("no_usage")


def test_an_event_that_cannot_be_read_does_not_hide_the_next():
    usage = b'data: {"usage":{"prompt_tokens":1,"total_tokens":%d}}\n\n'
    body = usage % 2 + b"data: {" + b'"' * MAX_FRAME_BYTES * 2 + b"\n\n" + usage % 3

    assert read(LLMReader(), *in_steps(body, 4_096)).total_tokens == 3


def test_a_usage_too_large_to_be_kept_is_said_to_be():
    large = b'{"usage":{"input_tokens":1,"x":"' + b"x" * MAX_DOCUMENT_BYTES + b'"}}'
    reader = LLMReader()

    assert read(reader, large) == Unknown("too_large")


@pytest.mark.parametrize("end", [b"\n\n", b""])
def test_a_usage_too_large_in_a_small_event_is_said_to_be(end):
    usage = b'{"prompt_tokens":1,"x":"%b"}' % (b"x" * MAX_VALUE_BYTES)
    event = b'data: {"y":NaN,"usage":%b}' % usage

    assert read(LLMReader("text/event-stream"), event, end) == Unknown("too_large")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "no_usage"),
        (b"   \n", "no_usage"),
        (b"{}", "no_usage"),
        (b"[]", "no_usage"),
        (b"<html></html>", "not_json"),
        (b"\x89PNG", "not_json"),
        (b"{]", "cut_off"),
        (b'{"model": "m"', "cut_off"),
        (b'data: {"model": "m"}\n\ndata: {', "cut_off"),
        (b'data: {"model": "m"}\n\ndata: [DONE]\n\n', "no_usage"),
        (b'{"usage": null}', "no_usage"),
        (b'{"usage": {}}', "no_usage"),
        (b'{"usage": "12 tokens"}', "no_usage"),
        (b'{"usage": {"type": "duration", "seconds": 7}}', "no_usage"),
        (b'{"usage": {"prompt_tokens": true, "total_tokens": "3"}}', "no_usage"),
        (b'{"usage": {"prompt_tokens": -1, "total_tokens": 1.5}}', "no_usage"),
        (b'{"usage": {"prompt_tokens": 1e300, "total_tokens": null}}', "no_usage"),
        (b'{"eval_count": "3", "meta": [], "usageMetadata": 3}', "no_usage"),
        (b"[" * 200_000, "too_large"),
        (b'{"usage":' * 200_000, "too_large"),
    ],
)
def test_what_is_not_reported_is_unknown_and_never_zero(body, reason):
    assert read(LLMReader(), body) == Unknown(reason)


def test_a_count_that_is_missing_is_not_zero():
    usage = read(LLMReader(), b'{"usage":{"prompt_tokens":7}}')

    assert usage == LLMUsage(provider="openai", input_tokens=7)
    assert usage.output_tokens is None
    assert usage.total_tokens is None


def test_zero_is_zero():
    body = json.dumps({"usage": {"prompt_tokens": 0, "completion_tokens": 0}}).encode()

    assert read(LLMReader(), body).total_tokens == 0


@pytest.mark.parametrize("coding", ["gzip", "br", "deflate, gzip", " ZSTD "])
def test_a_compressed_body_says_so(coding):
    assert read(llm_reader(None, coding), b"\x1f\x8b") == Unknown("compressed")


@pytest.mark.parametrize("coding", [None, "", "identity", "Identity , identity"])
def test_an_identity_is_no_compression(coding):
    assert read(llm_reader(None, coding), b"{}") == Unknown("no_usage")


@pytest.mark.parametrize("body", [b"{" * 10, b"data: x", b"[" + b"1," * 10**6])
def test_a_reader_goes_with_its_response(body):
    reader = llm_reader(None, None)
    read(reader, body)
    gone = weakref.ref(reader)

    gc.disable()
    try:
        del reader
        assert gone() is None
    finally:
        gc.enable()

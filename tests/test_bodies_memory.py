"""Bodies of 64 MiB: the memory of a reader does not depend on the body."""

import tracemalloc

import pytest

from bodies import llm_body, llm_expected
from openmeter_wsgi.bodies.base import Unknown
from openmeter_wsgi.bodies.json import JSONReader
from openmeter_wsgi.bodies.llm import LLMReader
from openmeter_wsgi.bodies.multi_status import MultiStatus, MultiStatusReader
from openmeter_wsgi.bodies.stream import RecordsReader

BODY_BYTES = 2**26
CHUNK_BYTES = 2**14
MAX_BYTES = 2_000_000


def filled(head, filling, tail, total=BODY_BYTES):
    """Yield the chunks of a body of a given size, without ever holding it."""
    chunk = filling * (CHUNK_BYTES // len(filling))
    yield head
    for _ in range(total // len(chunk)):
        yield chunk
    yield tail


NUMBERS = b"-0.012345678, "
TEXT = rb"lorem ipsum \"dolor\" sit \\ amet, consectetur {[ adipiscing "
EMBEDDINGS = llm_body("openai_embeddings.json")
STREAM = llm_body("openai_chat_stream.sse")
EVENT = STREAM[: STREAM.index(b"\n\n") + 2]
RESPONSE = (
    b"<D:response><D:href>/a</D:href><D:status>HTTP/1.1 200 OK</D:status></D:response>"
)
PART = b'{"status":200,"body":{"a":[1,{"b":"c"}]}},'


@pytest.mark.parametrize(
    ("head", "filling", "tail", "expected"),
    [
        (b'{"data":[', NUMBERS, b"1]," + EMBEDDINGS[1:], "openai_embeddings.json"),
        (b'{"data":"', TEXT, b'",' + EMBEDDINGS[1:], "openai_embeddings.json"),
        (b"", EVENT, STREAM, "openai_chat_stream.sse"),
        (b'data: {"x": "', TEXT, b'"}\n\n' + STREAM, "openai_chat_stream.sse"),
        (b"data: ", b"x", b"\n\n" + STREAM, "openai_chat_stream.sse"),
        (b": ", b"x\n", b"\n" + STREAM, "openai_chat_stream.sse"),
        (b"", b" \n", EMBEDDINGS, "openai_embeddings.json"),
    ],
    ids=["numbers", "text", "events", "event", "no event", "lines", "space"],
)
def test_usage_at_the_end_of_a_large_body(head, filling, tail, expected):
    reader = LLMReader()

    assert result_and_peak(reader, filled(head, filling, tail))[0] == llm_expected(
        expected
    )


@pytest.mark.parametrize(
    ("reader", "head", "filling", "tail", "expected"),
    [
        (LLMReader, b"[", b"[", b"", Unknown("too_large")),
        (LLMReader, b"<", b"html", b"", Unknown("not_json")),
        (LLMReader, b'{"usage":"', b"x", b'"}', Unknown("too_large")),
        (LLMReader, b'{"', b"name", b'":1}', Unknown("no_usage")),
        (JSONReader, b"[", NUMBERS, b"1]", Unknown("too_large")),
        (RecordsReader, b"", b"x", b"", 1),
        (MultiStatusReader, b'<multistatus xmlns="DAV:">', b"<a>", b"",
         Unknown("too_large")),
        (MultiStatusReader, b'<multistatus xmlns="DAV:"><!-- ', b"x", b"",
         Unknown("too_large")),
        (MultiStatusReader, b'<multistatus xmlns="DAV:">', b"x", b"</multistatus>",
         MultiStatus(0, 0)),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)  # fmt: skip
def test_a_large_body_that_says_nothing(reader, head, filling, tail, expected):
    assert result_and_peak(reader(), filled(head, filling, tail))[0] == expected


@pytest.mark.parametrize(
    ("head", "part", "tail"),
    [
        (b'<D:multistatus xmlns:D="DAV:">', RESPONSE, b"</D:multistatus>"),
        (b'{"responses":[', PART, b"]}"),
    ],
)
def test_a_large_answer_for_many_resources(head, part, tail):
    chunks = list(filled(head, part, tail, total=2**21))
    parts = sum(chunk.count(part) for chunk in chunks)

    result, _ = result_and_peak(MultiStatusReader(), chunks)

    assert result == MultiStatus(parts, 0)


def test_a_chunk_of_64_mib_is_not_copied():
    for filling in (b"x", b"data: {}\n\n", b"[{"):
        chunk = filling * (BODY_BYTES // len(filling))
        result_and_peak(LLMReader(), [chunk])


def result_and_peak(reader, chunks):
    tracemalloc.start()
    try:
        for chunk in chunks:
            reader.feed(chunk)
        result = reader.result()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MAX_BYTES
    return result, peak

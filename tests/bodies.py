"""Bodies for the tests of body readers, and functions that cut them into chunks."""

import itertools
import json
from pathlib import Path

from hypothesis import strategies as st

from openmeter_wsgi.bodies.base import Unknown
from openmeter_wsgi.bodies.llm_shapes import LLMUsage

LLM = Path(__file__).parent / "fixtures" / "llm"
LLM_NAMES = sorted(path.name for path in LLM.iterdir() if path.suffix != ".expected")
MEDIA_TYPES = {
    ".json": "application/json",
    ".sse": "text/event-stream; charset=utf-8",
    ".ndjson": "application/x-ndjson",
}


def llm_body(name):
    return (LLM / name).read_bytes()


def llm_expected(name):
    expected = json.loads((LLM / f"{name}.expected").read_text())
    if "unknown" in expected:
        return Unknown(expected["unknown"])
    return LLMUsage(**expected | {"remarks": tuple(expected.get("remarks", ()))})


def media_type_of(name):
    return MEDIA_TYPES[Path(name).suffix]


def read(reader, *chunks):
    for chunk in chunks:
        reader.feed(chunk)
    return reader.result()


def cut(body, positions):
    edges = [0, *sorted(positions), len(body)]
    return [body[start:end] for start, end in itertools.pairwise(edges)]


def in_steps(body, size):
    return [body[start : start + size] for start in range(0, len(body), size)]


@st.composite
def cuts_of(draw, bodies):
    """Draw a body, and a list of chunks into which it is cut."""
    body = draw(bodies)
    positions = draw(st.lists(st.integers(0, len(body)), max_size=12))
    return body, cut(body, positions)


@st.composite
def damaged(draw, bodies):
    """Draw a body with a part missing, doubled or replaced."""
    body = draw(bodies)
    start, end = sorted(draw(st.tuples(*[st.integers(0, len(body))] * 2)))
    middle = draw(st.one_of(st.binary(max_size=20), st.just(body[start:end] * 2)))
    return body[:start] + middle + body[end:]

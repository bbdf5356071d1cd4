import json
import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bodies import cuts_of, in_steps, read
from openmeter_wsgi.bodies.base import Reader, Unknown
from openmeter_wsgi.bodies.json import Document, JSONReader, NumberPath, json_reader
from openmeter_wsgi.errors import ConfigError

documents = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
    max_leaves=10,
)


@given(st.data(), documents)
def test_a_document_is_what_was_sent(data, document):
    text = json.dumps(document).encode()
    _, chunks = data.draw(cuts_of(st.just(text)))

    assert read(JSONReader(), *chunks) == Document(document)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"<html>", "not_json"),
        (b"{} {}", "not_json"),
        (b'{"a": 1', "cut_off"),
        (b'"abc', "cut_off"),
        (b'"\xff"', "not_json"),
        (b"1e999", "not_json"),
        (b"[" * 100_000, "too_deep"),
        (b"[" + b"1," * 2**19 + b"1]", "too_large"),
    ],
)
def test_what_is_no_document_is_unknown(body, reason):
    for size in (1_000, len(body) or 1):
        assert read(JSONReader(), *in_steps(body, size)) == Unknown(reason)


@given(cuts_of(st.binary()))
def test_no_bytes_make_the_reader_fail(case):
    body, chunks = case
    result = read(JSONReader(), *chunks)

    assert result == read(JSONReader(), body) != Unknown("failed")


def test_a_byte_order_mark_is_no_part_of_the_document():
    for size in (1, 2, 9):
        chunks = in_steps(b"\xef\xbb\xbf[1]", size)
        assert read(JSONReader(), *chunks) == Document([1])


def test_the_size_that_is_kept_can_be_set():
    assert read(json_reader(None, None, max_bytes=4), b"1234") == Document(1234)
    assert read(json_reader(None, None, max_bytes=4), b"12345") == Unknown("too_large")


def test_a_compressed_document_says_so():
    assert read(json_reader(None, "gzip"), b"{}") == Unknown("compressed")


def test_a_fault_of_a_reader_stays_with_the_reader(caplog):
    class Faulty(Reader):
        def _read(self, piece):
            raise ZeroDivisionError(piece)

    assert read(Faulty(), b"a", b"b") == Unknown("failed")
    assert [record.exc_info[0] for record in caplog.records] == [ZeroDivisionError]


def test_a_fault_in_the_result_stays_with_the_reader(caplog):
    class Faulty(Reader):
        def _read(self, piece):
            pass

    assert read(Faulty(), b"a") == Unknown("failed")
    assert len(caplog.records) == 1


def nested(depth):
    document = {}
    for _ in range(depth):
        document = {"a": document}
    return document


@pytest.mark.parametrize(
    ("path", "document", "number"),
    [
        ("$.usage.total_tokens", {"usage": {"total_tokens": 7}}, 7),
        ("$.items[*].pages", {"items": [{"pages": 2}, {"pages": 0.5}]}, 2.5),
        ("$['a b']", {"a b": 0}, 0),
        ("$", 3, 3),
        ("$.a", {"b": 1}, Unknown("no_match")),
        ("$.a", None, Unknown("no_match")),
        ("$.a", {"a": None}, Unknown("null")),
        ("$.a", {"a": -1}, Unknown("negative")),
        ("$.a", {"a": -0.0}, 0),
        ("$.*", {"a": 7, "b": None}, Unknown("null")),
        ("$.*", {"a": 1000, "b": -900}, Unknown("negative")),
        ("$..n", {"n": 1000, "echo": {"n": -900}}, Unknown("negative")),
        ("$..n", {"n": 1000, "echo": {"n": None}}, Unknown("null")),
        ("$..n", {"n": 1000, "echo": nested(150)}, Unknown("too_deep")),
        ("$.n", {"n": 1000, "echo": nested(150)}, 1000),
        ("$.a", {"a": True}, Unknown("not_a_number")),
        ("$.a", {"a": "7"}, Unknown("not_a_number")),
        ("$.a", {"a": math.inf}, Unknown("not_a_number")),
        ("$.*", {"a": 1e308, "b": 1e308}, Unknown("not_a_number")),
        ("$.*", {"a": 1.5, "b": 10**400}, Unknown("not_a_number")),
        ("$.*", {"a": 1, "b": "x"}, Unknown("not_a_number")),
    ],
)
def test_a_path_leads_to_a_number(path, document, number):
    assert NumberPath(path).find_number(document) == number


@given(documents)
def test_no_document_makes_a_path_fail(document):
    for path in ("$..*", "$..[?@.a > 1].b", "$[?length(@) > 1]"):
        assert NumberPath(path).find_number(document) is not None


@pytest.mark.parametrize("path", ["", "$.[", "usage[", "$[?", 7, None])
def test_what_is_no_path_is_refused_by_name(path):
    with pytest.raises(ConfigError, match="expected a JSONPath such as") as refused:
        NumberPath(path)

    assert repr(path) in str(refused.value)


def test_a_path_without_the_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonpath", None)

    with pytest.raises(ConfigError, match=r"openmeter_wsgi\[jsonpath\]"):
        NumberPath("$.a")

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bodies import cut
from openmeter_wsgi.bodies.json import EACH, MAX_VALUE_BYTES, JSONScanner, Selection

NAMES = ("usage", "model", "response", "items", "other", 'a "b" \\', "ü")
KEPT = ("usage", "model")
SELECTED = Selection({
    b"usage": None,
    b"model": None,
    b"response": Selection({b"usage": None, b"model": None}),
    b"items": EACH,
})  # fmt: skip

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from(['"usage":{', "\\", '\\"', "}]", "{[", "🦔"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
    ),
    max_leaves=25,
)
objects = st.dictionaries(st.sampled_from(NAMES), values, max_size=6)
layouts = st.sampled_from(
    [{}, {"separators": (",", ":")}, {"indent": 2}, {"ensure_ascii": False}]
)


def reduced(document):
    """The same by way of decoding all of it: the documents, inner ones first."""
    found, inner = [], {}
    for name, value in document.items():
        if name in KEPT:
            inner[name] = value
        elif name == "response" and isinstance(value, dict):
            inner[name] = {n: v for n, v in value.items() if n in KEPT}
        elif name == "response" and isinstance(value, list):
            kept = [
                {n: v for n, v in each.items() if n in KEPT}
                for each in value
                if isinstance(each, dict)
            ]
            inner.update((name, [each]) for each in kept if each)
        elif name == "items" and isinstance(value, list):
            for element in value:
                if isinstance(element, dict):
                    found += reduced(element)
    return [*found, inner]


def scanned(chunks):
    found = []
    scanner = JSONScanner(SELECTED, lambda document, _: found.append(document))
    for chunk in chunks:
        scanner.feed(chunk)
    assert not scanner.is_inside
    return [json.loads(document) for document in found]


@given(st.data(), objects, layouts)
def test_an_object_is_reduced_as_if_it_had_been_decoded(data, document, layout):
    text = json.dumps(document, **layout).encode()
    positions = data.draw(st.lists(st.integers(0, len(text)), max_size=8))

    assert scanned(cut(text, positions)) == reduced(document)
    assert scanned(cut(text, range(len(text)))) == reduced(document)


@given(st.lists(st.one_of(objects, values), max_size=5), layouts)
def test_a_list_gives_its_objects(elements, layout):
    text = json.dumps(elements, **layout).encode()
    expected = [
        found
        for element in elements
        if isinstance(element, dict)
        for found in reduced(element)
    ]

    assert scanned([text]) == scanned(cut(text, range(len(text)))) == expected


@given(st.lists(objects, max_size=5), st.sampled_from(["\n", "", "\r\n", " \x1e"]))
def test_objects_may_follow_each_other(documents, separator):
    text = separator.join(map(json.dumps, documents)).encode()

    expected = [found for document in documents for found in reduced(document)]
    assert scanned([text]) == expected


@given(objects)
def test_what_was_found_before_a_cut_is_known(document):
    document.pop("response", None)
    text = json.dumps({**document, "response": {"model": "m", "x": 1}}).encode()
    scanner = JSONScanner(SELECTED, lambda _document, _is_element: None)
    expected = reduced({**document, "response": {"model": "m"}})[-1]

    scanner.feed(text[:-2])

    assert json.loads(scanner.unfinished()) == expected


@given(st.lists(objects, max_size=4))
def test_of_a_list_that_is_cut_the_last_object_is_known(elements):
    text = json.dumps({"response": elements}).encode()
    scanner = JSONScanner(SELECTED, lambda _document, _is_element: None)

    scanner.feed(text[:-2])

    assert json.loads(scanner.unfinished()) == reduced({"response": elements})[-1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b'text {"usage": 1}', []),
        (b'text\n{"usage": 1}', []),
        (b'{"usage": 1} {"usage": 2}', [1, 2]),
        (b'{"usage": 1} text {"usage": 2}', [1]),
        (b'{"usage": 1} text\n{"usage": 2}', [1, 2]),
        (b'[DONE]\n{"usage": 1}', [1]),
    ],
)
def test_a_document_begins_a_line(text, expected):
    found = [document["usage"] for document in scanned([text])]

    assert found == [d["usage"] for d in scanned(cut(text, range(len(text))))]
    assert found == expected


def test_of_the_same_name_twice_the_last_one_stands():
    assert scanned([b'{"usage": 1, "usage": 2}']) == [{"usage": 2}]


def test_a_value_too_large_to_be_kept_is_counted():
    found = []
    scanner = JSONScanner(SELECTED, lambda document, _: found.append(document))

    scanner.feed(b'{"usage": "%b", "model": 1}' % (b"x" * MAX_VALUE_BYTES))

    assert found == [b'{"model":1}']
    assert scanner.skipped == 1

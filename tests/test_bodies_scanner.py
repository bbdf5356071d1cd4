import json

from hypothesis import given
from hypothesis import strategies as st

from bodies import cut
from openmeter_wsgi.bodies.json import EACH, MAX_VALUE_BYTES, JSONScanner, Selection

NAMES = ("usage", "model", "response", "items", "other", 'a "b" \\', "ü")
KEPT = ("usage", "model")
WANTED = Selection({
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


def boiled_down(document):
    """The same by way of decoding all of it: the documents, inner ones first."""
    found, inner = [], {}
    for name, value in document.items():
        if name in KEPT:
            inner[name] = value
        elif name == "response" and isinstance(value, dict):
            inner[name] = {n: v for n, v in value.items() if n in KEPT}
        elif name == "items" and isinstance(value, list):
            for element in value:
                if isinstance(element, dict):
                    found += boiled_down(element)
    return [*found, inner]


def scanned(chunks):
    found = []
    scanner = JSONScanner(WANTED, lambda document, _: found.append(document))
    for chunk in chunks:
        scanner.feed(chunk)
    assert not scanner.is_inside
    return [json.loads(document) for document in found]


@given(st.data(), objects, layouts)
def test_an_object_is_boiled_down_as_if_it_had_been_decoded(data, document, layout):
    text = json.dumps(document, **layout).encode()
    positions = data.draw(st.lists(st.integers(0, len(text)), max_size=8))

    assert scanned(cut(text, positions)) == boiled_down(document)
    assert scanned(cut(text, range(len(text)))) == boiled_down(document)


@given(st.lists(st.one_of(objects, values), max_size=5), layouts)
def test_a_list_gives_its_objects(elements, layout):
    text = json.dumps(elements, **layout).encode()
    expected = [
        found
        for element in elements
        if isinstance(element, dict)
        for found in boiled_down(element)
    ]

    assert scanned([text]) == scanned(cut(text, range(len(text)))) == expected


@given(st.lists(objects, max_size=5), st.sampled_from(["\n", "", "\r\n", " \x1e"]))
def test_objects_may_follow_each_other(documents, separator):
    text = separator.join(map(json.dumps, documents)).encode()

    expected = [found for document in documents for found in boiled_down(document)]
    assert scanned([text]) == expected


@given(objects)
def test_what_was_found_before_a_cut_is_known(document):
    document.pop("response", None)
    text = json.dumps({**document, "response": {"model": "m", "x": 1}}).encode()
    scanner = JSONScanner(WANTED, lambda _document, _is_element: None)
    expected = boiled_down({**document, "response": {"model": "m"}})[-1]

    scanner.feed(text[:-2])

    assert json.loads(scanner.unfinished()) == expected


def test_of_the_same_name_twice_the_last_one_stands():
    assert scanned([b'{"usage": 1, "usage": 2}']) == [{"usage": 2}]


def test_a_value_too_large_to_be_kept_is_counted():
    found = []
    scanner = JSONScanner(WANTED, lambda document, _: found.append(document))

    scanner.feed(b'{"usage": "%b", "model": 1}' % (b"x" * MAX_VALUE_BYTES))

    assert found == [b'{"model":1}']
    assert scanner.too_large == 1

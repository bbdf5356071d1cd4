import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bodies import cut, cuts_of, damaged, in_steps, read
from openmeter_wsgi.bodies.base import MAX_DOCUMENT_BYTES, Unknown
from openmeter_wsgi.bodies.multi_status import (
    MAX_DEPTH,
    MAX_NAMES,
    MultiStatus,
    MultiStatusReader,
    multi_status_reader,
)

OWN = "<D:response><D:href>/a</D:href><D:status>HTTP/1.1 {}</D:status></D:response>"
PROPSTAT = (
    "<D:propstat><D:prop><x/></D:prop><D:status>HTTP/1.1 {}</D:status></D:propstat>"
)


def webdav(*responses):
    root = '<?xml version="1.0"?>\n<D:multistatus xmlns:D="DAV:">{}</D:multistatus>'
    return root.format("\n".join(responses)).encode()


def propstats(*statuses):
    inner = "".join(map(PROPSTAT.format, statuses))
    return f"<D:response><D:href>/a</D:href>{inner}</D:response>"


MIXED = webdav(
    OWN.format("200 OK"),
    OWN.format("423 Locked"),
    propstats("404 Not Found", "200 OK"),
    propstats("424 Failed Dependency", "403 Forbidden"),
    "<D:sync-token>x</D:sync-token>",
)
BODIES = [
    MIXED,
    MIXED.decode().replace("D:", "").replace("xmlns:D", "xmlns").encode(),
    b'[{"status": 200}, {"status": 404}]',
    b'{"items":[{"index":{"status":201}},{"delete":{"status":404}}],"errors":true}',
]


@pytest.fixture(autouse=True)
def no_reader_fails(caplog):
    """A failure of a reader is hidden from the application, not from these tests."""
    yield
    assert caplog.records == []


@pytest.mark.parametrize(
    ("responses", "succeeded", "failed"),
    [
        ([], 0, 0),
        ([OWN.format("200 OK"), OWN.format("204")], 2, 0),
        ([OWN.format("507 Insufficient Storage")], 0, 1),
        ([propstats("200 OK", "404 Not Found")], 1, 0),
        ([propstats("404 Not Found")], 0, 1),
        ([propstats("424 Failed Dependency", "409 Conflict")], 0, 1),
        (["<D:response><D:href>/a</D:href></D:response>"], 0, 0),
        (["<D:response><D:status>fine</D:status></D:response>"], 0, 0),
    ],
)
def test_each_webdav_response_has_its_own_outcome(responses, succeeded, failed):
    result = read(MultiStatusReader(), webdav(*responses))

    assert result == MultiStatus(succeeded, failed)


def test_a_status_within_a_property_is_none_of_the_response():
    property_ = "<D:prop><D:response><D:status>HTTP/1.1 500 X</D:status></D:response>"
    response = propstats("200 OK").replace("<D:prop>", property_)

    assert read(MultiStatusReader(), webdav(response)) == MultiStatus(1, 0)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "iso-8859-1"])
def test_xml_may_be_encoded_as_xml_can_be(encoding):
    name = encoding.removesuffix("-sig")
    text = MIXED.decode().replace('"1.0"', f'"1.0" encoding="{name}"')

    for size in (1, 2, 1000):
        chunks = in_steps(text.encode(encoding), size)
        assert read(MultiStatusReader(), *chunks) == MultiStatus(2, 2)


@pytest.mark.parametrize(
    "body",
    [
        [{"status": 200}, {"status": 404}],
        [{"status": "200"}, {"status": "404 Not Found"}],
        [{"status": "HTTP/1.1 200 OK"}, {"status": "HTTP/1.1 404 Not Found"}],
        [{"statusCode": 201}, {"status_code": 500}],
        [{"code": 299}, {"code": 300}],
        [{"status": "failed", "code": 409}, {"status": "done", "code": 200}],
        [{"status": 200}, {"status": 404}, {"name": "without"}, {"status": None}],
        [{"status": 200}, {"status": 404}, 1, "text", [{"status": 200}]],
        {"responses": [{"id": "1", "status": 200, "body": {"status": 500}},
                       {"id": "2", "status": 429}]},
        {"results": [{"status": 200}, {"status": 404}]},
        {"took": 3, "errors": True, "items": [
            {"index": {"_id": "1", "status": 201}},
            {"delete": {"_id": "2", "status": 404}}]},
        {"status": 207, "items": [{"index": 1, "status": 200}, {"status": 404}]},
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_large", [False, True])
def test_the_usual_lists_in_json_are_counted(body, is_large):
    text = json.dumps(body).encode()
    if is_large:
        large = b'"x": "%b"' % (b"x" * MAX_DOCUMENT_BYTES)
        end = b", {%b}]" % large if isinstance(body, list) else b", %b}" % large
        text = text[:-1] + end

    for size in (1, 1000, len(text)) if not is_large else (9_999, len(text)):
        result = read(MultiStatusReader(), *in_steps(text, size))
        assert result == MultiStatus(1, 1)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not_multi_status"),
        (b"ok, all of them", "not_multi_status"),
        (b"<html><body/></html>", "not_multi_status"),
        (b'<multistatus xmlns="urn:other"/>', "not_multi_status"),
        (b"<D:multistatus/>", "not_xml"),
        (b'<D:multistatus xmlns:D="DAV:"><D:a></D:b>', "not_xml"),
        (b'<?xml version="1.0" encoding="no-such"?><a/>', "not_xml"),
        (b'{"status": 200}', "no_status"),
        (b'{"items": []}', "no_status"),
        (b'[{"status": "fine"}, {"status": true}, {"status": 2000}]', "no_status"),
        (b"[" * 100_000, "no_status"),
    ],
)
def test_what_is_no_multi_status_is_unknown(body, reason):
    assert read(MultiStatusReader(), body) == Unknown(reason)


LAUGHS = b"".join(b'<!ENTITY l%d "%b">' % (n + 1, b"&l%d;" % n * 10) for n in range(9))


@pytest.mark.parametrize(
    "declaration",
    [
        b'<!DOCTYPE x [<!ENTITY l0 "ha">%b]>' % LAUGHS,
        b'<!DOCTYPE x SYSTEM "file:///etc/passwd">',
        b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]>',
        b"<!DOCTYPE x>",
    ],
)
def test_a_document_type_is_refused(declaration):
    body = MIXED.replace(b"?>", b"?>" + declaration).replace(b"/a<", b"&l9;<")

    assert read(MultiStatusReader(), body) == Unknown("doctype")


@pytest.mark.parametrize(
    "inside",
    [
        b"<!-- %b -->" % (b"x" * 200_000),
        b'<a b="%b"/>' % (b"x" * 200_000),
        b"<a>" * (MAX_DEPTH + 1),
        b"".join(b"<a%d/>" % n for n in range(MAX_NAMES + 1)),
        b"".join(b'<a a%d=""/>' % n for n in range(MAX_NAMES + 1)),
    ],
    ids=["comment", "attribute", "depth", "names", "attribute names"],
)
def test_xml_that_would_fill_the_memory_is_given_up(inside):
    body = MIXED.replace(b"<D:response>", inside + b"<D:response>", 1)

    for size in (4_096, len(body)):
        result = read(MultiStatusReader(), *in_steps(body, size))
        assert result == Unknown("too_large")


def test_a_body_that_is_cut_off_counts_what_had_ended():
    third = MIXED.index(b"<D:propstat>")

    assert read(MultiStatusReader(), MIXED[:third]) == MultiStatus(1, 1)
    assert read(MultiStatusReader(), BODIES[3][:-1]) == MultiStatus(1, 1)


@given(cuts_of(st.sampled_from(BODIES)))
def test_chunks_make_no_difference(case):
    body, chunks = case

    assert read(MultiStatusReader(), *chunks) == read(MultiStatusReader(), body)


@pytest.mark.parametrize("body", BODIES)
def test_a_body_may_be_cut_at_any_byte(body):
    expected = read(MultiStatusReader(), body)

    for position in range(len(body)):
        assert read(MultiStatusReader(), *cut(body, [position])) == expected


@given(st.one_of(cuts_of(damaged(st.sampled_from(BODIES))), cuts_of(st.binary())))
def test_chunks_of_a_damaged_body_make_no_difference(case):
    body, chunks = case
    result = read(MultiStatusReader(), *chunks)

    assert result == read(MultiStatusReader(), body) != Unknown("failed")


def test_a_compressed_body_says_so():
    assert read(multi_status_reader(None, "gzip"), MIXED) == Unknown("compressed")

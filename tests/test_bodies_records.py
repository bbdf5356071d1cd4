import pytest
from hypothesis import given
from hypothesis import strategies as st

from bodies import cut, read
from openmeter_wsgi.bodies.base import Unknown
from openmeter_wsgi.bodies.stream import RecordsReader, records_reader


@pytest.mark.parametrize(
    ("body", "count"),
    [
        (b"", 0),
        (b"\n", 0),
        (b"{}", 1),
        (b"{}\n", 1),
        (b"{}\n{}", 2),
        (b"{}\r\n{}\r\n", 2),
        (b"\n\n{}\n \t\r\n\r\n{}\n\n", 2),
        (b"{}\n ", 1),
    ],
)
def test_lines_that_are_not_blank_are_records(body, count):
    assert read(RecordsReader(), body) == count


@given(st.data(), st.lists(st.sampled_from([b"{}", b" ", b"\t", b"\r", b"\n", b"1"])))
def test_records_may_be_cut_anywhere(data, pieces):
    body = b"".join(pieces)
    positions = data.draw(st.lists(st.integers(0, len(body))))
    expected = sum(bool(line.strip(b" \t\r")) for line in body.split(b"\n"))

    assert read(RecordsReader(), *cut(body, positions)) == expected


def test_a_line_counts_once_however_often_it_is_asked_for():
    reader = RecordsReader()

    assert [read(reader, byte) for byte in (b"{", b"}", b"\n", b"\n", b"1")] == [
        1, 1, 1, 1, 2
    ]  # fmt: skip


@pytest.mark.parametrize(
    "content_type",
    [None, "application/x-ndjson", "Application/JSONL; charset=utf-8", "text/plain"],
)
def test_the_media_types_of_records_are_read(content_type):
    assert read(records_reader(content_type, None), b"{}\n{}\n") == 2


@pytest.mark.parametrize("content_type", ["text/html", "application/json", "text/csv"])
def test_the_lines_of_something_else_are_no_records(content_type):
    assert read(records_reader(content_type, None), b"{}\n") == Unknown("not_ndjson")


def test_compressed_records_are_unknown():
    assert read(records_reader(None, "gzip"), b"\n") == Unknown("compressed")

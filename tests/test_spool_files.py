import os
import tracemalloc

import pytest

from openmeter_wsgi.spool.files import (
    SegmentName,
    are_events,
    is_event,
    read_final,
    read_live,
    read_name,
    whole_end,
)
from spooling import event

NAME = "1795468382353-918420eaf38c404fa12e3311-00000002.mapped"


@pytest.fixture
def written(tmp_path):
    """Return a function that writes a file and opens it."""
    fds = []

    def write(content):
        path = tmp_path / "segment"
        path.write_bytes(content)
        fds.append(os.open(path, os.O_RDONLY))
        return fds[-1]

    yield write
    for fd in fds:
        os.close(fd)


def end_and_peak(fd):
    """Return the end of the whole lines, and the most bytes allocated to find it."""
    tracemalloc.start()
    try:
        return whole_end(fd, 0), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("start", [b"", event("1") + b"\n", event("torn")[:9]])
def test_the_free_room_of_a_live_segment_is_not_read(written, start):
    """It is read many times a second, and its memory would stay with the process."""
    fd = written(start + b"\0" * 4_000_000)

    end, peak = end_and_peak(fd)

    assert end == (len(start) if start.endswith(b"\n") else 0)
    assert peak < 600_000


def test_the_end_of_the_whole_lines_is_found_without_copying_them(written):
    """It is looked up often, and a copy's memory would stay with the process."""
    text = (event("1") + b"\n") * 4_000
    fd = written(text + b"\0" * 1_000_000)

    end, peak = end_and_peak(fd)

    assert end == len(text)
    assert peak < 560_000  # two texts of 256 KiB, while the second one is read


def test_a_line_longer_than_what_is_read_at_once_is_read(written):
    line = event("long", padding="x" * 900_000)
    fd = written(line + b"\n" + line + b"\0" * 1_000_000)

    assert [piece.text for piece in read_live(fd, 0)] == [line]


@pytest.mark.parametrize("ending", ["", ".sealed", ".new"])
def test_a_name_is_read_as_it_was_written(ending):
    name = read_name(NAME + ending)

    assert str(name) == NAME + ending
    assert name.key == NAME
    assert (name.number, name.sealed) == (2, ending == ".sealed")


@pytest.mark.parametrize(
    "foreign", ["", "notes.txt", "format", NAME.upper(), "x" + NAME, NAME + ".bak"]
)
def test_a_foreign_name_is_no_segments(foreign):
    assert read_name(foreign) is None


def test_segments_of_one_owner_sort_by_number():
    names = [SegmentName(1_000_000_000_000, "a" * 24, n, "mapped") for n in (10, 2, 9)]

    assert [read_name(str(n)).number for n in sorted(names)] == [2, 9, 10]


def test_a_live_segment_is_read_to_its_last_whole_line(written):
    lines = [event("1"), event("2")]
    fd = written(b"\n".join(lines) + b"\n" + event("3") + b"\0" * 100)

    assert [piece.text for piece in read_live(fd, 0)] == lines


def test_a_line_whose_copy_is_under_way_stops_the_reading(written):
    third = bytearray(event("3"))
    third[20:30] = bytes(10)
    fd = written(event("1") + b"\n" + third + b"\n" + event("4") + b"\n")

    assert [piece.text for piece in read_live(fd, 0)] == [event("1")]


def test_a_line_longer_than_a_chunk_is_one_piece(written):
    long = event("1", padding="x" * 900_000)
    fd = written(long + b"\n" + event("2") + b"\n")

    assert [piece.text for piece in read_live(fd, 0)] == [long, event("2")]


def test_what_is_left_without_a_newline_is_a_piece_of_a_final_segment(written):
    fd = written(b"torn\0\0")

    assert [(p.text, p.start, p.end) for p in read_final(fd, 0)] == [
        (b"torn\0\0", 0, 6)
    ]
    assert read_final(fd, 6) == []


def test_zeros_alone_are_nothing(written):
    assert read_final(written(bytes(1_000_000)), 0) == []


def test_the_free_room_of_a_final_segment_is_not_held(written):
    fd = written(event("1") + b"\n" + bytes(4_000_000))

    tracemalloc.start()
    try:
        assert [piece.text for piece in read_final(fd, 0)] == [event("1")]
        assert read_final(fd, len(event("1")) + 1) == []
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 600_000


@pytest.mark.parametrize(
    "text",
    [
        b'{"id":"a"}\n{"id":"b"}\n',
        b'\n{"id":"a"}\n\n{"id":"b"}\n\n',
    ],
)
def test_lines_that_are_all_events_are_told_by_one_look(text):
    assert are_events(text, 2)


@pytest.mark.parametrize(
    "text",
    [
        b'{"id":"a"}\n{"id":"b"\n',
        b'{"id":"a"}\n{"id":5}\n',
        b'{"id":"a"}\n[]\n',
        b'{"id":"a"}{"id":"b"}\n',
        b'{"id":\n"a"}\n',
        b'{"id":"a"}\n{"id":"b","x":"\xff"}\n',
        b'{"id":"a"}\n{"id":"b","x":"\0"}\n',
        b'{"id":"a"}\n{"id":"b","x":' + b"[" * 100_000 + b"\n",
    ],
)
def test_one_look_never_takes_for_events_what_is_none(text):
    assert not are_events(text, text.count(b"\n"))


def test_the_end_of_the_whole_lines_is_found_from_anywhere(written):
    text = b"".join(event(str(n)) + b"\n" for n in range(10_000))
    fd = written(text + bytes(5_000))

    assert whole_end(fd, 0) == len(text)
    assert whole_end(fd, len(text)) == len(text)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        b"[]",
        b'{"id":1}',
        b'{"id":"a"',
        event("1")[:-1],
        event("1").replace(b"s", b"\0"),
        b"\xff",
        b"[" * 100_000,
    ],
)
def test_what_is_no_event_is_told(line):
    assert not is_event(line)


def test_an_event_is_one():
    assert is_event(event("1"))

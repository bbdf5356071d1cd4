"""However lines are cut into batches: each event is in one, and each byte is."""

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from openmeter_wsgi.spool.batches import Slice, SpoolBatch, take_from

#: Long and short ones, and those that one form of the journal writes between others.
LINES = st.lists(st.sampled_from([b"", b"a", b"bb", b"c" * 50]), max_size=30)


def made(lines, start=0, key="one"):
    events = len(lines) - lines.count(b"")
    text = b"".join(line + b"\n" for line in lines)
    return Slice(key, text, start, events, b"" in lines)


def parts_of(*contents):
    """Return parts of one segment that follow each other, each with an event."""
    parts, start = [], 0
    for lines in contents:
        if any(lines):
            parts.append(made(lines, start))
            start = parts[-1].end
    return parts


def tiled(parts):
    """Return the range of adjacent parts as start and end."""
    merged = SpoolBatch(parts).ranges
    assert len(merged) <= 1
    return (merged[0].start, merged[0].end) if merged else (0, 0)


@given(st.lists(LINES, max_size=4), st.integers(1, 40), st.integers(1, 200))
def test_batches_hold_all_in_order_and_no_more_than_they_may(
    contents, max_events, max_bytes
):
    parts = parts_of(*contents)
    events = [line for part in parts for line in part.lines]
    waiting, taken, found = deque(parts), [], []
    while waiting:
        batch = SpoolBatch(
            take_from(waiting, max_events=max_events, max_bytes=max_bytes)
        )
        assert 0 < len(batch) == len(list(batch)) <= max_events
        assert len(batch) == 1 or sum(map(len, batch)) <= max_bytes
        assert batch[0] == next(iter(batch))
        taken += batch.parts
        found += batch

    assert found == events
    assert tiled(taken) == tiled(parts)


@given(st.lists(LINES, max_size=4))
def test_halves_are_halved_until_each_event_is_alone(contents):
    parts = parts_of(*contents)
    batches = [SpoolBatch(parts)] if parts else []
    events = [event for batch in batches for event in batch]
    while any(len(batch) > 1 for batch in batches):
        batches = [
            half
            for batch in batches
            for half in (batch.split_at(len(batch) // 2) if len(batch) > 1 else [batch])
        ]

    assert [list(batch) for batch in batches] == [[event] for event in events]
    assert tiled([part for batch in batches for part in batch.parts]) == tiled(parts)


@given(st.lists(LINES, max_size=4))
def test_the_body_of_a_request_is_the_events_between_brackets(contents):
    if parts := parts_of(*contents):
        batch = SpoolBatch(parts)

        assert batch.joined() == b"[" + b",".join(batch) + b"]"


def test_lines_of_several_segments_are_as_many_runs():
    first, second = made([b"a", b"b"]), made([b"c"], start=4, key="two")

    assert SpoolBatch([first, second]).ranges == [("one", 0, 4), ("two", 4, 6)]

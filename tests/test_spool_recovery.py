"""Recovery of every state in which a crash can leave the directory."""

import json
import os
import random

import pytest

from openmeter_wsgi.errors import Rejected
from openmeter_wsgi.spool import progress
from openmeter_wsgi.spool.dead_letters import DEAD_LETTERS, UNREADABLE, DeadLetters
from openmeter_wsgi.spool.files import MAPPED, WRITTEN, SegmentName
from openmeter_wsgi.spool.journal import Journal
from openmeter_wsgi.spool.reader import SpoolReader
from openmeter_wsgi.stats import Counts
from spooling import event, segments

DEAD = "918420eaf38c404fa12e3311"
EVENTS = [event(f"{n}", padding="x" * (n * 37 % 200)) for n in range(60)]
TEXT = b"".join(line + b"\n" for line in EVENTS)
SIZE = 16_384
assert len(TEXT) < SIZE


def leave(directory, content, number=1, form=MAPPED, ending=""):
    """Leave a segment as a dead process has left it."""
    name = SegmentName(1_700_000_000_000, DEAD, number, form)
    path = directory / f"{name}{ending}"
    (directory / f"{DEAD}.lock").touch()
    (directory / progress.PROGRESS_NAME).unlink(
        missing_ok=True
    )  # that of an earlier round
    path.write_bytes(content)
    return path


def opened(directory, counts=None):
    return SpoolReader(directory, DeadLetters(directory, counts or Counts()))


def drain(spool):
    """Deliver all that can be had and return it."""
    delivered = []
    while True:
        spool.refresh(everything=True)
        batch = spool.take(max_events=25, max_bytes=1_000_000)
        if not batch:
            return delivered
        delivered += batch
        spool.done(batch)


def set_aside(directory):
    path = directory / UNREADABLE
    return (
        [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
    )


@pytest.mark.parametrize("form", [MAPPED, WRITTEN])
@pytest.mark.parametrize("padding", [0, 100])
def test_every_prefix_of_a_segment_gives_its_whole_lines(quick_path, form, padding):
    text = TEXT[: TEXT.index(EVENTS[8])]
    ends = [i + 1 for i, byte in enumerate(text) if byte == ord("\n")]
    for cut in range(len(text) + 1):
        counts = Counts()
        leave(quick_path, text[:cut] + bytes(padding), form=form)

        whole = sum(end <= cut for end in ends)
        assert drain(opened(quick_path, counts)) == EVENTS[:whole], cut
        assert segments(quick_path) == [], cut
        torn = cut not in {0, *ends}
        assert counts.dropped["unreadable"] == torn, cut


@pytest.mark.parametrize("page", range(0, SIZE, 512))
def test_a_page_of_zeros_costs_the_lines_in_it_and_no_other(tmp_path, page):
    content = bytearray(TEXT.ljust(SIZE, b"\0"))
    content[page : page + 512] = bytes(512)
    leave(tmp_path, bytes(content), ending=".sealed")
    at, untouched = 0, []
    for line in EVENTS:
        end = at + len(line) + 1
        if end <= page or at >= page + 512:
            untouched.append(line)
        at = end

    delivered = drain(opened(tmp_path))

    # A line directly after the zeros may be the end of a torn one, so it may be lost.
    assert set(delivered) <= set(untouched)
    assert len(delivered) >= len(untouched) - 1
    assert delivered == [line for line in untouched if line in delivered]
    assert segments(tmp_path) == []


def test_random_bytes_anywhere_never_make_an_event_of_their_own(quick_path):
    dice = random.Random(7)
    for _ in range(200):
        content = bytearray(TEXT)
        at = dice.randrange(len(content))
        content[at : at + 40] = dice.randbytes(min(40, len(content) - at))
        leave(quick_path, bytes(content))

        delivered = drain(opened(quick_path))

        assert len(delivered) == len(set(delivered)) >= len(EVENTS) - 3
        assert segments(quick_path) == []


def test_foreign_files_stay_as_they_are(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "x.jsonl").write_bytes(TEXT)
    (tmp_path / f"{DEAD}.lock.bak").write_text("")
    before = sorted(tmp_path.rglob("*"))
    leave(tmp_path, TEXT)

    assert drain(opened(tmp_path)) == EVENTS
    assert (
        sorted(p for p in tmp_path.rglob("*") if p.name != progress.PROGRESS_NAME)
        == before
    )


def test_what_a_crash_left_half_made_is_tidied_up(tmp_path):
    (tmp_path / f"{DEAD}.lock.new").write_text("")
    leave(tmp_path, bytes(SIZE), ending=".new")
    leave(tmp_path, b"", number=2)
    leave(tmp_path, bytes(SIZE), number=3)
    leave(tmp_path, TEXT, number=4)
    (tmp_path / f"{DEAD}.lock").write_text("")
    spool = opened(tmp_path)

    assert drain(spool) == EVENTS
    spool.refresh(everything=True)
    spool.refresh(everything=True)
    assert [p.name for p in tmp_path.iterdir()] == [progress.PROGRESS_NAME]


def test_a_symlink_is_no_segment(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(TEXT)
    spool = tmp_path / "spool"
    spool.mkdir()
    (spool / str(SegmentName(1_700_000_000_000, DEAD, 1, MAPPED))).symlink_to(elsewhere)

    assert drain(opened(spool)) == []
    assert elsewhere.read_bytes() == TEXT


def test_what_is_no_event_is_set_aside_once_with_its_place(tmp_path):
    counts = Counts()
    leave(tmp_path, EVENTS[0] + b"\n{torn}\n\n" + EVENTS[1] + b"\n" + b"tail\0\0")

    assert drain(opened(tmp_path, counts)) == EVENTS[:2]
    assert counts.dropped["unreadable"] == 2
    assert [(a["offset"], a["text"]) for a in set_aside(tmp_path)] == [
        (len(EVENTS[0]) + 1, "{torn}"),
        (len(EVENTS[0]) + 9 + len(EVENTS[1]) + 1, "tail"),
    ]


def test_dead_letters_take_no_more_than_their_bound_and_say_what_is_lost(
    tmp_path, caplog
):
    counts = Counts()
    letters = DeadLetters(tmp_path, counts, max_bytes=1_000)
    for n in range(20):
        letters.add_event(event(str(n)), Rejected("refused", status=400))

    lines = (tmp_path / DEAD_LETTERS).read_bytes().splitlines(keepends=True)
    kept = [json.loads(line)["event"]["id"] for line in lines]
    assert kept == [str(n) for n in range(len(kept))]
    assert 3 <= len(kept) <= 10
    assert sum(map(len, lines)) <= 1_000
    assert counts.dropped == {"dead_letters_full": 20 - len(kept)}
    assert "has reached 1000 bytes" in caplog.text


def test_a_crash_between_two_batches_sends_nothing_twice(tmp_path):
    leave(tmp_path, TEXT)
    delivered = []
    while True:
        spool = opened(tmp_path)  # every time anew
        spool.refresh(everything=True)
        batch = spool.take(max_events=7, max_bytes=1_000_000)
        if not batch:
            break
        spool.record(batch, 1.0)
        delivered += batch
        spool.done(batch)

    assert delivered == EVENTS
    assert segments(tmp_path) == []


def test_the_batch_in_doubt_is_sent_again_alone_and_as_it_was(tmp_path):
    leave(tmp_path, TEXT)
    spool = opened(tmp_path)
    spool.refresh(everything=True)
    spool.done(spool.take(max_events=3, max_bytes=1_000_000))
    batch = spool.take(max_events=5, max_bytes=1_000_000)
    spool.record(batch, 123.0)

    after = opened(tmp_path)
    after.refresh(everything=True)
    again = after.take(max_events=1_000, max_bytes=1_000_000)
    assert list(again) == list(batch) == EVENTS[3:8]
    assert after.in_flight_since(again) == 123.0
    after.done(again)
    assert drain(after) == EVENTS[8:]
    assert segments(tmp_path) == []


def test_a_deleted_segment_that_a_loss_of_power_brings_back_is_not_sent_again(tmp_path):
    """Names come on the disk later than progress does, which is written over."""
    left = [leave(tmp_path, TEXT, number=n, ending=".sealed") for n in range(1, 40)]
    spool = opened(tmp_path)
    for _ in left:
        spool.refresh(everything=True)
        batch = spool.take(max_events=len(EVENTS), max_bytes=1_000_000)
        spool.record(batch, 1.0)
        spool.done(batch)
    gone = [path for path in left if not path.exists()]
    gone[-3].write_bytes(TEXT)

    assert drain(opened(tmp_path)) == []
    assert segments(tmp_path) == []


def test_of_deleted_segments_no_more_is_kept_than_may_come_back(tmp_path):
    for number in range(1, 100):
        leave(tmp_path, TEXT, number=number, ending=".sealed")
    assert len(drain(opened(tmp_path))) == 99 * len(EVENTS)

    assert len(progress.load_progress(tmp_path).done) < 20


def test_what_is_done_out_of_order_is_not_sent_again(tmp_path):
    leave(tmp_path, TEXT)
    spool = opened(tmp_path)
    spool.refresh(everything=True)
    first, others = spool.take(max_events=30, max_bytes=1_000_000).split_at(15)
    spool.done(others)  # the first half stands aside, suspects

    assert drain(opened(tmp_path)) == [*first, *EVENTS[30:]]
    assert segments(tmp_path) == []


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"done":5}', b'{"done":{"\xff":[]}}', b"\0" * 100]
)
def test_progress_that_cannot_be_read_is_set_aside_and_all_sent_again(
    tmp_path, content, caplog
):
    leave(tmp_path, TEXT)
    (tmp_path / progress.PROGRESS_NAME).write_bytes(content)

    assert drain(opened(tmp_path)) == EVENTS
    (aside,) = tmp_path.glob(f"{progress.PROGRESS_NAME}.*.unreadable")
    assert aside.read_bytes() == content
    assert "are sent again" in caplog.text


def test_a_living_owners_segment_is_read_and_stays(tmp_path):
    journal = Journal(tmp_path, form=MAPPED, max_bytes=2**30, segment_bytes=SIZE)
    for line in EVENTS:
        journal.write(line + b"\n")
    spool = opened(tmp_path)

    assert drain(spool) == EVENTS
    assert len(segments(tmp_path)) == 1
    journal.write(b'{"id":"more"}\n')
    assert drain(spool) == [b'{"id":"more"}']

    journal.close()
    assert drain(spool) == []
    assert segments(tmp_path) == []


def test_segments_go_oldest_first_and_in_the_order_of_their_owner(tmp_path):
    def of(owner, made, number, id_):
        name = SegmentName(made, owner * 24, number, MAPPED)
        (tmp_path / str(name)).write_bytes(event(id_) + b"\n")
        (tmp_path / f"{name.owner}.lock").touch()

    start = 1_700_000_000_000
    of("a", start + 5, 1, "a1")
    of("a", start + 1, 2, "a2 by a clock set back")
    of("b", start + 3, 1, "b1")
    of("c", start + 9, 1, "c1")

    ids = [json.loads(line)["id"] for line in drain(opened(tmp_path))]
    assert ids == ["b1", "a1", "a2 by a clock set back", "c1"]


@pytest.mark.parametrize("zeros", [1, 300_000, 1_000_000])
def test_a_hole_longer_than_what_is_read_at_once_is_passed(tmp_path, zeros):
    leave(tmp_path, EVENTS[0] + b"\n" + bytes(zeros) + b"\n" + EVENTS[1] + b"\n")

    assert drain(opened(tmp_path)) == EVENTS[:2]
    assert (tmp_path / UNREADABLE).stat().st_size < 500
    assert os.listdir(tmp_path).count(progress.PROGRESS_NAME) == 1

import ctypes
import os
import threading

import pytest

from openmeter_wsgi.errors import SpoolError, SpoolFull
from openmeter_wsgi.spool import journal as journals
from openmeter_wsgi.spool.files import MAPPED, WRITTEN
from openmeter_wsgi.spool.journal import Journal, JournalClosed, RecordTooLarge
from spooling import event, segments

FORMS = pytest.mark.parametrize("form", [MAPPED, WRITTEN])


@pytest.fixture
def make(tmp_path):
    made = []

    def make(form=MAPPED, *, max_bytes=2**30, segment_bytes=16_384):
        made.append(
            Journal(
                tmp_path, form=form, max_bytes=max_bytes, segment_bytes=segment_bytes
            )
        )
        return made[-1]

    yield make
    for journal in made:
        try:
            journal.close()
        except JournalClosed:
            continue


def put(journal, line):
    try:
        journal.write(line)
    except ValueError:
        journal.append(line)


def lines_of(path):
    return [line for line in path.read_bytes().rstrip(b"\0").split(b"\n") if line]


def lines(directory):
    """Return the lines in all segments, in the order of the segments."""
    return [line for path in segments(directory) for line in lines_of(path)]


def collect_sealed(directory, collected):
    for path in segments(directory):
        if path.name.endswith(".sealed"):
            collected[path.name] = lines_of(path)
            path.unlink()


@FORMS
def test_lines_stand_in_the_order_in_which_they_were_put(make, tmp_path, form):
    journal = make(form)
    for n in range(1_000):
        put(journal, event(str(n)) + b"\n")

    assert lines(tmp_path) == [event(str(n)) for n in range(1_000)]
    assert len(segments(tmp_path)) > 5


@FORMS
def test_a_full_segment_is_sealed_and_no_other(make, tmp_path, form):
    journal = make(form)
    while len(segments(tmp_path)) < 4:
        put(journal, event("1") + b"\n")

    assert [p.name.endswith(".sealed") for p in segments(tmp_path)] == [True] * 3 + [
        False
    ]


@FORMS
def test_a_prepared_segment_is_taken_next(make, tmp_path, form):
    journal = make(form)
    assert not journal.is_prepared
    journal.prepare()
    journal.prepare()
    assert journal.is_prepared
    assert len(segments(tmp_path)) == 2

    while journal.is_prepared:
        put(journal, event("1") + b"\n")
    assert len(segments(tmp_path)) == 2


@FORMS
def test_files_are_ones_own_alone(make, tmp_path, form):
    make(form)

    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o600}


def test_a_mapped_segment_has_its_room_on_the_disk_before_it_is_used(make, tmp_path):
    make(MAPPED, segment_bytes=1_000_000)
    (segment,) = segments(tmp_path)

    assert segment.stat().st_blocks * 512 >= 1_000_000


@FORMS
def test_a_record_that_no_segment_can_hold_is_refused(make, form):
    journal = make(form, segment_bytes=1_000)
    put(journal, b"x" * 999 + b"\n")

    with pytest.raises(RecordTooLarge, match="1001 bytes, expected at most 1000"):
        journal.append(b"x" * 1_000 + b"\n")


@FORMS
def test_a_closed_journal_takes_nothing_and_seals_all(make, tmp_path, form):
    journal = make(form)
    journal.prepare()
    write = journal.write
    write(b"1\n")
    journal.close()

    for put in (write, journal.write, journal.append):
        with pytest.raises((JournalClosed, ValueError)):
            put(b"2\n")
    assert all(p.name.endswith(".sealed") for p in segments(tmp_path))
    assert lines(tmp_path) == [b"1"]


def test_the_bound_counts_what_is_there(make, tmp_path, monkeypatch):
    monkeypatch.setattr(journals, "RETRY_DELAY", 0)
    journal = make(max_bytes=50_000)
    for _ in range(3):
        put(journal, b"x" * 16_000 + b"\n")

    with pytest.raises(SpoolFull, match="max_spool_bytes is 50000, 49152 are in use"):
        put(journal, b"x" * 16_000 + b"\n")

    segments(tmp_path)[0].unlink()  # delivered
    put(journal, b"again\n")
    assert lines(tmp_path)[-1] == b"again"


def test_a_directory_that_is_gone_is_a_spool_error(tmp_path):
    with pytest.raises(SpoolError, match="No such file"):
        Journal(tmp_path / "gone", form=MAPPED, max_bytes=2**30)


@pytest.mark.load
@FORMS
def test_threads_lose_nothing_through_thousands_of_seals(make, tmp_path, form):
    """Read and delete each sealed segment at once, as the sender does."""
    journal = make(form, segment_bytes=512)
    start = threading.Barrier(6)
    ended = threading.Event()
    collected = {}

    def put_many(thread):
        start.wait()
        for n in range(2_000):
            put(journal, event(f"{thread}-{n}") + b"\n")

    def keep():
        while not ended.is_set():
            journal.prepare()
            collect_sealed(tmp_path, collected)

    writers = [threading.Thread(target=put_many, args=(n,)) for n in range(6)]
    keeper = threading.Thread(target=keep)
    for thread in [*writers, keeper]:
        thread.start()
    try:
        for thread in writers:
            thread.join()
    finally:
        ended.set()
    keeper.join()
    journal.close()
    collect_sealed(tmp_path, collected)

    found = [line for name in sorted(collected) for line in collected[name]]
    assert len(collected) > 2_000
    assert len(found) == 12_000
    for thread in range(6):
        own = [line for line in found if f'"{thread}-'.encode() in line]
        assert own == [event(f"{thread}-{n}") for n in range(2_000)]


@FORMS
def test_a_put_may_interrupt_another_one_of_its_thread(make, tmp_path, form):
    """Put at every line of the code that starts the next segment, like a finalizer."""
    journal = make(form, segment_bytes=1_024)
    put(journal, b"x" * 1_023 + b"\n")
    interrupted = []
    code = {getattr(Journal, name).__code__ for name in ("append", "_advance", "_link")}

    def interrupt(frame, what, _):
        if frame.f_code not in code or threading.current_thread() is not me:
            return None
        if what == "line" and (frame.f_code, frame.f_lineno) not in interrupted:
            interrupted.append((frame.f_code, frame.f_lineno))
            n = len(interrupted)
            put(journal, b"i" * 600 + b"%d\n" % n)
        return interrupt

    import sys

    me = threading.current_thread()
    before = sys.gettrace()
    sys.settrace(interrupt)
    try:
        put(journal, b"outer\n")
    finally:
        sys.settrace(before)

    assert len(interrupted) > 5
    assert len(lines(tmp_path)) == len(interrupted) + 2


def test_children_forked_in_c_write_segments_of_their_own(tmp_path, openmeter):
    from spooling import spool_queue

    queue = spool_queue(tmp_path, openmeter.url, delivery="ship")
    queue.put(event("parent"))
    libc = ctypes.PyDLL(None)
    children = []
    for name in ("a", "b"):
        pid = libc.fork()  # calls no hook of Python's
        if not pid:
            own = spool_queue(tmp_path, openmeter.url, delivery="ship")
            for n in range(200):
                own.put(event(f"{name}-{n}"))
            os._exit(0)
        children.append(pid)
    for pid in children:
        assert os.waitpid(pid, 0)[1] == 0
    queue.put(event("parent again"))

    owners = {path.name.split("-")[1] for path in segments(tmp_path)}
    assert len(owners) == 3
    expected = [event(f"{c}-{n}") for c in "ab" for n in range(200)]
    assert sorted(lines(tmp_path)) == sorted(
        [event("parent"), event("parent again"), *expected]
    )
    queue.close(0)

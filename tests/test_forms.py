import errno
import os
import threading
from pathlib import Path

import pytest

from openmeter_wsgi.spool.files import MAPPED, WRITTEN, SegmentName
from openmeter_wsgi.spool.journal import make_segment

FORMS = pytest.mark.parametrize("form", [MAPPED, WRITTEN])


def made(directory, form, size=16_384):
    name = SegmentName(1_700_000_000_000, "a" * 24, 1, form)
    return make_segment(directory, name, size), directory / str(name)


@FORMS
def test_a_sealed_segment_takes_nothing_and_says_so_in_its_name(tmp_path, form):
    segment, path = made(tmp_path, form)
    segment.write(b"1\n")
    segment.seal()
    segment.seal()

    assert segment.is_quiet
    with pytest.raises(ValueError, match=r"full|out of range"):
        segment.write(b"2\n")
    assert [p.name for p in tmp_path.iterdir()] == [path.name + ".sealed"]
    (sealed,) = tmp_path.iterdir()
    assert sealed.read_bytes().strip(b"\0\n") == b"1"


@FORMS
def test_a_line_longer_than_what_is_left_is_refused_whole(tmp_path, form):
    segment, path = made(tmp_path, form, 4_096)
    segment.write(b"x" * 4_000 + b"\n")

    with pytest.raises(ValueError, match=r"full|out of range"):
        segment.write(b"y" * 100)
    assert b"y" not in path.read_bytes()


@FORMS
def test_a_segment_that_nobody_used_is_removed(tmp_path, form):
    segment, _ = made(tmp_path, form)
    segment.remove()

    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"full|out of range"):
        segment.write(b"1\n")


def test_a_segment_is_not_declared_sealed_while_somebody_writes(tmp_path):
    """Its file is a pipe here, so that the writer can be kept in the middle."""
    segment, path = made(tmp_path, WRITTEN, 10_000_000)
    reader, writer = os.pipe()
    os.close(segment._fds[0])
    segment._fds[0] = writer
    line = b"x" * 1_000_000 + b"\n"
    thread = threading.Thread(target=segment.write, args=(line,))
    thread.start()
    first = os.read(reader, 1)  # it is in

    segment.seal()
    assert not segment.is_quiet
    assert path.exists()
    with pytest.raises(ValueError, match="full"):
        segment.write(b"late\n")

    with open(reader, "rb") as pipe:
        assert first + pipe.read() == b"\n" + line  # ends: the descriptor is closed
    thread.join()
    assert segment.is_quiet
    assert not path.exists()


@FORMS
def test_no_file_is_overwritten_and_no_link_followed(tmp_path, form):
    name = SegmentName(1_700_000_000_000, "a" * 24, 1, form)
    (tmp_path / f"{name}.new").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(FileExistsError):
        make_segment(tmp_path, name, 4_096)
    assert not (tmp_path / "elsewhere").exists()


@FORMS
@pytest.mark.parametrize("fails", ["dup", "rename"])
def test_a_segment_that_cannot_be_made_leaves_no_open_file(
    tmp_path, monkeypatch, form, fails
):
    def fail(*_):
        raise OSError(errno.EMFILE, "no more files")

    monkeypatch.setattr(*{"dup": (os, "dup"), "rename": (Path, "rename")}[fails], fail)
    before = os.listdir("/proc/self/fd")

    for _ in range(3):
        with pytest.raises(OSError, match="no more files"):
            made(tmp_path, form)

    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert list(tmp_path.iterdir()) == []

"""Lasting progress is on the disk, even if a power loss tears a later write."""

import os
import random

import pytest

from openmeter_wsgi.spool import progress
from openmeter_wsgi.spool.progress import InFlightBatch, Progress, ProgressFile

SECTOR = 512
KEY = "1795468382353-918420eaf38c404fa12e3311-00000002.mapped"


def of(number, segments=1):
    """Return a progress that says which one it is."""
    done = {f"{KEY}-{n}": [(0, number)] for n in range(segments)}
    return Progress(done, [InFlightBatch(float(number), {KEY: [(number, number + 1)]})])


def read(directory):
    """Return the number that `of` was given; 0 if nothing is there."""
    loaded = progress.load_progress(directory)
    assert loaded is not None
    numbers = {end for ((_, end),) in loaded.done.values()}
    assert numbers <= {int(loaded.in_flight[0].since) if loaded.in_flight else 0}
    return max(numbers, default=0)


@pytest.fixture
def file(quick_path):
    made = ProgressFile(quick_path, 0)
    yield made
    made.close()


def test_what_is_written_is_read_whether_it_lasts_or_not(file, quick_path):
    for number in range(1, 50):
        file.save(of(number), lasting=number % 3 == 0)

        assert read(quick_path) == number


def test_a_loss_of_power_leaves_no_older_progress_than_the_last_that_lasts(
    file, quick_path
):
    """After a power loss the disk may have any sectors of the later writes."""
    dice = random.Random(11)
    path = quick_path / progress.PROGRESS_NAME
    file.save(of(1), lasting=True)
    disk, lasts = path.read_bytes(), 1
    for number in range(2, 400):
        lasting = dice.random() < 0.5
        file.save(of(number), lasting=lasting)
        written = path.read_bytes()
        for _ in range(5):
            path.write_bytes(torn(disk, written, dice))
            assert lasts <= read(quick_path) <= number
        path.write_bytes(written)
        if lasting:
            disk, lasts = written, number


def torn(disk, written, dice):
    """Return *disk* with some sectors replaced by those of *written*."""
    assert len(disk) == len(written)
    return b"".join(
        (written if dice.random() < 0.5 else disk)[at : at + SECTOR]
        for at in range(0, len(disk), SECTOR)
    )


def test_a_write_that_lasts_forces_one_file_on_the_disk_and_makes_none(
    file, quick_path, monkeypatch
):
    file.save(of(1), lasting=True)
    synced = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: synced.append(os.fstat(fd).st_ino))
    monkeypatch.setattr(os, "fsync", lambda fd: pytest.fail("forced a new file"))

    file.save(of(2), lasting=False)
    file.save(of(3), lasting=True)

    assert synced == [(quick_path / progress.PROGRESS_NAME).stat().st_ino]


def test_a_file_that_has_become_too_small_is_replaced_by_a_larger_one(file, quick_path):
    for number, segments in enumerate([1, 40, 1, 400, 5], start=1):
        file.save(of(number, segments), lasting=True)

        assert read(quick_path) == number
        assert len(progress.load_progress(quick_path).done) == segments
    assert os.listdir(quick_path) == [progress.PROGRESS_NAME]


def test_the_next_sender_goes_on_from_what_the_last_one_wrote(file, quick_path):
    file.save(of(1), lasting=True)
    file.save(of(2), lasting=False)
    known = progress.recover(quick_path)

    after = ProgressFile(quick_path, known.number)
    after.save(of(3), lasting=False)

    assert read(quick_path) == 3
    after.close()


def test_it_can_be_read_with_a_pager(file, quick_path):
    file.save(of(1), lasting=True)
    file.save(of(2), lasting=True)

    lines = (quick_path / progress.PROGRESS_NAME).read_text().splitlines()
    assert [line.rstrip()[:12] for line in lines] == ['{"progress":'] * 2

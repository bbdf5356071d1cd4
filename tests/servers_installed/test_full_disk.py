"""A disk that is really full: a small one, which only root can mount."""

import subprocess

import pytest

from spooling import event, segments, spool_queue


@pytest.mark.parametrize("journal", ["mmap", "write"])
def test_a_full_disk_hurts_nobody_and_passes(openmeter, tmp_path, journal):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(disk)],
        check=True,
    )
    try:
        openmeter.down()
        one = spool_queue(disk / "spool", openmeter.url, journal=journal)
        for n in range(400):
            one.put(event(str(n), padding="x" * 4_000))

        assert one.counts.unspooled > 0
        openmeter.up()
        openmeter.wait_for(400)
        assert one.flush(20)
        one.close(10)
        # The form that is written tears a line when the disk is full.
        assert one.counts.dropped.keys() <= {"unreadable", "dead_letters_full"}
        assert segments(disk / "spool") == []
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)

"""A full or read-only disk: a small file system, which only root can mount."""

import contextlib
import json
import os
import subprocess

import pytest

from openmeter_wsgi import OpenMeterMiddleware
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.spool.files import MAPPED, WRITTEN
from spool_support import COMMAND, put
from spool_support import event as event_of
from spooling import event, segments, spool_queue


@contextlib.contextmanager
def small_disk(disk):
    disk.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(disk)],
        check=True,
    )
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("form", [MAPPED, WRITTEN])
def test_a_full_disk_hurts_nobody_and_passes(openmeter, tmp_path, form):
    with small_disk(tmp_path / "disk") as disk:
        openmeter.down()
        one = spool_queue(disk / "spool", openmeter.url, form=form)
        for n in range(400):
            one.put(event(str(n), padding="x" * 4_000))

        assert one.counts.unspooled > 0
        openmeter.up()
        openmeter.wait_for(400)
        assert one.flush(20)
        one.close(10)
        # A segment in the form WRITTEN has a torn line when the disk is full.
        assert one.counts.dropped.keys() <= {"unreadable", "dead_letters_full"}
        assert segments(disk / "spool") == []


@pytest.fixture
def read_only(tmp_path):
    """A spool with a waiting event, on a disk that is now read-only."""
    with small_disk(tmp_path / "disk") as disk:
        put(disk / "spool", event_of("1"), form=WRITTEN)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        yield disk / "spool"


def test_a_read_only_directory_is_refused_at_construction(read_only):
    with pytest.raises(ConfigError, match=r"spool_dir: .* cannot be written"):
        OpenMeterMiddleware(print, api_key="x", spool_dir=str(read_only))


def test_a_disk_that_becomes_read_only_hurts_nobody(openmeter, tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        one = spool_queue(disk / "spool", openmeter.url)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)

        one.put(event("1"))

        openmeter.wait_for(1)
        assert one.counts.unspooled == 1
        one.close(5)


def command(*arguments):
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, check=False,
        env={**os.environ, "OPENMETER_API_URL": "http://127.0.0.1:9"},
    )  # fmt: skip


def test_a_spool_on_a_read_only_disk_can_be_looked_into(read_only, tmp_path):
    spool = ["spool", "--spool-dir", str(read_only)]
    status = command(*spool, "status", "--json")
    listed = command(*spool, "list", "--waiting", "--json")
    exported = command(*spool, "export", str(tmp_path / "export.jsonl"))

    assert json.loads(status.stdout)["waiting"] == 1
    assert [one["event"]["id"] for one in json.loads(listed.stdout)] == ["1"]
    assert exported.returncode == 0


def test_nobody_ships_from_a_read_only_disk(read_only):
    done = command("ship", "--spool-dir", str(read_only))

    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "cannot be written" in done.stderr

import os
import signal
import threading

import pytest

from openmeter_wsgi.lock import SegmentLock, election, is_alive, remove_lock
from spooling import PATIENCE, Process, until

OWNING = """
import sys
from pathlib import Path
from openmeter_wsgi.lock import SegmentLock

owner = SegmentLock.register(Path(sys.argv[1]))
print(owner.token, flush=True)
sys.stdin.read()
"""

ELECTED = """
import sys
from pathlib import Path
from openmeter_wsgi.lock import election

print("waits", flush=True)
with election(Path(sys.argv[1])) as won:
    print("won" if won else "lost", flush=True)
    sys.stdin.read()
"""


def test_an_owner_lives_as_long_as_its_process(tmp_path):
    with Process(OWNING, str(tmp_path)) as process:
        token = process.line()
        assert is_alive(tmp_path, token)
        remove_lock(tmp_path / f"{token}.lock")  # only that of a dead one
        assert [p.name for p in tmp_path.iterdir()] == [f"{token}.lock"]

        process.kill()
        assert not is_alive(tmp_path, token)
        remove_lock(tmp_path / f"{token}.lock")
        assert list(tmp_path.iterdir()) == []


def test_an_owner_of_this_process_lives_and_asking_does_not_kill_it(tmp_path):
    owner = SegmentLock.register(tmp_path)
    asking = f"""
from pathlib import Path
from openmeter_wsgi.lock import is_alive
print(is_alive(Path({str(tmp_path)!r}), {owner.token!r}))
"""
    assert is_alive(tmp_path, owner.token)
    remove_lock(tmp_path / f"{owner.token}.lock")
    with Process(asking) as other:
        assert other.line() == "True"

    owner.leave()
    assert not is_alive(tmp_path, owner.token)


def test_an_owner_without_a_lock_file_is_dead(tmp_path):
    assert not is_alive(tmp_path, "0" * 24)


def test_a_forked_child_holds_nothing_of_its_parents(tmp_path):
    owner = SegmentLock.register(tmp_path)
    pid = os.fork()
    if not pid:
        # Its own answer would be that the parent's lock is not free.
        os._exit(0 if is_alive(tmp_path, owner.token) else 1)
    assert os.waitpid(pid, 0)[1] == 0
    owner.leave(nothing_left=True)
    assert list(tmp_path.iterdir()) == []


def test_one_is_elected_and_the_next_when_it_dies(tmp_path):
    with Process(ELECTED, str(tmp_path)) as first:
        assert [first.line(), first.line()] == ["waits", "won"]
        with Process(ELECTED, str(tmp_path)) as second:
            assert second.line() == "waits"
            with election(tmp_path, wait=False) as won:
                assert not won
            first.process.send_signal(signal.SIGKILL)
            assert second.line() == "won"
            assert second.end() == 0
    with election(tmp_path, wait=False) as won:
        assert won


def test_within_a_process_one_is_elected_too(tmp_path):
    second = threading.Event()

    def wait():
        with election(tmp_path):
            second.set()

    with election(tmp_path) as won:
        assert won
        with election(tmp_path, wait=False) as also_won:
            assert not also_won
        waiting = threading.Thread(target=wait)
        waiting.start()
        with Process(ELECTED, str(tmp_path)) as other:
            other.line()
            assert not second.is_set()
            other.kill()
    waiting.join(PATIENCE)
    assert second.is_set()


def test_the_lock_of_an_election_may_be_deleted_meanwhile(tmp_path):
    lock = tmp_path / "sender.lock"
    with election(tmp_path):
        lock.unlink()
    with Process(ELECTED, str(tmp_path)) as process:
        assert [process.line(), process.line()] == ["waits", "won"]
        until(lock.exists)
        process.end()


def test_two_directories_may_wait_for_each_others_senders(tmp_path):
    """To the kernel that is a deadlock: it takes a process's threads for one."""
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    b.mkdir()
    ours = threading.Event()

    def wait_for_b():
        with election(b):
            ours.set()

    with election(a), Process(BOTH, str(a), str(b)) as other:
        assert other.line() == "has b"
        thread = threading.Thread(target=wait_for_b)
        thread.start()
        assert other.line() == "waits for a"
        other.process.stdin.close()
        thread.join(PATIENCE)
        assert ours.is_set()
        other.process.kill()


BOTH = """
import sys, threading
from pathlib import Path
from openmeter_wsgi.lock import election

def wait_for_a():
    with election(Path(sys.argv[1])):
        pass

with election(Path(sys.argv[2])):
    print("has b", flush=True)
    threading.Thread(target=wait_for_a, daemon=True).start()
    print("waits for a", flush=True)
    sys.stdin.read()
"""


def test_a_directory_that_is_gone_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), election(tmp_path / "gone"):
        pass
    with pytest.raises(FileNotFoundError):
        SegmentLock.register(tmp_path / "gone")

"""``openmeter-wsgi spool list --follow``, beside processes that really write."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from openmeter_wsgi.cli.spool_follow import Following
from openmeter_wsgi.spool.files import MAPPED, WRITTEN
from spool_support import COMMAND, event, put, shipping, worker

FOLLOW = [*COMMAND, "spool", "--spool-dir"]


class Tail:
    def __init__(self, process):
        self.process = process

    def read(self, count=1):
        return [self.process.stdout.readline() for _ in range(count)]

    def ids(self, count):
        return [json.loads(line)["id"] for line in self.read(count)]

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=40)
        return self.process.returncode, out, err


@contextlib.contextmanager
def tailing(directory, *options):
    """Yield a command that prints all that is put from now on."""
    with subprocess.Popen(
        [*FOLLOW, str(directory), "list", "--follow", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stderr.readline() == f"following {directory}\n"
            yield Tail(process)
        finally:
            process.kill()


@pytest.mark.parametrize("form", [MAPPED, WRITTEN])
def test_events_are_printed_as_they_are_put(tmp_path, form):
    put(tmp_path / "spool", event("before"))
    with worker(tmp_path / "spool", form) as living:
        living.put(event("earlier"))
        with tailing(tmp_path / "spool", "--json") as tail:
            living.put(event("1"))
            assert tail.ids(1) == ["1"]
            living.put(event("2"), event("3", data={"text": "ü\u202e"}))

            assert tail.ids(2) == ["2", "3"]

            assert tail.end() == (0, "", "")


def test_what_is_there_already_comes_first_if_it_is_wanted(tmp_path):
    put(tmp_path / "spool", event("1"), event("2"))

    with tailing(tmp_path / "spool", "--waiting", "--json") as tail:
        assert tail.ids(2) == ["1", "2"]


def test_a_process_that_starts_later_is_followed_too(tmp_path):
    (tmp_path / "spool").mkdir(mode=0o700)
    with (
        tailing(tmp_path / "spool", "--json") as tail,
        worker(tmp_path / "spool") as living,
    ):
        living.put(event("1"))

        assert tail.ids(1) == ["1"]


def test_events_are_filtered_by_type_and_subject(tmp_path):
    with worker(tmp_path / "spool") as living:
        options = ["--type", "llm.*", "--type", "call", "--subject", "acme"]
        with tailing(tmp_path / "spool", "--json", *options) as tail:
            living.put(
                event("1", type="llm.tokens", subject="acme"),
                event("2", type="llm.tokens", subject="hooli"),
                event("3", type="calls", subject="acme"),
                event("4", type="call", subject="acme"),
            )

            assert tail.ids(2) == ["1", "4"]


def test_in_a_pipe_a_line_has_its_fields_between_tabs_and_ctrl_c_ends_it(tmp_path):
    with worker(tmp_path / "spool") as living, tailing(tmp_path / "spool") as tail:
        living.put(event("1", time="2026-11-01T10:00:00Z", subject="\x1b[31mred"))

        assert tail.read() == [
            '2026-11-01T10:00:00Z\tcall\t\\x1b[31mred\t1\t{"total": 1}\n'
        ]
        assert tail.end(signal.SIGINT) == (0, "", "")


def test_on_a_terminal_it_is_coloured_and_does_not_steer_it(tmp_path):
    put(tmp_path / "spool", event("1", subject="\x1b[31mred"))
    shown, terminal = pty.openpty()
    with subprocess.Popen(
        [*FOLLOW, str(tmp_path / "spool"), "list", "--follow", "--waiting"],
        stdout=terminal,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"TERM": "xterm-256color"},
    ) as process:
        os.close(terminal)
        said = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while chunk := os.read(shown, 10_000):
                said += chunk
                if b"\n" in said:
                    process.terminate()
        os.close(shown)
        assert process.wait(40) == 0

    assert b"\x1b[36mcall\x1b[0m" in said
    assert rb"\x1b[31mred" in said


def test_it_reads_on_while_a_sender_delivers_and_deletes(tmp_path, openmeter):
    """Thousands of events, in segments that are sealed and deleted on the way."""
    spool = tmp_path / "spool"
    filler = {"text": "x" * 4_000}
    wanted = [str(number) for number in range(1_500)]  # 6 MB, in segments of 2
    with (
        worker(spool) as living,
        tailing(spool, "--json") as tail,
        shipping(spool, openmeter),
    ):
        living.put(*(event(number, data=filler) for number in wanted))

        assert tail.ids(len(wanted)) == wanted
        openmeter.wait_for(len(wanted))


def test_nothing_is_written_or_locked_in_the_spool(tmp_path):
    spool = tmp_path / "spool"
    put(spool, event("1"))
    before = {path: path.stat().st_mtime_ns for path in spool.rglob("*")}

    with Following(spool, everything=True) as following:
        assert [json.loads(line)["id"] for line in following.poll()] == ["1"]
        assert list(following.poll()) == []

    assert {path: path.stat().st_mtime_ns for path in spool.rglob("*")} == before


def test_a_line_that_a_kill_tore_is_no_event(tmp_path):
    spool = tmp_path / "spool"
    put(spool, event("1"))
    (segment,) = spool.rglob("*.mapped")
    with segment.open("r+b") as file:
        end = file.read().index(b"\n") + 1
        file.seek(end)
        file.write(b'{"id": "torn", \0\0\0\0}\n{"id": "after"}\n')
    segment.rename(f"{segment}.sealed")

    with Following(spool, everything=True) as following:
        assert [json.loads(line)["id"] for line in following.poll()] == ["1", "after"]


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [(None, 2, "Missing option '--spool-dir'"), ("none", 1, "No such file")],
)
def test_without_a_spool_it_is_one_line(tmp_path, name, code, said):
    options = [] if name is None else ["--spool-dir", str(tmp_path / name)]
    result = subprocess.run(
        [*COMMAND, "spool", *options, "list", "--follow"],
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )

    assert result.returncode == code
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_a_segment_that_its_sender_deletes_is_read_to_its_end_and_let_go(tmp_path):
    spool = tmp_path / "spool"
    with worker(spool) as living, Following(spool, everything=True) as following:
        living.put(event("1"))
        assert [json.loads(line)["id"] for line in following.poll()] == ["1"]
        living.put(event("2"))
        for segment in spool.rglob("*.mapped"):
            segment.unlink()

        assert [json.loads(line)["id"] for line in following.poll()] == ["2"]

        held = [
            os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if fd.exists()
        ]
        assert not [path for path in held if path.startswith(str(spool))]
        assert list(following.poll()) == []


SIGNALLED_IN_EACH_LINE = """
import os, signal, sys
from openmeter_wsgi.cli.common import stop_signals

for number in range(40):
    lines = iter(range(number, -1, -1))
    def trace(frame, event, arg):
        if event == "line" and next(lines, -1) == 0:
            sys.settrace(None)
            os.kill(os.getpid(), signal.SIGTERM)
        return trace
    with stop_signals() as stopped:
        sys.settrace(trace)
        stopped.wait(0.05)
        sys.settrace(None)
"""


def test_a_signal_in_any_line_of_the_wait_ends_it():
    subprocess.run(
        [sys.executable, "-c", SIGNALLED_IN_EACH_LINE], check=True, timeout=20
    )

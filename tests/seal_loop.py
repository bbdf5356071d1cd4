"""Put ten million events through thousands of small segments and count lost ones.

    python -m tests.seal_loop [--seconds 60] [--events 10000000]

Threads append lines to one journal with small segments, for at least --seconds and
--events. Another process reads each segment as soon as it is sealed, as the sender
does, and deletes it. In the end every line that `write` or `append` accepted must have
been read exactly once, and whole. The journal that makes a system call for each line
gets a tenth of the events.
"""

# ruff: noqa: T201 - also a program that prints
from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import re
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from openmeter_wsgi.errors import SpoolFull
from openmeter_wsgi.spool.files import MAPPED, SEALED, WRITTEN
from openmeter_wsgi.spool.journal import Journal

THREADS = 8
SEGMENT_BYTES = 32 * 1024
#: Maximum number of bytes of segments that are not read yet.
MAX_BYTES = 64 * 1024 * 1024
#: Number of lines put between two checks of the time.
_CHUNK = 1_000
_LINE = b'{"id":"%d-%09d","data":{"total":1}}\n'
_WHOLE = re.compile(rb'^\{"id":"(\d+)-(\d{9})","data":\{"total":1\}\}$', re.MULTILINE)
#: Name of the file that the writers create at the end.
_ENDED = "ended"


@dataclasses.dataclass
class Found:
    """The contents of the sealed segments of a directory."""

    seals: int = 0
    #: Number of lines that differ from the lines that were put.
    torn: int = 0
    #: By thread: the numbers of its lines, as half-open ranges (first, end).
    runs: dict[int, list[tuple[int, int]]] = dataclasses.field(default_factory=dict)

    def read(self, text: bytes) -> None:
        """Count the lines of one segment."""
        lines = _WHOLE.findall(text)
        self.seals += 1
        self.torn += sum(map(bool, text.rstrip(b"\0").split(b"\n"))) - len(lines)
        numbers: dict[bytes, list[int]] = {}
        for thread, number in lines:
            numbers.setdefault(thread, []).append(int(number))
        for thread, own in numbers.items():
            self.runs.setdefault(int(thread), []).extend(_runs(own))

    def compare(self, put: list[int]) -> tuple[int, int]:
        """Return the numbers of lost and repeated lines, given the lines *put*."""
        lost = twice = 0
        for thread, count in enumerate(put):
            end = 0
            for first, after in sorted(self.runs.get(thread, [])):
                lost += max(first - end, 0)
                twice += max(min(after, end) - first, 0)
                end = max(after, end)
            # A number beyond the last line that was put: the line was torn.
            lost += max(count - end, 0)
            self.torn += max(end - count, 0)
        return lost, twice


@dataclasses.dataclass
class Result:
    form: str
    seconds: float
    events: int
    seals: int
    lost: int
    twice: int
    torn: int


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return [(numbers[0], numbers[0] + len(numbers))]
    return [(number, number + 1) for number in numbers]


def collect(directory: Path) -> Found:
    """Read and delete sealed segments until the writers have ended.

    Runs in another process.
    """
    found = Found()
    while True:
        ended = (directory / _ENDED).exists()
        sealed = [p for p in directory.iterdir() if p.name.endswith(SEALED)]
        for path in sealed:
            found.read(path.read_bytes())
            path.unlink()
        if ended and not sealed:
            return found
        if not sealed:
            time.sleep(0.001)


class Writer(threading.Thread):
    """A thread that puts numbered lines until both minimums are reached."""

    def __init__(
        self, journal: Journal, number: int, events: int, until: float
    ) -> None:
        super().__init__()
        self._journal = journal
        self._number = number
        self._events = events
        self._until = until
        self.put = 0

    def run(self) -> None:
        while self.put < self._events or time.monotonic() < self._until:
            for n in range(self.put, self.put + _CHUNK):
                self._put(_LINE % (self._number, n))
                self.put = n + 1

    def _put(self, line: bytes) -> None:
        try:
            self._journal.write(line)
        except ValueError:
            self._append(line)

    def _append(self, line: bytes) -> None:
        while True:
            try:
                self._journal.append(line)
            except SpoolFull:
                time.sleep(0.1)  # the reader is behind
            else:
                return


def run(form: str, events: int, seconds: float, directory: Path) -> Result:
    """Put at least *events* events for at least *seconds*; compare the lines read."""
    # Not forked: the child would keep the mapped segments open.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as elsewhere:
        collecting = elsewhere.submit(collect, directory)
        journal = Journal(
            directory, form=form, max_bytes=MAX_BYTES, segment_bytes=SEGMENT_BYTES
        )
        began = time.monotonic()
        share = -(-events // THREADS)
        writers = [Writer(journal, n, share, began + seconds) for n in range(THREADS)]
        keeper = threading.Thread(target=_keep, args=(journal, writers))
        for thread in [*writers, keeper]:
            thread.start()
        for thread in [*writers, keeper]:
            thread.join()
        took = time.monotonic() - began
        journal.close()
        (directory / _ENDED).touch()
        found = collecting.result()
    put = [writer.put for writer in writers]
    lost, twice = found.compare(put)
    return Result(form, took, sum(put), found.seals, lost, twice, found.torn)


def _keep(journal: Journal, writers: list[Writer]) -> None:
    """Prepare segments as the keeper does; the writers also prepare some themselves."""
    while any(writer.is_alive() or not writer.ident for writer in writers):
        try:
            journal.prepare()
        except SpoolFull:
            time.sleep(0.1)
        time.sleep(0.001)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--events", type=int, default=10_000_000)
    args = parser.parse_args()
    print("| form | seconds | events | seals | lost | twice | torn |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    failed = False
    for form, part in ((MAPPED, 1.0), (WRITTEN, 0.1)):
        with tempfile.TemporaryDirectory() as directory:
            events = int(args.events * part)
            result = run(form, events, args.seconds * part, Path(directory))
        print(
            f"| {form} | {result.seconds:.0f} | {result.events} | {result.seals} | "
            f"{result.lost} | {result.twice} | {result.torn} |",
            flush=True,
        )
        failed = failed or bool(result.lost or result.twice or result.torn)
    if failed:
        sys.exit("lost, twice or torn: see above")


if __name__ == "__main__":
    main()

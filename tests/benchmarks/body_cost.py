"""Cost of reading a body, per chunk.

    python -m tests.benchmarks.body_cost [--rounds 15]

Every round times all readers, and a reader that does nothing, one after the other. The
figures are medians over the rounds: nanoseconds of processor time per chunk, and the
ratio to the reader that does nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING

from openmeter_wsgi.bodies.base import MAX_DOCUMENT_BYTES
from openmeter_wsgi.bodies.json import JSONReader
from openmeter_wsgi.bodies.llm import LLMReader
from openmeter_wsgi.bodies.multi_status import MultiStatusReader
from openmeter_wsgi.bodies.stream import RecordsReader

if TYPE_CHECKING:
    from collections.abc import Callable

CHUNK_BYTES = 2**14
#: Number of large chunks: so few that the body stays below MAX_DOCUMENT_BYTES, the size
#: above which a reader scans a body instead of keeping it.
LOOPS = 60
SMALL_LOOPS = 20_000

EVENT = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,'
    b'"model":"m","choices":[{"index":0,"delta":{"content":" word"},'
    b'"finish_reason":null}],"usage":null}\n\n'
)
USAGE_EVENT = (
    b'data: {"candidates":[{"content":{"parts":[{"text":" word"}],"role":"model"}}],'
    b'"usageMetadata":{"promptTokenCount":4,"candidatesTokenCount":9,'
    b'"totalTokenCount":13},"modelVersion":"m"}\n\n'
)
RECORD = b'{"id":1,"name":"a record","values":[1,2,3]}\n'
NUMBERS = b"-0.012345678, "
PART = b'{"id":"1","status":200,"body":{"name":"x","values":[1,2,3]}},'
RESPONSE = (
    b"<response><href>/a/b.ics</href><propstat><prop><getetag>x</getetag></prop>"
    b"<status>HTTP/1.1 200 OK</status></propstat></response>"
)
LARGE = b" " * (MAX_DOCUMENT_BYTES + 1)


class Nothing:
    """A reader that does nothing: the reference of the ratios."""

    def feed(self, chunk: bytes) -> None:
        """Let the chunk pass."""


def filled(part: bytes) -> bytes:
    return part * (CHUNK_BYTES // len(part))


def fed(
    reader: LLMReader | MultiStatusReader, *chunks: bytes
) -> Callable[[bytes], None]:
    for chunk in chunks:
        reader.feed(chunk)
    return reader.feed


def cases() -> dict[str, tuple[Callable[[bytes], None], bytes]]:
    """Return for each case the feed method of a reader, and the chunk to feed."""
    xml = b'<multistatus xmlns="DAV:">'
    return {
        "nothing": (Nothing().feed, EVENT),
        "LLM, event": (fed(LLMReader(), EVENT), EVENT),
        "LLM, event with usage": (fed(LLMReader(), EVENT), USAGE_EVENT),
        "LLM, 16 KiB of events": (fed(LLMReader(), EVENT), filled(EVENT)),
        "LLM, 16 KiB of JSON, kept": (LLMReader().feed, filled(b"[1], ")),
        "LLM, 16 KiB of numbers, scanned": (
            fed(LLMReader(), b'{"data":[', LARGE), filled(NUMBERS)
        ),
        "LLM, 16 KiB of objects, scanned": (
            fed(LLMReader(), b'{"data":[', LARGE), filled(PART)
        ),
        "JSON, 16 KiB": (JSONReader(2**40).feed, filled(NUMBERS)),
        "records, line": (RecordsReader().feed, RECORD),
        "records, 16 KiB": (RecordsReader().feed, filled(RECORD)),
        "parts, 16 KiB of XML": (fed(MultiStatusReader(), xml), filled(RESPONSE)),
        "parts, 16 KiB of JSON, kept": (
            fed(MultiStatusReader(), b"[    "), filled(PART)
        ),
        "parts, 16 KiB of JSON, scanned": (
            fed(MultiStatusReader(), b"[    ", LARGE), filled(PART)
        ),
    }  # fmt: skip


def seconds(feed: Callable[[bytes], None], chunk: bytes) -> float:
    loops = LOOPS if len(chunk) > CHUNK_BYTES // 2 else SMALL_LOOPS
    start = time.process_time()
    for _ in range(loops):
        feed(chunk)
    return (time.process_time() - start) / loops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    timed: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {}
    for _ in range(rounds):
        times = {name: seconds(*case) for name, case in cases().items()}
        for name, taken in times.items():
            timed.setdefault(name, []).append(taken)
            ratios.setdefault(name, []).append(taken / times["nothing"])
    print(f"{'case':40}{'ns a chunk':>12}{'ratio':>10}")
    for name, taken in timed.items():
        nanoseconds = statistics.median(taken) * 1e9
        print(f"{name:40}{nanoseconds:12,.0f}{statistics.median(ratios[name]):10,.1f}")


if __name__ == "__main__":
    main()

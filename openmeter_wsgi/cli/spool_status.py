"""``openmeter-wsgi spool status``: the waiting events of a spool, and its sender."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click
import msgspec

from openmeter_wsgi.cli.common import (
    age,
    name_of,
    print_json,
    print_table,
    printable,
    progress,
    size,
)
from openmeter_wsgi.cli.spool_access import DeadLetterFile, Letter, SpoolContents
from openmeter_wsgi.spool import server_directories, stored_answers
from openmeter_wsgi.spool.dead_letters import UNREADABLE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from openmeter_wsgi.cli.spool_access import SegmentState

#: Maximum number of segments in the table.
_SHOWN_SEGMENTS = 20
#: Age of an event in seconds from which its delivery is late.
_LATE = 120


def print_status(root: Path, *, as_json: bool) -> None:
    """Print the state of a spool by server; JSON also has the sums."""
    unused = {orphan.directory for orphan in server_directories.orphans(root)}
    servers = [
        _status_of(root, directory, is_orphan=directory in unused)
        for directory in server_directories.spool_directories(root)
    ]
    sums = ("waiting", "in_doubt", "bytes", "dead_letters", "unreadable")
    if as_json:
        print_json({
            "directory": str(root),
            "disk_free": shutil.disk_usage(root).free,
            **{name: sum(server[name] for server in servers) for name in sums},
            "oldest_age": max(
                (s["oldest_age"] for s in servers if s["oldest_age"] is not None),
                default=None,
            ),
            "servers": servers,
        })  # fmt: skip
        return
    if not servers:
        click.echo(f"no event was ever put into {printable(str(root))}", err=True)
    for status in servers:
        _print_status(status)


def _status_of(root: Path, directory: Path, *, is_orphan: bool) -> dict[str, Any]:
    contents = SpoolContents(directory)
    segments = list(
        progress(_segments(contents), "Reading segments", len(contents.segments))
    )
    letters = DeadLetterFile(directory).read()
    ages = [
        segment["oldest_age"]
        for segment in segments
        if segment["oldest_age"] is not None
    ]
    last = stored_answers.load_answer(directory)
    server = server_directories.server_of(directory)
    return {
        "directory": str(directory),
        "api_url": server and server.api_url,
        "api_flavor": server and server.api_flavor,
        "in_use": not is_orphan,
        "sender_alive": contents.sender is not None,
        "sender_pid": contents.sender,
        "waiting": sum(segment["waiting"] for segment in segments),
        "oldest_age": max(ages, default=None),
        "last_answer": last and last.answer,
        "last_answer_age": last and round(max(time.time() - last.time, 0.0), 3),
        "next_attempt_in": last and round(last.next_attempt - time.time(), 3),
        "in_doubt": sum(1 for _ in contents.in_doubt()),
        "bytes": sum(segment["bytes"] for segment in segments),
        "disk_free": shutil.disk_usage(root).free,
        "dead_letters": len(letters),
        "dead_letters_by_reason": dict(
            Counter(_reason_of(letter) for letter in letters)
        ),
        "unreadable": _count_lines(directory / UNREADABLE),
        "segments": segments,
    }


def _segments(contents: SpoolContents) -> Iterator[dict[str, Any]]:
    for segment in contents.segments:
        waiting, oldest = 0, None
        for event in contents.waiting(segment):
            oldest = oldest or event
            waiting += 1
        yield {
            "segment": segment.name.key,
            "owner_alive": segment.alive,
            "sealed": segment.name.sealed,
            "bytes": segment.bytes,
            "waiting": waiting,
            "oldest_age": oldest and _age_of(oldest, segment),
        }


def _age_of(event: bytes, segment: SegmentState) -> float:
    time_text = name_of(msgspec.json.decode(event), "time") or ""
    try:
        moment = datetime.fromisoformat(time_text)
        made = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except ValueError:
        made = segment.name.made / 1_000
    return round(max(time.time() - made, 0.0), 3)


def _reason_of(letter: Letter) -> str:
    return "expired" if letter.expired else f"{letter.status}: {letter.reason}"


def _count_lines(path: Path) -> int:
    try:
        with path.open("rb") as file:
            return sum(1 for _ in file)
    except FileNotFoundError:
        return 0


def _print_status(status: dict[str, Any]) -> None:
    print_table(("spool", status["directory"]), _facts(status))
    if segments := status["segments"][:_SHOWN_SEGMENTS]:
        click.echo()
        print_table(
            ("segment", "owner", "sealed", "size", "waiting", "oldest"),
            (
                (
                    segment["segment"],
                    "alive" if segment["owner_alive"] else "dead",
                    "yes" if segment["sealed"] else "no",
                    size(segment["bytes"]),
                    segment["waiting"],
                    age(segment["oldest_age"]),
                )
                for segment in segments
            ),
        )
    if (more := len(status["segments"]) - len(segments)) > 0:
        click.echo(f"… and {more} younger segments; --json shows all")
    for line in _advice(status):
        click.echo(line, err=True)


def _facts(status: dict[str, Any]) -> Iterator[tuple[str, object]]:
    yield "server", status["api_url"] or "not known; the next sender decides"
    yield "sender", _sender(status["sender_pid"])
    yield "events waiting", status["waiting"]
    yield "oldest of them", age(status["oldest_age"])
    if status["last_answer"]:
        answer, answer_age = status["last_answer"], age(status["last_answer_age"])
        yield "last answer", f"OpenMeter {answer}, {answer_age} ago"
        yield "next attempt in", age(max(status["next_attempt_in"], 0.0))
    yield "in doubt or being sent", status["in_doubt"]
    segments = f"{size(status['bytes'])} in {len(status['segments'])}"
    yield "size of segments", segments
    yield "free on the disk", size(status["disk_free"])
    yield "dead letters", status["dead_letters"]
    for reason, number in sorted(status["dead_letters_by_reason"].items()):
        yield f"  {reason}", number
    yield "unreadable lines set aside", status["unreadable"]


def _advice(status: dict[str, Any]) -> Iterator[str]:
    """Yield what the user should do next, if anything."""
    if not status["in_use"]:
        yield (
            f"no running process sends to {status['api_url']}: 'openmeter-wsgi spool "
            "assign --to URL' gives these events to another server"
        )
    elif status["waiting"] and not status["sender_alive"]:
        yield (
            "nothing is delivered until the application serves a request or "
            "'openmeter-wsgi ship' runs"
        )
    elif (status["oldest_age"] or 0) > _LATE:
        yield (
            "events wait longer than they should: see the log of the sender, or run "
            "'openmeter-wsgi check'"
        )
    if status["dead_letters"]:
        yield (
            "OpenMeter refused events, or may have got them before: 'list' shows them, "
            "'requeue' sends them again"
        )
    if status["unreadable"]:
        yield f"{UNREADABLE} holds lines that a crash has truncated"


def _sender(pid: int | None) -> str:
    if pid is None:
        return "none"
    return f"process {pid}" if pid > 0 else "a process in another container"

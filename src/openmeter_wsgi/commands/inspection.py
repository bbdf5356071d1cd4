"""Looking into a spool: ``status``, ``list``, ``show`` and ``export``."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click
import msgspec

from openmeter_wsgi.commands.census import Census
from openmeter_wsgi.commands.letters import DeadLetterFile, Letter
from openmeter_wsgi.commands.output import (
    age,
    name_of,
    print_json,
    print_table,
    printable,
    progress,
    size,
)
from openmeter_wsgi.spool.dead_letters import UNREADABLE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from openmeter_wsgi.commands.census import Segment

#: Of so many segments the table tells.
_SHOWN_SEGMENTS = 20
#: An event that is older than so many seconds waits for something.
_LATE = 120
_COLUMNS = ("state", "id", "type", "subject", "time", "status", "reason")


def print_status(directory: Path, *, as_json: bool) -> None:
    """Print the state of a spool."""
    census = Census(directory)
    told = list(progress(_told(census), "Reading segments", total=len(census.segments)))
    letters = DeadLetterFile(directory).read()
    ages = [one["oldest_age"] for one in told if one["oldest_age"] is not None]
    status = {
        "directory": str(directory),
        "sender_alive": census.sender is not None,
        "sender_pid": census.sender,
        "waiting": sum(one["waiting"] for one in told),
        "oldest_age": max(ages, default=None),
        "in_doubt": sum(1 for _ in census.in_doubt()),
        "bytes": sum(one["bytes"] for one in told),
        "disk_free": shutil.disk_usage(directory).free,
        "dead_letters": len(letters),
        "dead_letters_by_reason": dict(Counter(_kind(letter) for letter in letters)),
        "unreadable": _lines(directory / UNREADABLE),
        "segments": told,
    }
    if as_json:
        print_json(status)
    else:
        _print_status(status)


def print_list(directory: Path, *, waiting: bool, as_json: bool) -> None:
    """Print the dead letters, and the waiting events if they are wanted."""
    documents = _documents(directory) if waiting else _dead(directory)
    if as_json:
        print_json(list(documents))
        return
    rows = [_row(one) for one in documents]
    print_table(_COLUMNS, rows)
    if not rows:
        others = (
            "no dead letters and no waiting events" if waiting else "no dead letters"
        )
        click.echo(f"{others} in {printable(str(directory))}", err=True)


def print_event(directory: Path, id_: str, *, as_json: bool) -> None:
    """Print what there is of one event."""
    found = [one for one in _documents(directory) if name_of(one["event"], "id") == id_]
    if not found:
        raise click.ClickException(f"no event {printable(id_)!r} is here")
    if as_json:
        print_json(found)
        return
    for one in found:
        print_json(one, indent=2)


def export(directory: Path, file: str, *, as_json: bool) -> None:
    """Write everything undelivered to a new file."""
    counts: Counter[str] = Counter()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        # Usage tells of customers: readable by its owner alone.
        with open(os.open(file, flags, 0o600), "wb") as out:
            for one in _documents(directory):
                counts[one["state"]] += 1
                out.write(msgspec.json.encode(one) + b"\n")
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        raise click.ClickException(f"{printable(file)}: {error.strerror}") from None
    exported = {"dead": counts["dead"], "waiting": counts["waiting"], "file": file}
    if as_json:
        print_json(exported)
    else:
        click.echo(
            f"exported {counts['dead']} dead letters and {counts['waiting']} waiting "
            f"events to {printable(file)}"
        )


def _told(census: Census) -> Iterator[dict[str, Any]]:
    for segment in census.segments:
        waiting, oldest = 0, None
        for event in census.waiting(segment):
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


def _age_of(event: bytes, segment: Segment) -> float:
    said = name_of(msgspec.json.decode(event), "time") or ""
    try:
        moment = datetime.fromisoformat(said)
        made = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except ValueError:
        made = segment.name.made / 1_000
    return round(max(time.time() - made, 0.0), 3)


def _kind(letter: Letter) -> str:
    return "expired" if letter.expired else f"{letter.status}: {letter.reason}"


def _lines(path: Path) -> int:
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
                    one["segment"],
                    "alive" if one["owner_alive"] else "dead",
                    "yes" if one["sealed"] else "no",
                    size(one["bytes"]),
                    one["waiting"],
                    age(one["oldest_age"]),
                )
                for one in segments
            ),
        )
    if (more := len(status["segments"]) - len(segments)) > 0:
        click.echo(f"… and {more} younger segments, all of them with --json")
    for line in _advice(status):
        click.echo(line, err=True)


def _facts(status: dict[str, Any]) -> Iterator[tuple[str, object]]:
    yield "sender", _sender(status["sender_pid"])
    yield "events waiting", status["waiting"]
    yield "oldest of them", age(status["oldest_age"])
    yield "in doubt or under way", status["in_doubt"]
    segments = f"{size(status['bytes'])} in {len(status['segments'])}"
    yield "size of segments", segments
    yield "free on the disk", size(status["disk_free"])
    yield "dead letters", status["dead_letters"]
    for reason, number in sorted(status["dead_letters_by_reason"].items()):
        yield f"  {reason}", number
    yield "unreadable lines set aside", status["unreadable"]


def _advice(status: dict[str, Any]) -> Iterator[str]:
    """Say what to do next, where there is something to do."""
    if status["waiting"] and not status["sender_alive"]:
        yield (
            "nothing is delivered before the application serves its next request, or "
            "'openmeter-wsgi ship' runs"
        )
    elif (status["oldest_age"] or 0) > _LATE:
        yield (
            "events wait longer than they should: the log of the sender says why, "
            "'openmeter-wsgi check' asks the server"
        )
    if status["dead_letters"]:
        yield (
            "OpenMeter refused events for good, or may have got them before: 'list' "
            "names them, 'requeue' sends them again"
        )
    if status["unreadable"]:
        yield f"{UNREADABLE} holds what a crash has cut short"


def _sender(pid: int | None) -> str:
    if pid is None:
        return "none"
    return f"process {pid}" if pid > 0 else "a process in another container"


def _documents(directory: Path) -> Iterator[dict[str, Any]]:
    yield from _dead(directory)
    census = Census(directory)
    segments = progress(census.segments, "Reading segments", len(census.segments))
    for segment in segments:
        for event in census.waiting(segment):
            yield {"state": "waiting", "event": msgspec.json.decode(event)}


def _dead(directory: Path) -> Iterator[dict[str, Any]]:
    for letter in DeadLetterFile(directory).read():
        yield {
            "state": "dead",
            "event": letter.document,
            "reason": letter.reason,
            "status": letter.status,
            "time": letter.time,
        }


def _row(one: dict[str, Any]) -> tuple[object, ...]:
    event = one["event"]
    names = (name_of(event, name) for name in ("id", "type", "subject", "time"))
    return (one["state"], *names, one.get("status"), one.get("reason"))

"""``openmeter-wsgi spool``: look into a spool, and repair its dead letters."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections import Counter
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import click
import msgspec

from openmeter_wsgi.cli import kafka_retention, spool_follow
from openmeter_wsgi.cli.api_client import NoAnswer
from openmeter_wsgi.cli.common import (
    EXIT_CODES,
    age,
    exit_codes,
    name_of,
    open_listing,
    open_spool,
    print_json,
    print_table,
    printable,
    progress,
    read_policy,
    size,
    spool_options,
)
from openmeter_wsgi.cli.spool_files import (
    DeadLetterFile,
    Letter,
    SpoolContents,
    requeue,
)
from openmeter_wsgi.cli.spool_follow import EventFilter
from openmeter_wsgi.errors import SpoolError
from openmeter_wsgi.spool import last_answer
from openmeter_wsgi.spool.dead_letters import UNREADABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from openmeter_wsgi.cli.spool_files import SegmentState
    from openmeter_wsgi.policy import Policy


#: Of so many segments the table tells.
_SHOWN_SEGMENTS = 20
#: An event that is older than so many seconds waits for something.
_LATE = 120
_COLUMNS = ("state", "id", "type", "subject", "time", "status", "reason")


def print_status(directory: Path, *, as_json: bool) -> None:
    """Print the state of a spool."""
    census = SpoolContents(directory)
    told = list(progress(_told(census), "Reading segments", total=len(census.segments)))
    letters = DeadLetterFile(directory).read()
    ages = [one["oldest_age"] for one in told if one["oldest_age"] is not None]
    last = last_answer.load(directory)
    status = {
        "directory": str(directory),
        "sender_alive": census.sender is not None,
        "sender_pid": census.sender,
        "waiting": sum(one["waiting"] for one in told),
        "oldest_age": max(ages, default=None),
        "last_answer": last and last.answer,
        "last_answer_age": last and round(max(time.time() - last.time, 0.0), 3),
        "next_attempt_in": last and round(last.next_attempt - time.time(), 3),
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


def print_list(
    directory: Path, wanted: EventFilter, *, waiting: bool, as_json: bool
) -> None:
    """Print the dead letters, and the waiting events if they are wanted."""
    found = _documents(directory) if waiting else _dead(directory)
    documents = [one for one in found if wanted.wants(one["event"])]
    if as_json:
        print_json(documents)
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


def _told(census: SpoolContents) -> Iterator[dict[str, Any]]:
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


def _age_of(event: bytes, segment: SegmentState) -> float:
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
    if status["last_answer"]:
        told = age(status["last_answer_age"])
        yield "last answer", f"OpenMeter {status['last_answer']}, {told} ago"
        yield "next attempt in", age(max(status["next_attempt_in"], 0.0))
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
    census = SpoolContents(directory)
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


class Choice:
    """Which dead letters are meant: those of some ids, or all.

    :raises UsageError: if it is neither or both.
    """

    def __init__(self, ids: Sequence[str], *, everything: bool) -> None:
        if bool(ids) == everything:
            raise click.UsageError("Give the ids of dead letters, or else --all.")
        self._ids = None if everything else set(ids)

    def of(self, letters: Sequence[Letter]) -> list[Letter]:
        """Return the letters that are meant.

        :raises ClickException: if an id is not among them.
        """
        if self._ids is None:
            return list(letters)
        chosen = [one for one in letters if _id(one) in self._ids]
        if missing := self._ids - {_id(one) for one in chosen}:
            shown = ", ".join(sorted(map(printable, missing)))
            raise click.ClickException(f"no dead letter has the id {shown}")
        return chosen


def requeue_letters(
    directory: Path, choice: Choice, max_bytes: int, *, expired: bool, as_json: bool
) -> None:
    """Put dead letters back into the spool."""
    file = DeadLetterFile(directory)
    with _changing(file):
        chosen = choice.of(file.read())
        good = [
            one for one in chosen if one.can_be_sent and (expired or not one.expired)
        ]
        if good:
            requeue(directory, good, max_bytes)
            file.settle(good)
        file.erase_settled()
    no_event = sum(not one.can_be_sent for one in chosen)
    left_expired = len(chosen) - len(good) - no_event
    if old := sum(kafka_retention.is_old(one.event) for one in good):
        click.echo(
            f"Warning: {kafka_retention.several(old)}: {kafka_retention.REMEDY}",
            err=True,
        )
    if as_json:
        print_json({
            "requeued": len(good), "old": old, "expired": left_expired,
            "no_event": no_event,
        })  # fmt: skip
        return
    click.echo(f"requeued {len(good)} dead letters")
    if left_expired:
        click.echo(
            f"left {left_expired} that may have arrived and might be billed twice: "
            "ask with verify, purge those that arrived, requeue the rest with --expired"
        )
    if no_event:
        click.echo(f"left {no_event} that are no events")


def purge_letters(directory: Path, choice: Choice, *, as_json: bool) -> None:
    """Delete dead letters."""
    file = DeadLetterFile(directory)
    with _changing(file):
        chosen = choice.of(file.read())
        if chosen:
            file.settle(chosen)
        erased = file.erase_settled()
    if as_json:
        print_json({"purged": len(chosen), "erased": erased})
        return
    click.echo(f"purged {len(chosen)} dead letters")
    if chosen and not erased:
        click.echo(
            "a sender is running, so they are on the disk until it has ended and "
            "purge or ship is run"
        )


@contextlib.contextmanager
def _changing(file: DeadLetterFile) -> Iterator[None]:
    try:
        with file.changing():
            yield
    except BlockingIOError:
        raise click.ClickException(
            "another requeue or purge is at work in this spool"
        ) from None
    except (SpoolError, OSError) as error:
        raise click.ClickException(printable(str(error))) from None


def _id(letter: Letter) -> str | None:
    return name_of(letter.document, "id")


def print_arrived(directory: Path, policy: Policy, *, as_json: bool) -> bool:
    """Print of every event in question if it arrived; return whether all did."""
    questions = _questions(directory)
    events = [event for _, event in questions]
    try:
        with open_listing(policy) as listing:
            answers = progress(listing.arrived(events), "Asking", len(events))
            found = [
                {
                    "id": event["id"],
                    "source": name_of(event, "source"),
                    "subject": name_of(event, "subject"),
                    "state": state,
                    "arrived": arrived,
                }
                for (state, event), arrived in zip(questions, answers, strict=True)
            ]
    except NoAnswer as error:
        raise click.ClickException(printable(str(error))) from None
    if as_json:
        print_json(found)
    else:
        _print(found)
    return all(one["arrived"] for one in found)


def _print(found: list[dict[str, Any]]) -> None:
    columns = ("state", "id", "source", "subject", "arrived")
    answers = {True: "yes", False: "not listed"}
    print_table(
        columns,
        [
            [*(one[name] for name in columns[:-1]), answers[one["arrived"]]]
            for one in found
        ],
    )
    if not found:
        click.echo("no event was sent without an answer", err=True)


def _questions(directory: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the events of which nobody knows if they arrived, each once."""
    asked: dict[tuple[str, str | None], tuple[str, dict[str, Any]]] = {}
    for state, event in _unanswered(directory):
        asked.setdefault((event["id"], name_of(event, "source")), (state, event))
    return list(asked.values())


def _unanswered(directory: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for event in SpoolContents(directory).in_doubt():
        yield "in doubt", msgspec.json.decode(event)
    for letter in DeadLetterFile(directory).read():
        if letter.expired and letter.can_be_sent:
            yield "expired", letter.document


_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_ids = click.argument("ids", nargs=-1, metavar="[ID]...")
_all = click.option("--all", "everything", is_flag=True, help="Every dead letter.")
_NOT_ALL = exit_codes(_3="OpenMeter does not list some of them")


@click.group("spool", epilog=EXIT_CODES)
@spool_options
@click.pass_context
def command(
    context: click.Context, spool_dir: str | None, policy_file: str | None
) -> None:
    """Look into a spool, and put its dead letters in order.

    All of it works beside running applications and their sender. Run it as the
    user whom the directory belongs to.
    """
    context.obj = (partial(open_spool, spool_dir), policy_file)


def _opened(context: click.Context, *, may_be_empty: bool = False) -> Path:
    opener: Callable[..., Path] = context.obj[0]
    return opener(may_be_empty=may_be_empty)


@command.command(
    "status",
    epilog=EXIT_CODES,
    short_help="What waits, since when, who delivers it, what is dead.",
)
@_as_json
@click.pass_context
def _status(context: click.Context, as_json: bool) -> None:
    """Say what waits, since when, who delivers it, and what will never arrive."""
    print_status(_opened(context), as_json=as_json)


@command.command("list", epilog=EXIT_CODES)
@click.option("--waiting", is_flag=True, help="The waiting events as well.")
@click.option(
    "--follow",
    is_flag=True,
    help="Print events as applications on this host settle them, until a signal.",
)
@click.option(
    "--type",
    "types",
    multiple=True,
    metavar="PATTERN",
    help="Only events of this type; * stands for anything. May be repeated.",
)
@click.option(
    "--subject",
    "subjects",
    multiple=True,
    metavar="PATTERN",
    help="Only events of this subject, likewise.",
)
@_as_json
@click.pass_context
def _list(
    context: click.Context,
    waiting: bool,
    follow: bool,
    types: tuple[str, ...],
    subjects: tuple[str, ...],
    as_json: bool,
) -> None:
    """List the dead letters, the oldest first, each with its reason.

    With --follow it lists no dead letters but new events, one a line, as JSON with
    --json; with --waiting it begins with the events that wait. It reads beside the
    processes that write and deliver.
    """
    wanted = EventFilter(types, subjects)
    if follow:
        directory = _opened(context, may_be_empty=True)
        spool_follow.follow(directory, wanted, everything=waiting, as_json=as_json)
    else:
        print_list(_opened(context), wanted, waiting=waiting, as_json=as_json)


@command.command(
    "show", epilog=EXIT_CODES, short_help="Everything that is there of one event."
)
@click.argument("id_", metavar="ID")
@_as_json
@click.pass_context
def _show(context: click.Context, id_: str, as_json: bool) -> None:
    """Show everything that is there of the event ID, dead or waiting."""
    print_event(_opened(context), id_, as_json=as_json)


@command.command(
    "export",
    epilog=EXIT_CODES,
    short_help="Write dead letters and waiting events to a file.",
)
@click.argument("file", type=click.Path(dir_okay=False))
@_as_json
@click.pass_context
def _export(context: click.Context, file: str, as_json: bool) -> None:
    """Write all dead letters and waiting events to FILE, one JSON document a line.

    The file must not exist. The spool stays as it is, so its sender may deliver
    what is exported: do not send the file's waiting events under other ids.
    """
    export(_opened(context), file, as_json=as_json)


@command.command(
    "requeue", epilog=EXIT_CODES, short_help="Send dead letters again under their ids."
)
@_ids
@_all
@click.option(
    "--expired",
    is_flag=True,
    help="Also what may have arrived before and might be billed twice.",
)
@_as_json
@click.pass_context
def _requeue(
    context: click.Context,
    ids: tuple[str, ...],
    everything: bool,
    expired: bool,
    as_json: bool,
) -> None:
    """Put dead letters back, to be sent again under the ids they have.

    Mend first what they were refused for, e.g. the meter in OpenMeter.
    """
    choice = Choice(ids, everything=everything)
    policy = _policy(context, dry_run=True)
    directory = _opened(context)
    requeue_letters(
        directory, choice, policy.max_spool_bytes, expired=expired, as_json=as_json
    )


@command.command("purge", epilog=EXIT_CODES)
@_ids
@_all
@click.option("--yes", is_flag=True, help="Required: what is purged is lost.")
@_as_json
@click.pass_context
def _purge(
    context: click.Context,
    ids: tuple[str, ...],
    everything: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Delete dead letters for ever.

    While there is a sender they are marked, listed no more, and stay on the disk
    until a purge without one, or the next start of "ship".
    """
    choice = Choice(ids, everything=everything)
    if not yes:
        raise click.UsageError("What is purged is lost; add --yes.")
    purge_letters(_opened(context), choice, as_json=as_json)


@command.command(
    "verify",
    epilog=_NOT_ALL,
    short_help="Ask OpenMeter which unanswered events arrived.",
)
@_as_json
@click.pass_context
def _verify(context: click.Context, as_json: bool) -> None:
    """Ask OpenMeter which events arrived that were sent without an answer.

    These are the batches in doubt and the expired dead letters. OpenMeter lists an
    event some seconds after it took it, and for 32 days.
    """
    directory = _opened(context)
    policy = _policy(context)
    if not print_arrived(directory, policy, as_json=as_json):
        context.exit(3)


def _policy(context: click.Context, **options: Any) -> Any:
    return read_policy(context.obj[1], **options)

"""``openmeter-wsgi spool``: show a spool, and requeue or delete its dead letters.

The functions come first, the click commands at the end of the module.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import click
import msgspec

from openmeter_wsgi.cli import kafka_retention, spool_follow
from openmeter_wsgi.cli.api_client import NoAnswer
from openmeter_wsgi.cli.common import (
    EXIT_CODES,
    exit_codes,
    name_of,
    open_listing,
    open_spool,
    print_json,
    print_table,
    printable,
    progress,
    read_policy,
    spool_options,
)
from openmeter_wsgi.cli.spool_access import (
    DeadLetterFile,
    Letter,
    SpoolContents,
    requeue,
)
from openmeter_wsgi.cli.spool_follow import EventFilter
from openmeter_wsgi.cli.spool_status import print_status
from openmeter_wsgi.errors import SpoolError
from openmeter_wsgi.options import url as read_url
from openmeter_wsgi.spool import server_directories

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from openmeter_wsgi.policy import Policy


_COLUMNS = ("state", "id", "type", "subject", "time", "status", "reason")


def print_list(
    root: Path, wanted: EventFilter, *, waiting: bool, as_json: bool
) -> None:
    """Print the dead letters and, with *waiting*, the waiting events."""
    everything = _entries(root) if waiting else _dead_letters(root)
    entries = [entry for entry in everything if wanted.matches(entry["event"])]
    if as_json:
        print_json(entries)
        return
    rows = [_row(entry) for entry in entries]
    print_table(_COLUMNS, rows)
    if not rows:
        where = f"in {printable(str(root))}"
        if waiting:
            text = f"no dead letters and no waiting events {where}"
        elif count := sum(entry["state"] == "waiting" for entry in _entries(root)):
            events = "event waits" if count == 1 else "events wait"
            text = f"no dead letters {where}; {count} {events} (--waiting)"
        else:
            text = f"no dead letters {where}"
        click.echo(text, err=True)


def print_event(root: Path, id_: str, *, as_json: bool) -> None:
    """Print all entries of one event."""
    entries = [
        entry for entry in _entries(root) if name_of(entry["event"], "id") == id_
    ]
    if not entries:
        raise click.ClickException(f"the spool has no event {printable(id_)!r}")
    if as_json:
        print_json(entries)
        return
    for entry in entries:
        print_json(entry, indent=2)


def export(root: Path, file: str, *, as_json: bool) -> None:
    """Write all undelivered events to a new file."""
    counts: Counter[str] = Counter()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        # Usage is confidential: only the owner may read the file.
        with open(os.open(file, flags, 0o600), "wb") as out:
            for entry in _entries(root):
                counts[entry["state"]] += 1
                out.write(msgspec.json.encode(entry) + b"\n")
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


def _entries(root: Path) -> Iterator[dict[str, Any]]:
    """Yield the dead letters and the waiting events, as printed."""
    yield from _dead_letters(root)
    for directory in server_directories.spool_directories(root):
        contents = SpoolContents(directory)
        segments = contents.segments
        for segment in progress(segments, "Reading segments", len(segments)):
            for event in contents.waiting(segment):
                yield {"state": "waiting", "event": msgspec.json.decode(event)}


def _dead_letters(root: Path) -> Iterator[dict[str, Any]]:
    for directory in server_directories.spool_directories(root):
        for letter in DeadLetterFile(directory).read():
            yield {
                "state": "dead",
                "event": letter.document,
                "reason": letter.reason,
                "status": letter.status,
                "time": letter.time,
            }


def _row(entry: dict[str, Any]) -> tuple[object, ...]:
    event = entry["event"]
    names = (name_of(event, name) for name in ("id", "type", "subject", "time"))
    return (entry["state"], *names, entry.get("status"), entry.get("reason"))


class Choice:
    """The dead letters that the arguments of a command choose: by ids, or all.

    :raises UsageError: if there are neither ids nor --all, or both.
    """

    def __init__(self, ids: Sequence[str], *, everything: bool) -> None:
        if bool(ids) == everything:
            raise click.UsageError("Give the ids of dead letters, or else --all.")
        self._ids = None if everything else set(ids)

    def among(self, letters: Sequence[Sequence[Letter]]) -> list[list[Letter]]:
        """Return the chosen letters of each directory.

        :raises ClickException: if an id is not found.
        """
        if (ids := self._ids) is None:
            return [list(of_directory) for of_directory in letters]
        chosen = [
            [letter for letter in of_directory if _id(letter) in ids]
            for of_directory in letters
        ]
        if missing := ids - {_id(letter) for letter in chain.from_iterable(chosen)}:
            listed = ", ".join(sorted(map(printable, missing)))
            raise click.ClickException(f"no dead letter has the id {listed}")
        return chosen


def requeue_letters(
    root: Path, choice: Choice, max_bytes: int, *, expired: bool, as_json: bool
) -> None:
    """Put dead letters back into the spool, each for its own server."""
    chosen: list[Letter] = []
    requeued: list[Letter] = []
    with _changing(root) as files:
        letters = choice.among([file.read() for file in files])
        for file, of_file in zip(files, letters, strict=True):
            to_send = [
                letter
                for letter in of_file
                if letter.can_be_sent and (expired or not letter.expired)
            ]
            if to_send:
                requeue(file.directory, to_send, max_bytes)
                file.settle(to_send)
            file.erase_settled()
            chosen += of_file
            requeued += to_send
    no_event = sum(not letter.can_be_sent for letter in chosen)
    left_expired = len(chosen) - len(requeued) - no_event
    if old := sum(kafka_retention.is_old(letter.event) for letter in requeued):
        click.echo(
            f"Warning: {kafka_retention.several(old)}: {kafka_retention.REMEDY}",
            err=True,
        )
    if as_json:
        print_json({
            "requeued": len(requeued), "old": old, "expired": left_expired,
            "no_event": no_event,
        })  # fmt: skip
        return
    click.echo(f"requeued {len(requeued)} dead letters")
    if left_expired:
        click.echo(
            f"left {left_expired} that may have arrived and might be billed twice: run "
            "verify, purge those that arrived, requeue the rest with --expired"
        )
    if no_event:
        click.echo(f"left {no_event} that are not events")


def purge_letters(root: Path, choice: Choice, *, as_json: bool) -> None:
    """Delete dead letters."""
    chosen: list[Letter] = []
    erased = True
    with _changing(root) as files:
        letters = choice.among([file.read() for file in files])
        for file, of_file in zip(files, letters, strict=True):
            if of_file:
                file.settle(of_file)
            chosen += of_file
            erased = file.erase_settled() and erased
    if as_json:
        print_json({"purged": len(chosen), "erased": erased})
        return
    click.echo(f"purged {len(chosen)} dead letters")
    if chosen and not erased:
        click.echo(
            "a sender is running, so they stay on the disk until it ends and purge or "
            "ship runs"
        )


@contextlib.contextmanager
def _changing(root: Path) -> Iterator[list[DeadLetterFile]]:
    """Lock the files of dead letters against other commands, and yield them."""
    try:
        with contextlib.ExitStack() as locks:
            files = []
            for directory in server_directories.spool_directories(root):
                file = DeadLetterFile(directory)
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    locks.enter_context(file.changing())
                    files.append(file)
            yield files
    except BlockingIOError:
        raise click.ClickException(
            "another requeue or purge is running in this spool"
        ) from None
    except (SpoolError, OSError) as error:
        raise click.ClickException(printable(str(error))) from None


def _id(letter: Letter) -> str | None:
    return name_of(letter.document, "id")


def print_arrived(root: Path, policy: Policy, *, as_json: bool) -> bool:
    """Print for each event without an answer if it arrived; return True if all did."""
    unanswered = _unanswered(root, server_directories.server_of_policy(policy))
    events = [event for _, event in unanswered]
    try:
        with open_listing(policy) as listing:
            answers = progress(listing.arrived(events), "Asking", len(events))
            results = [
                {
                    "id": event["id"],
                    "source": name_of(event, "source"),
                    "subject": name_of(event, "subject"),
                    "state": state,
                    "arrived": arrived,
                }
                for (state, event), arrived in zip(unanswered, answers, strict=True)
            ]
    except NoAnswer as error:
        raise click.ClickException(printable(str(error))) from None
    if as_json:
        print_json(results)
    else:
        _print_results(results)
    return all(result["arrived"] for result in results)


def _print_results(results: list[dict[str, Any]]) -> None:
    columns = ("state", "id", "source", "subject", "arrived")
    answers = {True: "yes", False: "not listed"}
    print_table(
        columns,
        [
            [*(result[name] for name in columns[:-1]), answers[result["arrived"]]]
            for result in results
        ],
    )
    if not results:
        click.echo("no event was sent without an answer", err=True)


def _unanswered(
    root: Path, server: server_directories.Server
) -> list[tuple[str, dict[str, Any]]]:
    """Return the state and the event of all events that were sent without an answer."""
    by_identity: dict[tuple[str, str | None], tuple[str, dict[str, Any]]] = {}
    for directory in server_directories.spool_directories(root):
        if server_directories.server_of(directory) in {None, server}:
            for state, event in _unanswered_in(directory):
                identity = (event["id"], name_of(event, "source"))
                by_identity.setdefault(identity, (state, event))
    return list(by_identity.values())


def _unanswered_in(directory: Path) -> Iterator[tuple[str, dict[str, Any]]]:
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
    """Show the contents of a spool, and requeue or delete its dead letters.

    All commands work while applications and their sender run. Run them as the owner of
    the directory.
    """
    context.obj = (partial(open_spool, spool_dir), policy_file)


def _opened(context: click.Context, *, may_be_empty: bool = False) -> Path:
    opener: Callable[..., Path] = context.obj[0]
    return opener(may_be_empty=may_be_empty)


@command.command(
    "status",
    epilog=EXIT_CODES,
    short_help="Show the waiting events, their sender and the dead letters.",
)
@_as_json
@click.pass_context
def _status(context: click.Context, as_json: bool) -> None:
    """Print the waiting events, their age and sender, and the dead letters."""
    print_status(_opened(context), as_json=as_json)


@command.command(
    "assign", epilog=EXIT_CODES, short_help="Give waiting events to another server."
)
@click.option(
    "--to",
    "to",
    required=True,
    metavar="URL",
    help="Address of the server that gets them: the api_url of an application.",
)
@click.option(
    "--from",
    "from_",
    metavar="URL",
    help="Address that they are for.  [default: the only one without a process]",
)
@click.option(
    "--flavor",
    type=click.Choice(["v1", "v3"]),
    default="v1",
    show_default=True,
    help="Version of the API of the server that gets them.",
)
@_as_json
@click.pass_context
def _assign(
    context: click.Context, to: str, from_: str | None, flavor: str, as_json: bool
) -> None:
    """Give the events of an address that no running process uses to another server.

    They keep their ids and the progress of their delivery. A process that sends to the
    server delivers them within a second, or when it next starts.
    """
    assign_orphan(_opened(context), to, from_, flavor, as_json=as_json)


def assign_orphan(
    root: Path, to: str, from_: str | None, flavor: str, *, as_json: bool
) -> None:
    """Give the events of one address to the server at another."""
    try:
        server = server_directories.Server(read_url(to), flavor)
    except ValueError as error:
        raise click.UsageError(f"--to: {printable(str(error))}") from None
    orphans = [
        orphan for orphan in server_directories.orphans(root) if orphan.server != server
    ]
    if from_ is not None:
        orphans = [o for o in orphans if o.address == from_.rstrip("/")]
    addresses = sorted({orphan.address for orphan in orphans})
    if not orphans:
        where = printable(from_) if from_ else "an address"
        raise click.ClickException(
            f"no events wait for {where} that no running process uses"
        )
    if len(addresses) > 1:
        listed = ", ".join(map(printable, addresses))
        raise click.UsageError(f"Events wait for {listed}: choose one with --from.")
    try:
        for orphan in orphans:
            server_directories.assign(orphan.directory, server)
    except (SpoolError, OSError) as error:
        raise click.ClickException(printable(str(error))) from None
    events = sum(orphan.events for orphan in orphans)
    if as_json:
        print_json({"assigned": events, "from": addresses[0], "to": server.api_url})
        return
    click.echo(
        f"assigned {events} events of {printable(addresses[0])} to "
        f"{printable(server.api_url)}"
    )


@command.command("list", epilog=EXIT_CODES)
@click.option("--waiting", is_flag=True, help="Print the waiting events as well.")
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
    help="Only events of this subject, with the same patterns.",
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

    With --follow, print new events instead, one per line; with --waiting, after the
    waiting events. Other processes may write and deliver meanwhile.
    """
    wanted = EventFilter(types, subjects)
    if follow:
        directory = _opened(context, may_be_empty=True)
        spool_follow.follow(directory, wanted, everything=waiting, as_json=as_json)
    else:
        print_list(_opened(context), wanted, waiting=waiting, as_json=as_json)


@command.command(
    "show", epilog=EXIT_CODES, short_help="Show everything known about one event."
)
@click.argument("id_", metavar="ID")
@_as_json
@click.pass_context
def _show(context: click.Context, id_: str, as_json: bool) -> None:
    """Show all entries of the event ID, dead or waiting."""
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
    """Write all dead letters and waiting events to FILE, one JSON document per line.

    The file must not exist. The events stay in the spool, and its sender may deliver
    them: do not send the waiting events in the file under other ids.
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
    help="Also events that may have arrived and might be billed twice.",
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
    """Put dead letters back into the spool, to be sent again under their ids.

    First solve the problem for which they were refused, such as a meter in OpenMeter.
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
@click.option("--yes", is_flag=True, help="Required, as purged events are lost.")
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

    While a sender is running they are only marked and no longer listed. They stay on
    the disk until the next purge without a sender, or the next start of "ship".
    """
    choice = Choice(ids, everything=everything)
    if not yes:
        raise click.UsageError("Purged events are lost; add --yes.")
    purge_letters(_opened(context), choice, as_json=as_json)


@command.command(
    "verify",
    epilog=_NOT_ALL,
    short_help="Ask OpenMeter which events without an answer arrived.",
)
@_as_json
@click.pass_context
def _verify(context: click.Context, as_json: bool) -> None:
    """Ask OpenMeter which of the events that were sent without an answer arrived.

    These are the batches in doubt and the expired dead letters. OpenMeter lists an
    event some seconds after it took it, and for 32 days.
    """
    directory = _opened(context)
    policy = _policy(context)
    if not print_arrived(directory, policy, as_json=as_json):
        context.exit(3)


def _policy(context: click.Context, **options: Any) -> Any:
    return read_policy(context.obj[1], **options)

"""``openmeter-wsgi spool``: look into a spool, and repair its dead letters."""

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
from openmeter_wsgi.cli.spool_files import (
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
    """Print the dead letters, and the waiting events if they are wanted."""
    found = _documents(root) if waiting else _dead(root)
    documents = [one for one in found if wanted.wants(one["event"])]
    if as_json:
        print_json(documents)
        return
    rows = [_row(one) for one in documents]
    print_table(_COLUMNS, rows)
    if not rows:
        where = f"in {printable(str(root))}"
        if waiting:
            said = f"no dead letters and no waiting events {where}"
        elif count := sum(one["state"] == "waiting" for one in _documents(root)):
            events = "event waits" if count == 1 else "events wait"
            said = f"no dead letters {where}; {count} {events} (--waiting)"
        else:
            said = f"no dead letters {where}"
        click.echo(said, err=True)


def print_event(root: Path, id_: str, *, as_json: bool) -> None:
    """Print all files that hold one event."""
    found = [one for one in _documents(root) if name_of(one["event"], "id") == id_]
    if not found:
        raise click.ClickException(f"no event {printable(id_)!r} is here")
    if as_json:
        print_json(found)
        return
    for one in found:
        print_json(one, indent=2)


def export(root: Path, file: str, *, as_json: bool) -> None:
    """Write everything undelivered to a new file."""
    counts: Counter[str] = Counter()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        # Usage tells of customers: readable by its owner alone.
        with open(os.open(file, flags, 0o600), "wb") as out:
            for one in _documents(root):
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


def _documents(root: Path) -> Iterator[dict[str, Any]]:
    yield from _dead(root)
    for directory in server_directories.spool_directories(root):
        census = SpoolContents(directory)
        segments = progress(census.segments, "Reading segments", len(census.segments))
        for segment in segments:
            for event in census.waiting(segment):
                yield {"state": "waiting", "event": msgspec.json.decode(event)}


def _dead(root: Path) -> Iterator[dict[str, Any]]:
    for letter in _letters(root):
        yield {
            "state": "dead",
            "event": letter.document,
            "reason": letter.reason,
            "status": letter.status,
            "time": letter.time,
        }


def _letters(root: Path) -> Iterator[Letter]:
    for directory in server_directories.spool_directories(root):
        yield from DeadLetterFile(directory).read()


def _row(one: dict[str, Any]) -> tuple[object, ...]:
    event = one["event"]
    names = (name_of(event, name) for name in ("id", "type", "subject", "time"))
    return (one["state"], *names, one.get("status"), one.get("reason"))


class Choice:
    """A choice of dead letters: those of some ids, or all.

    :raises UsageError: if it is neither or both.
    """

    def __init__(self, ids: Sequence[str], *, everything: bool) -> None:
        if bool(ids) == everything:
            raise click.UsageError("Give the ids of dead letters, or else --all.")
        self._ids = None if everything else set(ids)

    def of_each(self, letters: Sequence[Sequence[Letter]]) -> list[list[Letter]]:
        """Return the letters that are meant, of each directory.

        :raises ClickException: if an id is not among them.
        """
        if (ids := self._ids) is None:
            return [list(here) for here in letters]
        chosen = [[one for one in here if _id(one) in ids] for here in letters]
        if missing := ids - {_id(one) for here in chosen for one in here}:
            shown = ", ".join(sorted(map(printable, missing)))
            raise click.ClickException(f"no dead letter has the id {shown}")
        return chosen


def requeue_letters(
    root: Path, choice: Choice, max_bytes: int, *, expired: bool, as_json: bool
) -> None:
    """Put dead letters back into the spool, each for the server that it was for."""
    chosen: list[Letter] = []
    good: list[Letter] = []
    with _changing(root) as files:
        letters = choice.of_each([file.read() for file in files])
        for file, here in zip(files, letters, strict=True):
            sent = [o for o in here if o.can_be_sent and (expired or not o.expired)]
            if sent:
                requeue(file.directory, sent, max_bytes)
                file.settle(sent)
            file.erase_settled()
            chosen += here
            good += sent
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


def purge_letters(root: Path, choice: Choice, *, as_json: bool) -> None:
    """Delete dead letters."""
    chosen: list[Letter] = []
    erased = True
    with _changing(root) as files:
        letters = choice.of_each([file.read() for file in files])
        for file, here in zip(files, letters, strict=True):
            if here:
                file.settle(here)
            chosen += here
            erased = file.erase_settled() and erased
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
def _changing(root: Path) -> Iterator[list[DeadLetterFile]]:
    """Keep other commands from changing dead letters meanwhile; yield all files."""
    files = [
        DeadLetterFile(each) for each in server_directories.spool_directories(root)
    ]
    try:
        with contextlib.ExitStack() as changing:
            there = []
            for file in files:
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    changing.enter_context(file.changing())
                    there.append(file)
            yield there
    except BlockingIOError:
        raise click.ClickException(
            "another requeue or purge is at work in this spool"
        ) from None
    except (SpoolError, OSError) as error:
        raise click.ClickException(printable(str(error))) from None


def _id(letter: Letter) -> str | None:
    return name_of(letter.document, "id")


def print_arrived(root: Path, policy: Policy, *, as_json: bool) -> bool:
    """Print of every event in question if it arrived; return whether all did."""
    questions = _questions(root, server_directories.server_of_policy(policy))
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


def _questions(
    root: Path, server: server_directories.Server
) -> list[tuple[str, dict[str, Any]]]:
    """Return the events of which nobody knows if they arrived, each once."""
    asked: dict[tuple[str, str | None], tuple[str, dict[str, Any]]] = {}
    found = chain.from_iterable(
        _unanswered(each)
        for each in server_directories.spool_directories(root)
        if server_directories.server_of(each) in {None, server}
    )
    for state, event in found:
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
    """Print the waiting events, their age, their sender, and the lost events."""
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
    help="Address that they were for.  [default: the only one without a process]",
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

    They keep their ids, and all that is known of their delivery. A process that sends
    to the server delivers them within a second, or when it next starts.
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
    found = [one for one in server_directories.orphans(root) if one.server != server]
    if from_ is not None:
        found = [one for one in found if one.address == from_.rstrip("/")]
    addresses = sorted({one.address for one in found})
    if not found:
        where = printable(from_) if from_ else "an address"
        raise click.ClickException(
            f"no events wait for {where} that no running process uses"
        )
    if len(addresses) > 1:
        shown = ", ".join(map(printable, addresses))
        raise click.UsageError(f"Events wait for {shown}: say which with --from.")
    try:
        for one in found:
            server_directories.assign(one.directory, server)
    except (SpoolError, OSError) as error:
        raise click.ClickException(printable(str(error))) from None
    events = sum(one.events for one in found)
    if as_json:
        print_json({"assigned": events, "from": addresses[0], "to": server.api_url})
        return
    click.echo(
        f"assigned {events} events of {printable(addresses[0])} to "
        f"{printable(server.api_url)}"
    )


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
    """Show all that the spool holds of the event ID, dead or waiting."""
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

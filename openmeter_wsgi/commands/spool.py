"""``openmeter-wsgi spool``: look into a spool, and put its dead letters in order."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from openmeter_wsgi.commands import inspection, repair, verification
from openmeter_wsgi.commands.exit_codes import EXIT_CODES, exit_codes
from openmeter_wsgi.commands.opening import open_spool, read_policy, spool_options

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

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


def _opened(context: click.Context) -> Path:
    opener: Callable[[], Path] = context.obj[0]
    return opener()


@command.command(
    "status",
    epilog=EXIT_CODES,
    short_help="What waits, since when, who delivers it, what is dead.",
)
@_as_json
@click.pass_context
def _status(context: click.Context, as_json: bool) -> None:
    """Say what waits, since when, who delivers it, and what will never arrive."""
    inspection.print_status(_opened(context), as_json=as_json)


@command.command("list", epilog=EXIT_CODES)
@click.option("--waiting", is_flag=True, help="The waiting events as well.")
@_as_json
@click.pass_context
def _list(context: click.Context, waiting: bool, as_json: bool) -> None:
    """List the dead letters, the oldest first, each with its reason."""
    inspection.print_list(_opened(context), waiting=waiting, as_json=as_json)


@command.command(
    "show", epilog=EXIT_CODES, short_help="Everything that is there of one event."
)
@click.argument("id_", metavar="ID")
@_as_json
@click.pass_context
def _show(context: click.Context, id_: str, as_json: bool) -> None:
    """Show everything that is there of the event ID, dead or waiting."""
    inspection.print_event(_opened(context), id_, as_json=as_json)


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
    inspection.export(_opened(context), file, as_json=as_json)


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
    choice = repair.Choice(ids, everything=everything)
    policy = _policy(context, dry_run=True)
    directory = _opened(context)
    repair.requeue_letters(
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
    choice = repair.Choice(ids, everything=everything)
    if not yes:
        raise click.UsageError("What is purged is lost; add --yes.")
    repair.purge_letters(_opened(context), choice, as_json=as_json)


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
    if not verification.print_arrived(directory, policy, as_json=as_json):
        context.exit(3)


def _policy(context: click.Context, **options: Any) -> Any:
    return read_policy(context.obj[1], **options)

"""Putting dead letters in order: ``requeue`` and ``purge``."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import click

from openmeter_wsgi.commands import old_events
from openmeter_wsgi.commands.letters import DeadLetterFile, Letter, requeue
from openmeter_wsgi.commands.output import name_of, print_json, printable
from openmeter_wsgi.errors import SpoolError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


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
    if old := sum(old_events.is_old(one.event) for one in good):
        click.echo(f"Warning: {old_events.several(old)}: {old_events.REMEDY}", err=True)
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

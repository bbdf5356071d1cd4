"""Finding out what arrived without an answer: ``verify``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import msgspec

from openmeter_wsgi.commands.asking import NoAnswer
from openmeter_wsgi.commands.census import Census
from openmeter_wsgi.commands.letters import DeadLetterFile
from openmeter_wsgi.commands.opening import open_listing
from openmeter_wsgi.commands.output import (
    name_of,
    print_json,
    print_table,
    printable,
    progress,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from openmeter_wsgi.policy import Policy


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
    for event in Census(directory).in_doubt():
        yield "in doubt", msgspec.json.decode(event)
    for letter in DeadLetterFile(directory).read():
        if letter.expired and letter.can_be_sent:
            yield "expired", letter.document

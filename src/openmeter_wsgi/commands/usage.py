"""``openmeter-wsgi usage``: what the meters of the server say."""

from __future__ import annotations

import zoneinfo
from datetime import UTC, datetime, tzinfo
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import click

from openmeter_wsgi.commands.asking import NoAnswer, UsageQuery
from openmeter_wsgi.commands.exit_codes import EXIT_CODES
from openmeter_wsgi.commands.opening import (
    open_listing,
    options_given,
    read_policy,
    server_options,
)
from openmeter_wsgi.commands.output import print_json, print_table, printable, progress
from openmeter_wsgi.commands.periods import EXPECTED, begin, end, read_moment, rfc3339

if TYPE_CHECKING:
    from collections.abc import Callable

    from openmeter_wsgi.commands.asking import Document

WINDOWS = ("MINUTE", "HOUR", "DAY", "MONTH")
_SUBJECT = "subject"


def _zone(name: str) -> tzinfo:
    try:
        return zoneinfo.ZoneInfo(name)
    except (ValueError, OSError, zoneinfo.ZoneInfoNotFoundError):
        raise click.BadParameter(
            f"expected a time zone such as Europe/Berlin, got {name!r}"
        ) from None


def _filter(text: str) -> tuple[str, str]:
    dimension, equals, wanted = text.partition("=")
    if not dimension or not equals:
        raise click.BadParameter(f"expected DIMENSION=VALUE, got {text!r}")
    return dimension, wanted


@click.command("usage", epilog=EXIT_CODES)
@click.argument("meters", nargs=-1, metavar="[METER]...")
@click.option("--subject", "subjects", multiple=True, help="Only of this subject.")
@click.option(
    "--group-by",
    "group_by",
    multiple=True,
    metavar="DIMENSION",
    help='A row for each value of this; "subject" is one, too.',
)
@click.option(
    "--filter",
    "filters",
    multiple=True,
    type=_filter,
    metavar="DIMENSION=VALUE",
    help="Only what has this value.",
)
@click.option(
    "--window",
    type=click.Choice(WINDOWS, case_sensitive=False),
    help="A row for each of these.",
)
@click.option("--from", "since", metavar="TIME", help=f"Since when; {EXPECTED}.")
@click.option("--to", "until", metavar="TIME", help="Until when, exclusive; likewise.")
@click.option(
    "--timezone",
    "zone",
    type=_zone,
    metavar="NAME",
    default="UTC",
    show_default=True,
    help="Of days and months, and of times without an offset.",
)
@server_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    meters: tuple[str, ...],
    policy_file: str | None,
    api_url: str | None,
    as_json: bool,
    **what: Any,
) -> None:
    """Print what METERs have counted, all of them if none is named.

    Times are widened to whole windows, without --window to whole minutes. OpenMeter
    counts an event some seconds after it took it.
    """
    query = _query(**what)
    policy = read_policy(policy_file, **options_given(api_url=api_url))
    try:
        with open_listing(policy) as listing:
            names = meters or _meters_with(listing.meters(), what)
            rows = [
                _row(name, row)
                for name in progress(names, "Asking", len(names))
                for row in listing.usage(name, query)
            ]
    except NoAnswer as error:
        raise click.ClickException(printable(str(error))) from None
    if as_json:
        print_json(rows)
    else:
        counted = {row["meter"] for row in rows}
        # Nothing is an answer, too.
        rows += [_row(name, {}) for name in names if name not in counted]
        _print(rows, what)


def _query(
    *,
    subjects: tuple[str, ...],
    group_by: tuple[str, ...],
    filters: tuple[tuple[str, str], ...],
    window: str | None,
    since: str | None,
    until: str | None,
    zone: tzinfo,
) -> UsageQuery:
    edge = window or "MINUTE"
    start = _moment("--from", since, zone)
    stop = _moment("--to", until, zone)
    return UsageQuery(
        since=rfc3339(begin(start, edge)) if start else None,
        until=rfc3339(end(stop, edge)) if stop else None,
        window=window,
        zone=str(zone),
        subjects=subjects,
        group_by=group_by,
        filters=filters,
    )


def _moment(option: str, text: str | None, zone: tzinfo) -> datetime | None:
    try:
        return None if text is None else read_moment(text, zone, datetime.now(UTC))
    except (ValueError, OverflowError) as error:
        raise click.UsageError(f"{option}: {error}") from None


def _meters_with(meters: list[Document], what: dict[str, Any]) -> list[str]:
    """Return the meters that have every dimension that is asked for."""
    asked = {*what["group_by"], *(dimension for dimension, _ in what["filters"])}
    asked -= {_SUBJECT}
    return sorted(
        str(one.get("slug")) for one in meters if asked <= {*(one.get("groupBy") or {})}
    )


def _row(meter: str, row: Document) -> Document:
    return {
        "meter": meter,
        "from": row.get("windowStart"),
        "to": row.get("windowEnd"),
        "subject": row.get("subject"),
        "group_by": row.get("groupBy") or {},
        "value": row.get("value"),
    }


def _print(rows: list[Document], what: dict[str, Any]) -> None:
    """Print a table of the columns that say something."""
    by_subject = bool(what["subjects"]) or _SUBJECT in what["group_by"]
    dimensions = [name for name in dict.fromkeys(what["group_by"]) if name != _SUBJECT]
    columns: dict[str, Callable[[Document], object]] = {
        "meter": lambda row: row["meter"],
        "from": lambda row: row["from"],
        "to": lambda row: row["to"],
    }
    if by_subject:
        columns[_SUBJECT] = lambda row: row[_SUBJECT]
    for name in dimensions:
        columns[name] = lambda row, name=name: row["group_by"].get(name)  # type: ignore[misc]
    columns["value"] = lambda row: _number(row["value"])
    cells = ([read(row) for read in columns.values()] for row in rows)
    print_table(list(columns), cells, numbers=("value",))


def _number(value: object) -> object:
    """Return a number with all its digits, and no power of ten."""
    return f"{Decimal(repr(value)):f}" if isinstance(value, float) else value

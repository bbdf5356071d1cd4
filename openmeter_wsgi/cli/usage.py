"""``openmeter-wsgi usage``: print the usage of the server's meters."""

from __future__ import annotations

import re
import zoneinfo
from datetime import UTC, datetime, timedelta, tzinfo
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import click

from openmeter_wsgi.cli.api_client import NoAnswer, UsageQuery
from openmeter_wsgi.cli.common import (
    EXIT_CODES,
    open_listing,
    options_given,
    print_json,
    print_table,
    printable,
    progress,
    read_policy,
    server_options,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from openmeter_wsgi.cli.api_client import Document, Listing


_AGE = re.compile(r"(\d{1,6})(min|h|d|w)")
_UNITS = {"min": "minutes", "h": "hours", "d": "days", "w": "weeks"}
EXPECTED = "expected RFC 3339, a date such as 2026-11-01, or an age such as 24h or 7d"


def read_moment(text: str, zone: tzinfo, now: datetime) -> datetime:
    """Return the moment that *text* says: RFC 3339, a date, or how long ago it is.

    A date, or a time without an offset, is one of *zone*.

    :raises ValueError: if it says none.
    """
    if age := _AGE.fullmatch(text.strip()):
        return (now - timedelta(**{_UNITS[age[2]]: int(age[1])})).astimezone(zone)
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ValueError(f"{EXPECTED}, got {text!r}") from None
    if moment.tzinfo is None:
        return moment.replace(tzinfo=zone)
    return moment.astimezone(zone)


def window_begin(moment: datetime, window: str) -> datetime:
    """Return when the window began that *moment* lies in."""
    whole = moment.replace(second=0, microsecond=0)
    cut: dict[str, Callable[[], datetime]] = {
        "MINUTE": lambda: whole,
        "HOUR": lambda: whole.replace(minute=0),
        "DAY": lambda: whole.replace(hour=0, minute=0),
        "MONTH": lambda: whole.replace(day=1, hour=0, minute=0),
    }
    return cut[window]()


def window_end(moment: datetime, window: str) -> datetime:
    """Return when the window ends that *moment* lies in; itself, if it begins one."""
    start = window_begin(moment, window)
    if start == moment:
        return moment
    if window == "MONTH":
        return window_begin(start + timedelta(days=32), window)
    if window == "DAY":
        return start + timedelta(days=1)
    size = timedelta(hours=1) if window == "HOUR" else timedelta(minutes=1)
    # By the clock of UTC: an hour that a change of clocks repeats is two.
    return (start.astimezone(UTC) + size).astimezone(moment.tzinfo)


def time_text(moment: datetime) -> str:
    """Return *moment* as OpenMeter reads it."""
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


WINDOWS = ("MINUTE", "HOUR", "DAY", "MONTH")
_SUBJECT = "subject"
_NOT_FOUND = 404
_NO_METERS = "the server has no meters (see openmeter-wsgi check)"


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
    """Print the usage of METERs, of all of them if none is named.

    Times are widened to whole windows, without --window to whole minutes. OpenMeter
    counts an event some seconds after it took it.
    """
    query = _query(**what)
    policy = read_policy(policy_file, **options_given(api_url=api_url))
    try:
        with open_listing(policy) as listing:
            there = [] if meters else listing.meters()
            names = meters or _meters_with(there, what)
            rows = [
                _row(name, row)
                for name in progress(names, "Asking", len(names))
                for row in _usage(listing, name, query)
            ]
    except NoAnswer as error:
        raise click.ClickException(printable(str(error))) from None
    if not meters and not there:
        click.echo(_NO_METERS, err=True)
    if as_json:
        print_json(rows)
    else:
        counted = {row["meter"] for row in rows}
        # Nothing is an answer, too.
        rows += [_row(name, {}) for name in names if name not in counted]
        _print(rows, what)


def _usage(listing: Listing, meter: str, query: UsageQuery) -> list[Document]:
    """Return the rows of a meter; if there is none, the error names those there are."""
    try:
        return listing.usage(meter, query)
    except NoAnswer as error:
        there = listing.meters() if error.status == _NOT_FOUND else []
        slugs = sorted(str(one.get("slug")) for one in there)
        if error.status != _NOT_FOUND or meter in slugs:
            raise
        has = f"its meters are {', '.join(slugs)}" if slugs else _NO_METERS
        raise NoAnswer(
            f"no meter {meter!r} is on the server: {has}", _NOT_FOUND
        ) from error


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
        since=time_text(window_begin(start, edge)) if start else None,
        until=time_text(window_end(stop, edge)) if stop else None,
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

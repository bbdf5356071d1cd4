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
_FORMS = "RFC 3339, a date such as 2026-11-01, or an age such as 24h or 7d"


def read_moment(text: str, zone: tzinfo, now: datetime) -> datetime:
    """Parse a moment: RFC 3339, a date, or an age.

    A date, or a time without an offset, is in *zone*.

    :raises ValueError: if *text* is none of these.
    """
    if age := _AGE.fullmatch(text.strip()):
        return (now - timedelta(**{_UNITS[age[2]]: int(age[1])})).astimezone(zone)
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ValueError(f"expected {_FORMS}, got {text!r}") from None
    if moment.tzinfo is None:
        return moment.replace(tzinfo=zone)
    return moment.astimezone(zone)


def window_begin(moment: datetime, window: str) -> datetime:
    """Return the start of the window that contains *moment*."""
    whole = moment.replace(second=0, microsecond=0)
    cut: dict[str, Callable[[], datetime]] = {
        "MINUTE": lambda: whole,
        "HOUR": lambda: whole.replace(minute=0),
        "DAY": lambda: whole.replace(hour=0, minute=0),
        "MONTH": lambda: whole.replace(day=1, hour=0, minute=0),
    }
    return cut[window]()


def window_end(moment: datetime, window: str) -> datetime:
    """Return the end of the window that contains *moment*; a start stays as it is."""
    start = window_begin(moment, window)
    if start == moment:
        return moment
    if window == "MONTH":
        return window_begin(start + timedelta(days=32), window)
    if window == "DAY":
        return start + timedelta(days=1)
    size = timedelta(hours=1) if window == "HOUR" else timedelta(minutes=1)
    # Added in UTC, where an hour that daylight saving time repeats counts twice.
    return (start.astimezone(UTC) + size).astimezone(moment.tzinfo)


def time_text(moment: datetime) -> str:
    """Return *moment* in the format of OpenMeter's API."""
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
@click.option(
    "--subject",
    "subjects",
    multiple=True,
    help="Only the usage of this subject. May be repeated.",
)
@click.option(
    "--group-by",
    "group_by",
    multiple=True,
    metavar="DIMENSION",
    help='Print a row for each value of this dimension, or of "subject". '
    "May be repeated.",
)
@click.option(
    "--filter",
    "filters",
    multiple=True,
    type=_filter,
    metavar="DIMENSION=VALUE",
    help="Only the usage with this value. May be repeated.",
)
@click.option(
    "--window",
    type=click.Choice(WINDOWS, case_sensitive=False),
    help="Print a row for each minute, hour, day or month.  [default: one total]",
)
@click.option(
    "--from",
    "since",
    metavar="TIME",
    help=f"Start: {_FORMS}.  [default: the first event]",
)
@click.option(
    "--to",
    "until",
    metavar="TIME",
    help="End, exclusive, in the same forms.  [default: the last event]",
)
@click.option(
    "--timezone",
    "zone",
    type=_zone,
    metavar="NAME",
    default="UTC",
    show_default=True,
    help="Time zone of days and months, and of times without an offset.",
)
@server_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    meters: tuple[str, ...],
    policy_file: str | None,
    api_url: str | None,
    as_json: bool,
    **selection: Any,
) -> None:
    """Print the usage of METERs, or of all meters if none is named.

    Without --window and --group-by this is one total per meter; for the total of a
    period give --from and --to. Both are widened to whole windows, without --window to
    whole minutes. OpenMeter counts an event some seconds after it took it.
    """
    query = _query(**selection)
    policy = read_policy(policy_file, **options_given(api_url=api_url))
    try:
        with open_listing(policy) as listing:
            on_server = [] if meters else listing.meters()
            names = meters or _meters_with_dimensions(on_server, selection)
            rows = [
                _row(name, row)
                for name in progress(names, "Asking", len(names))
                for row in _usage(listing, name, query)
            ]
    except NoAnswer as error:
        raise click.ClickException(printable(str(error))) from None
    if not meters and not on_server:
        click.echo(_NO_METERS, err=True)
    if as_json:
        print_json(rows)
    else:
        counted = {row["meter"] for row in rows}
        # A meter without usage gets a row without a value.
        rows += [_row(name, {}) for name in names if name not in counted]
        _print(rows, selection)


def _usage(listing: Listing, meter: str, query: UsageQuery) -> list[Document]:
    """Return the rows of a meter.

    :raises NoAnswer: if the server does not have it, with the names of its meters.
    """
    try:
        return listing.usage(meter, query)
    except NoAnswer as error:
        on_server = listing.meters() if error.status == _NOT_FOUND else []
        slugs = sorted(str(one.get("slug")) for one in on_server)
        if error.status != _NOT_FOUND or meter in slugs:
            raise
        known = f"its meters are {', '.join(slugs)}" if slugs else _NO_METERS
        raise NoAnswer(
            f"no meter {meter!r} is on the server: {known}", _NOT_FOUND
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
    unit = window or "MINUTE"
    start = _moment("--from", since, zone)
    stop = _moment("--to", until, zone)
    return UsageQuery(
        since=time_text(window_begin(start, unit)) if start else None,
        until=time_text(window_end(stop, unit)) if stop else None,
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


def _meters_with_dimensions(
    meters: list[Document], selection: dict[str, Any]
) -> list[str]:
    """Return the slugs of the meters that have all dimensions of *selection*."""
    wanted = {*selection["group_by"], *(name for name, _ in selection["filters"])}
    wanted -= {_SUBJECT}
    return sorted(
        str(meter.get("slug"))
        for meter in meters
        if wanted <= {*(meter.get("groupBy") or {})}
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


def _print(rows: list[Document], selection: dict[str, Any]) -> None:
    """Print a table, with a column for each dimension of *selection*."""
    group_by = selection["group_by"]
    by_subject = bool(selection["subjects"]) or _SUBJECT in group_by
    dimensions = [name for name in dict.fromkeys(group_by) if name != _SUBJECT]
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
    """Return a number with all its digits, without an exponent."""
    return f"{Decimal(repr(value)):f}" if isinstance(value, float) else value

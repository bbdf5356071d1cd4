"""Prints the tables and results of the demo."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from examples.demo.load import KEYS, Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from examples.demo.access import Check
    from examples.demo.comparison import Billed
    from examples.demo.expectation import Account, Expectation

WIDTH = 88
YES, NO = "[green]✓[/]", "[bold red]✗[/]"


def make_console() -> Console:
    """Return a console for a terminal of any width, or for a file."""
    # rich leaves out colours and animation unless the output is a terminal.
    console = Console(highlight=False, emoji=False)
    console.width = min(console.width, WIDTH)
    return console


def make_progress(console: Console) -> Progress:
    """Return a progress bar, which a file does not show."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _table(*columns: str) -> Table:
    """Return a table; a column whose name begins with ``>`` has numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        name = column.removeprefix(">")
        if name == column:
            table.add_column(name)
        else:
            # A truncated number would be a wrong number.
            table.add_column(name, justify="right", no_wrap=True, min_width=6)
    return table


def requests_table(expected: Expectation) -> Table:
    """Return a table of the requests by kind: their numbers and billed usage."""
    table = _table("request", ">sent", ">answered", ">billed", "usage")
    counts = (expected.sent, expected.answered, expected.metered)
    for kind in Kind:
        if expected.sent[kind]:
            numbers = (f"{count[kind]:,}" for count in counts)
            table.add_row(kind.label, *numbers, kind.billed)
    table.add_section()
    totals = (f"{count.total():,}" for count in counts)
    table.add_row("total", *totals, f"{expected.events:,} events")
    return table


def usage_table(expected: Expectation, billed: Billed) -> Table:
    """Return a table of the expected and the billed usage."""
    table = _table("subject", "meter", ">expected", ">billed", "")
    order = list(KEYS)
    accounts = expected.usage.keys() | billed.usage.keys()
    shown = None
    for account in sorted(accounts, key=lambda one: (_rank(order, one), one)):
        if shown not in (None, account.subject):
            table.add_section()
        due, found = expected.usage[account], billed.usage[account]
        table.add_row(
            "" if shown == account.subject else escape(account.subject),
            f"{account.meter} {account.model}".strip(),
            f"{due:,}",
            f"{found:,}",
            YES if due == found else NO,
        )
        shown = account.subject
    return table


def _rank(order: list[str], account: Account) -> int:
    return order.index(account.subject) if account.subject in order else len(order)


def delivery_table(billed: Billed, *, before_stop: int | None) -> Table:
    """Return a table of the counts of the server and of the workers."""
    counts = billed.counts
    table = _table("", ">", "")
    table.show_header = False
    accepted = counts["requests"] - counts["failed"]
    rows = [
        ("batches accepted", accepted, ""),
        (
            "batches answered with 500",
            counts["failed"],
            f"{(counts['failed'] + 1) // 2} of them after storing",
        ),
        ("repeated events dropped", counts["duplicates"], "recognised by their ids"),
        ("events stored", counts["stored"], ""),
    ]
    if before_stop is not None:
        at_exit = counts["stored"] - before_stop
        rows.append(("stored events sent at exit", at_exit, "they waited at SIGTERM"))
    if billed.workers is not None:
        rows += _worker_rows(billed)
    for label, number, note in rows:
        table.add_row(label, f"{number:,}", note)
    return table


#: Texts for the reasons why requests are not billed.
_REASON_TEXTS = defaultdict(lambda: "another reason", status="their status code")


def _worker_rows(billed: Billed) -> list[tuple[str, int, str]]:
    reasons = billed.reasons("not_metered")
    named = ", ".join(
        f"{count:,} by {_REASON_TEXTS[reason]}" for reason, count in reasons.items()
    )
    lost = billed.reasons("dropped").total() + billed.total("dead_lettered")
    return [
        ("requests seen by workers", billed.total("settled"), ""),
        ("requests not billed", reasons.total(), named),
        ("events dropped or refused", lost, ""),
        ("events still waiting", billed.total("waiting"), ""),
    ]


def conclude(console: Console, expected: Expectation, found: Sequence[str]) -> None:
    """Print that the bill is right, or the differences."""
    if found:
        console.print("[bold red]The bill is wrong:[/]")
        for sentence in found:
            console.print(f"  {NO} {escape(sentence)}")
        return
    sent, events = expected.sent.total(), expected.events
    console.print(
        f"{YES} [bold]The bill is right.[/] {sent:,} requests became {events:,} "
        "events: all of them arrived, and none was counted twice."
    )
    console.print(
        "Not shown: without a spool, a killed worker loses the events in its memory.",
        style="dim",
    )


def access_table(checks: Sequence[Check]) -> Table:
    """Return a table of the entitlement checks and their results."""
    table = _table("request", "answer", "")
    for check in checks:
        table.add_row(
            escape(check.label), escape(check.got), YES if check.is_right else NO
        )
    return table


def conclude_access(console: Console, checks: Sequence[Check]) -> list[str]:
    """Print that all checks gave the expected result; return the differences."""
    wrong = [
        f"{check.label.strip()}: expected {check.expected}, got {check.got}"
        for check in checks
        if not check.is_right
    ]
    if wrong:
        console.print("[bold red]Access is wrong:[/]")
        for sentence in wrong:
            console.print(f"  {NO} {escape(sentence)}")
    else:
        console.print(
            f"{YES} [bold]Access is right.[/] The quota was served exactly. The "
            "handler got the value of the static entitlement. During the outage "
            "fail_mode decided."
        )
    return wrong


def print_addresses(console: Console, openmeter: str, app: str) -> None:
    """Print the addresses of both servers, and commands to try."""
    curl = f"curl -H 'X-API-Key: {KEYS['acme']}' {app}/products"
    console.print("\n[bold]Both are left running.[/] Ctrl-C stops them.")
    for label, text in (
        ("Usage as it arrives:", openmeter),
        ("A request of your own:", curl),
        (
            "The usage of acme:",
            f"curl '{openmeter}/api/v1/meters/api_requests/query?subject=acme'",
        ),
    ):
        console.print(f"  {label}", style="dim")
        console.print(f"    {text}", markup=False, soft_wrap=True)


def print_end_of_log(console: Console, name: str, text: str, lines: int = 15) -> None:
    """Print the last lines of a log."""
    console.rule(f"the end of the log of {name}", align="left", style="dim")
    last = text.splitlines()[-lines:] or ["(it is empty)"]
    console.print("\n".join(last), markup=False, style="dim")

"""What the demo prints."""

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

    from examples.demo.access import Scene
    from examples.demo.comparison import Billed
    from examples.demo.expectation import Account, Expectation

WIDTH = 88
YES, NO = "[green]✓[/]", "[bold red]✗[/]"


def make_console() -> Console:
    """Return a console for a terminal of any width, or for a file."""
    # Where nobody can see colours and movement, rich leaves them out by itself.
    console = Console(highlight=False, emoji=False)
    console.width = min(console.width, WIDTH)
    return console


def make_progress(console: Console) -> Progress:
    """Return a bar for a terminal, and nothing for a file."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _table(*columns: str) -> Table:
    """Return a table whose columns after a ``>`` are numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        name = column.removeprefix(">")
        if name == column:
            table.add_column(name)
        else:
            # A number that is cut is a wrong number.
            table.add_column(name, justify="right", no_wrap=True, min_width=6)
    return table


def requests_table(expected: Expectation) -> Table:
    """Return the requests by kind: how many there were, and what they cost."""
    table = _table("kind", ">sent", ">answered", ">metered", "billed")
    counts = (expected.sent, expected.answered, expected.metered)
    for kind in Kind:
        if expected.sent[kind]:
            numbers = (f"{count[kind]:,}" for count in counts)
            table.add_row(kind.label, *numbers, kind.billed)
    table.add_section()
    totals = (f"{count.total():,}" for count in counts)
    table.add_row("together", *totals, f"{expected.events:,} events")
    return table


def usage_table(expected: Expectation, billed: Billed) -> Table:
    """Return what the requests add up to beside what the server has."""
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
    """Return how the events came to the server, and what the workers counted."""
    counts = billed.counts
    table = _table("", ">", "")
    table.show_header = False
    accepted = counts["requests"] - counts["failed"]
    rows = [
        ("batches accepted", accepted, ""),
        (
            "batches failed on purpose",
            counts["failed"],
            "every other after storing",
        ),
        ("repeated events dropped", counts["duplicates"], "recognised by their ids"),
        ("events stored", counts["stored"], ""),
    ]
    if before_stop is not None:
        at_exit = counts["stored"] - before_stop
        rows.append(("of these at exit", at_exit, "they waited when SIGTERM came"))
    if billed.workers is not None:
        rows += _worker_rows(billed)
    for label, number, note in rows:
        table.add_row(label, f"{number:,}", note)
    return table


#: The reasons for which the requests of the demo are not metered.
_BY = defaultdict(lambda: "another reason", status="their status code")


def _worker_rows(billed: Billed) -> list[tuple[str, int, str]]:
    reasons = billed.reasons("not_metered")
    named = ", ".join(
        f"{count:,} by {_BY[reason]}" for reason, count in reasons.items()
    )
    lost = billed.reasons("dropped").total() + billed.total("dead_lettered")
    return [
        ("requests the workers saw", billed.total("settled"), ""),
        ("of these not metered", reasons.total(), named),
        ("events dropped or refused", lost, ""),
        ("events left behind", billed.total("waiting"), ""),
    ]


def conclude(console: Console, expected: Expectation, found: Sequence[str]) -> None:
    """Print whether the bill is right, and if not, what differs."""
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
        "Not shown: without a spool a killed worker loses what waits in its memory.",
        style="dim",
    )


def access_table(scenes: Sequence[Scene]) -> Table:
    """Return who was let through, and who was not."""
    table = _table("who asks", "answer", "")
    for scene in scenes:
        table.add_row(
            escape(scene.label), escape(scene.got), YES if scene.is_right else NO
        )
    return table


def conclude_access(console: Console, scenes: Sequence[Scene]) -> list[str]:
    """Print whether those were let through who may; return what differs."""
    wrong = [
        f"{scene.label.strip()}: expected {scene.expected}, got {scene.got}"
        for scene in scenes
        if not scene.is_right
    ]
    if wrong:
        console.print("[bold red]Access is wrong:[/]")
        for sentence in wrong:
            console.print(f"  {NO} {escape(sentence)}")
    else:
        console.print(
            f"{YES} [bold]Access is right.[/] The quota was served to its end and not "
            "beyond; the handler got the value of the static entitlement; with "
            "OpenMeter away the fail mode decides."
        )
    return wrong


def say_addresses(console: Console, openmeter: str, app: str) -> None:
    """Print where to look, and what to try."""
    curl = f"curl -H 'X-API-Key: {KEYS['acme']}' {app}/products"
    console.print("\n[bold]Both are left running.[/] Ctrl-C stops them.")
    for label, text in (
        ("Usage as it arrives:", openmeter),
        ("A request of your own:", curl),
        (
            "What it cost:",
            f"curl '{openmeter}/api/v1/meters/api_requests/query?subject=acme'",
        ),
    ):
        console.print(f"  {label}", style="dim")
        console.print(f"    {text}", markup=False, soft_wrap=True)


def say_tail(console: Console, name: str, text: str, lines: int = 15) -> None:
    """Print the end of a log."""
    console.rule(f"the end of the log of {name}", align="left", style="dim")
    last = text.splitlines()[-lines:] or ["(it is empty)"]
    console.print("\n".join(last), markup=False, style="dim")

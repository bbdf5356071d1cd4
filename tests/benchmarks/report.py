"""How figures are shown: a table, its machine and versions, the same as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

_LIBRARIES = ("werkzeug", "requests", "urllib3", "msgspec", "gunicorn")


class Row(NamedTuple):
    """One figure: what of, as measured, as demanded."""

    what: str
    unit: str
    #: One for each round, process or step.
    measured: Sequence[float]
    #: At most so much, or at least if it says so; None where nothing is demanded.
    target: float | None = None
    at_least: bool = False

    @property
    def median(self) -> float:
        """The figure itself."""
        return statistics.median(self.measured)

    @property
    def met(self) -> bool | None:
        """Whether the target is met, None where there is none."""
        if self.target is None:
            return None
        if self.at_least:
            return self.median >= self.target
        return self.median <= self.target


def arguments(doc: str, **numbers: int) -> argparse.ArgumentParser:
    """Return a parser of --json and of options that are numbers."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    for name, usual in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=usual)
    return parser


def machine() -> dict[str, str]:
    """Return where and with what it was measured."""
    found = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()}",
        "processor": f"{os.cpu_count()} x {found[0] if found else platform.machine()}",
        "libraries": ", ".join(f"{name} {version(name)}" for name in _LIBRARIES),
    }


def show(title: str, rows: Sequence[Row], path: Path | None = None) -> None:
    """Print the table, and write it to *path* as JSON."""
    where = machine()
    print(f"\n### {title}\n\n{'; '.join(where.values())}\n")
    print("| what | median | smallest to largest | target |\n|---|---:|---|---|")
    for row in rows:
        print(f"| {row.what} | {number(row.median)} {row.unit} | {_span(row)} ", end="")
        print(f"| {_target(row)} |")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {"title": title, **where, "rows": [_as_json(row) for row in rows]}
        path.write_text(json.dumps(document, indent=1) + "\n")


def number(value: float) -> str:
    """Return it with three digits that say something."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _span(row: Row) -> str:
    if len(row.measured) < 2:
        return ""
    return f"{number(min(row.measured))} to {number(max(row.measured))}"


def _target(row: Row) -> str:
    if row.target is None:
        return ""
    limit = f"{'at least' if row.at_least else 'at most'} {number(row.target)}"
    return limit if row.met else f"**{limit}**: not met"


def _as_json(row: Row) -> dict[str, Any]:
    return {**row._asdict(), "median": row.median, "met": row.met}

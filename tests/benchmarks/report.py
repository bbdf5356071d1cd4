"""Output of figures: a Markdown table with machine and versions, and JSON."""

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
    """One row of a table: a label, the measured values and their target."""

    what: str
    unit: str
    #: One value for each round, process or step.
    measured: Sequence[float]
    #: Maximum of the median, or its minimum if `at_least` is set; None: no target.
    target: float | None = None
    at_least: bool = False

    @property
    def median(self) -> float:
        """The median of the measured values: the figure of the row."""
        return statistics.median(self.measured)

    @property
    def met(self) -> bool | None:
        """True if the target is met, None without a target."""
        if self.target is None:
            return None
        if self.at_least:
            return self.median >= self.target
        return self.median <= self.target


def arguments(doc: str, **numbers: int) -> argparse.ArgumentParser:
    """Return a parser of --json and of one integer option for each of *numbers*."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser


def machine() -> dict[str, str]:
    """Return the interpreter, system, processor and libraries of this run."""
    models = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()}",
        "processor": f"{os.cpu_count()} x {(models or [platform.machine()])[0]}",
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
    """Format *value* with three significant digits, or as a whole number."""
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

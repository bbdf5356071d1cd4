"""``python -m examples.demo``: send requests, and check the billed usage."""

from __future__ import annotations

import argparse
import re
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import requests

from examples.demo import report
from examples.demo.processes import ProcessFailed
from examples.demo.run import Demo, Options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

INTERRUPTED = 130
MAX_FAIL_RATE = 0.5


def main(arguments: Sequence[str] | None = None, **options: Any) -> int:
    """Run the demo; return 0 if the billed usage is the expected usage."""
    chosen = Options(**vars(_parser().parse_args(arguments)), **options)
    # SIGHUP (a closed terminal) and SIGTERM (a supervisor) stop it as Ctrl-C does.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    console = report.make_console()
    try:
        with tempfile.TemporaryDirectory(prefix="openmeter-demo-") as logs:
            return _run(console, chosen, Path(logs))
    except KeyboardInterrupt:
        console.print("\nstopped; nothing is left running")
        return INTERRUPTED


def _run(console: Console, options: Options, logs: Path) -> int:
    with Demo(console, options, logs) as demo:
        try:
            differences = demo.run()
        except (ProcessFailed, OSError, requests.RequestException) as error:
            console.print(f"[bold red]The demo failed:[/] {error}", soft_wrap=True)
            demo.print_logs()
            return 1
        if differences:
            demo.print_logs()
        return 1 if differences else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description="Send requests to a metered Flask application on gunicorn, and "
        "compare the billed usage with the responses that the clients received.",
    )
    about = "leave the application and the sandbox running"
    parser.add_argument("--keep", action="store_true", help=about)
    for name, read, about in (
        ("requests", _count, "number of requests"),
        ("seed", int, "seed of the random requests"),
        ("fail-rate", _share, "share of batches that the sandbox answers with 500"),
    ):
        default = getattr(Options, name.replace("-", "_"))
        parser.add_argument(
            f"--{name}",
            type=read,
            default=default,
            metavar="N",
            help=f"{about} (default: {default:,})",
        )
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError("expected a number from 1 to 1,000,000")
    return int(text)


def _share(text: str) -> float:
    # With a larger share the last batches may fail until the workers end.
    if not re.fullmatch(r"0(\.\d+)?", text) or float(text) > MAX_FAIL_RATE:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to {MAX_FAIL_RATE}")
    return float(text)


if __name__ == "__main__":
    sys.exit(main())

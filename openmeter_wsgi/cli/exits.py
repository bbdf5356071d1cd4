"""How commands end: exit codes and signals."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Iterator


#: The command has looked, or done what could be done, and the answer is no.
ANSWER_IS_NO = 3

_MEANINGS = {
    0: "done",
    1: "it could not be done; one line on stderr says why",
    2: "wrong usage, or a configuration that cannot work",
}


def exit_codes(**meanings: str) -> str:
    """Return the foot of a command's help; *meanings* change or add to the usual.

    They are named by their number: ``_3="something fails"``.
    """
    said = {int(name.lstrip("_")): text for name, text in meanings.items()}
    lines = [
        f"  {code}  {text}" for code, text in sorted({**_MEANINGS, **said}.items())
    ]
    return "\n".join(["\b", "Exit codes:", *lines])


#: Those of a command that has no others.
EXIT_CODES = exit_codes()


class BadConfiguration(click.ClickException):
    """A configuration that cannot work is told from an attempt that failed."""

    exit_code = 2


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM and SIGINT set instead of ending the process."""
    stopped = threading.Event()
    previous = {
        number: signal.signal(number, lambda *_: stopped.set())
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

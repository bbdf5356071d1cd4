"""How commands end: the same numbers everywhere, told at the foot of their help."""

from __future__ import annotations

import click

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

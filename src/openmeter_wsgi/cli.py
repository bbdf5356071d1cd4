"""The command line: ``openmeter-wsgi``."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import click

#: Subcommand to the extra that it needs and the module that holds it as ``command``.
#: A module is imported when its command is called for.
COMMANDS = {"sandbox": ("sandbox", "openmeter_wsgi.sandbox.command")}


def main() -> None:
    """Run the command line."""
    try:
        group = _group()
    except ModuleNotFoundError as missing:
        _refuse(missing, "sandbox")
    group(prog_name="openmeter-wsgi")


def _group() -> click.Group:
    # click is an extra: without it this module must still be able to say so.
    import click

    class Commands(click.Group):
        """The subcommands by name."""

        def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
            return sorted(COMMANDS)

        def get_command(
            self,
            ctx: click.Context,  # noqa: ARG002
            cmd_name: str,
        ) -> click.Command | None:
            return _load(cmd_name) if cmd_name in COMMANDS else None

    return Commands(
        help="Usage metering for WSGI applications.",
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def _load(name: str) -> click.Command:
    extra, module = COMMANDS[name]
    try:
        command: click.Command = importlib.import_module(module).command
    except ModuleNotFoundError as missing:
        _refuse(missing, extra)
    return command


def _refuse(missing: ModuleNotFoundError, extra: str) -> NoReturn:
    """End with one line that says what to install."""
    package = (missing.name or "").partition(".")[0]
    if package == "openmeter_wsgi":
        # Not an extra but a fault of our own, which deserves its traceback.
        raise missing
    sys.stderr.write(
        f"openmeter-wsgi: {package} is not installed; "
        f"run: pip install 'openmeter_wsgi[{extra}]'\n"
    )
    sys.exit(1)

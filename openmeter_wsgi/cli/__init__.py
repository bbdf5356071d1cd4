"""The command line: ``openmeter-wsgi``."""

from __future__ import annotations

import importlib
import io
import os
import sys
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from openmeter_wsgi.errors import NOT_ON_WINDOWS
from openmeter_wsgi.version import VERSION

if TYPE_CHECKING:
    import click


class Subcommand(NamedTuple):
    """A subcommand and its module, which is imported when the command is called."""

    #: The module that holds it as ``command``.
    module: str
    #: The extra that installs what it needs.
    extra: str
    help: str


COMMANDS = {
    "check": Subcommand(
        "openmeter_wsgi.cli.check",
        "cli",
        "Validate the configuration against the server; each problem has a remedy.",
    ),
    "send": Subcommand(
        "openmeter_wsgi.cli.send",
        "cli",
        "Send an event, or those of a file.",
    ),
    "usage": Subcommand(
        "openmeter_wsgi.cli.usage",
        "cli",
        "Print the usage of the server's meters.",
    ),
    "ship": Subcommand(
        "openmeter_wsgi.cli.ship",
        "cli",
        "Deliver a spool to OpenMeter, as a process of its own.",
    ),
    "spool": Subcommand(
        "openmeter_wsgi.cli.spool",
        "cli",
        "Look into a spool, and put its dead letters in order.",
    ),
    "import": Subcommand(
        "openmeter_wsgi.cli.import_",
        "cli",
        "Print the configuration of another product as a file of options.",
    ),
    "sandbox": Subcommand(
        "openmeter_wsgi.sandbox.command",
        "sandbox",
        "Serve OpenMeter's API on this machine, with a page that shows the usage.",
    ),
}
#: The replacement of each command of an earlier version.
REMOVED = {
    "completion": "_OPENMETER_WSGI_COMPLETE=bash_source openmeter-wsgi",
    "tail": "openmeter-wsgi spool list --follow",
}


def main() -> None:
    """Run the command line."""
    if sys.platform == "win32":
        sys.exit(f"openmeter-wsgi: {NOT_ON_WINDOWS}")
    for stream in (sys.stdout, sys.stderr):
        # A terminal of another encoding shows an escape for what it does not have.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        group = _group()
    except ModuleNotFoundError as missing:
        called = COMMANDS.get(sys.argv[1]) if sys.argv[1:] else None
        _refuse(missing, called.extra if called else "cli")
    try:
        group(prog_name="openmeter-wsgi")
    except OSError as error:
        # Each command tells of its own files: this is stdout. It is not tried again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(f"openmeter-wsgi: the output cannot be written: {error.strerror}")


def _group() -> click.Group:
    # click is an extra: without it this module must still be able to say so.
    import click
    from click.shell_completion import CompletionItem

    from openmeter_wsgi.cli.common import exit_codes

    class Commands(click.Group):
        """The subcommands by name."""

        def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
            return list(COMMANDS)

        def get_command(
            self,
            ctx: click.Context,
            cmd_name: str,
        ) -> click.Command | None:
            if cmd_name in REMOVED:
                ctx.fail(
                    f"{cmd_name!r} is no longer a command: write {REMOVED[cmd_name]!r}"
                )
            return _load(COMMANDS[cmd_name]) if cmd_name in COMMANDS else None

        def format_commands(
            self,
            ctx: click.Context,  # noqa: ARG002
            formatter: click.HelpFormatter,
        ) -> None:
            with formatter.section("Commands"):
                formatter.write_dl([(name, COMMANDS[name].help) for name in COMMANDS])

        def shell_complete(
            self, ctx: click.Context, incomplete: str
        ) -> list[CompletionItem]:
            # Not the group's own, which would load every command.
            return [
                *(
                    CompletionItem(name, help=known.help)
                    for name, known in COMMANDS.items()
                    if name.startswith(incomplete)
                ),
                *click.Command.shell_complete(self, ctx, incomplete),
            ]

    group = Commands(
        help="Usage metering for WSGI applications.",
        epilog=exit_codes(_3="the answer is no; each command says what that means"),
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    return click.version_option(VERSION, message="%(version)s")(group)


def _load(known: Subcommand) -> click.Command:
    try:
        command: click.Command = importlib.import_module(known.module).command
    except ModuleNotFoundError as missing:
        _refuse(missing, known.extra)
    return command


def _refuse(missing: ModuleNotFoundError, extra: str) -> NoReturn:
    """End with one line that names the extra to install."""
    package = (missing.name or "").partition(".")[0]
    if package == "openmeter_wsgi":
        # Not an extra but a fault of our own, which deserves its traceback.
        raise missing
    sys.stderr.write(
        f"openmeter-wsgi: {package} is not installed; "
        f"run: pip install 'openmeter_wsgi[{extra}]'\n"
    )
    sys.exit(1)

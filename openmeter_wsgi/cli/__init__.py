"""The command line ``openmeter-wsgi``: its subcommands, each in a module of its own."""

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
    """The description of a subcommand, whose module is imported when it is called."""

    #: Module with the click command ``command``.
    module: str
    #: Extra of the package that installs its dependencies.
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
        "Send one event, or the events of a file.",
    ),
    "usage": Subcommand(
        "openmeter_wsgi.cli.usage",
        "cli",
        "Print the usage that the meters on the server have counted.",
    ),
    "ship": Subcommand(
        "openmeter_wsgi.cli.ship",
        "cli",
        "Deliver a spool to OpenMeter, as a separate process.",
    ),
    "spool": Subcommand(
        "openmeter_wsgi.cli.spool",
        "cli",
        "Show the contents of a spool, and requeue or delete its dead letters.",
    ),
    "import": Subcommand(
        "openmeter_wsgi.cli.import_zuplo",
        "cli",
        "Convert the configuration of another product to a file of options.",
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
        # Characters outside the encoding of the terminal are escaped.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        group = _group()
    except ModuleNotFoundError as missing:
        subcommand = COMMANDS.get(sys.argv[1]) if sys.argv[1:] else None
        _exit_for_extra(missing, subcommand.extra if subcommand else "cli")
    try:
        group(prog_name="openmeter-wsgi")
    except OSError as error:
        # Commands handle errors of their own files, so this is stdout. Without the
        # redirection Python would flush stdout at exit, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(f"openmeter-wsgi: the output cannot be written: {error.strerror}")


def _group() -> click.Group:
    # Imported here: without the extra, main() names what to install.
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
            # The method of click.Group would import the module of every command.
            return [
                *(
                    CompletionItem(name, help=subcommand.help)
                    for name, subcommand in COMMANDS.items()
                    if name.startswith(incomplete)
                ),
                *click.Command.shell_complete(self, ctx, incomplete),
            ]

    group = Commands(
        help="Usage metering for WSGI applications.",
        epilog=exit_codes(_3="the command found a problem; its own help says which"),
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    return click.version_option(VERSION, message="%(version)s")(group)


def _load(subcommand: Subcommand) -> click.Command:
    try:
        command: click.Command = importlib.import_module(subcommand.module).command
    except ModuleNotFoundError as missing:
        _exit_for_extra(missing, subcommand.extra)
    return command


def _exit_for_extra(missing: ModuleNotFoundError, extra: str) -> NoReturn:
    """Exit with one line that names the extra to install."""
    package = (missing.name or "").partition(".")[0]
    if package == "openmeter_wsgi":
        raise missing  # a bug of this package, shown with its traceback
    sys.stderr.write(
        f"openmeter-wsgi: {package} is not installed; "
        f"run: pip install 'openmeter_wsgi[{extra}]'\n"
    )
    sys.exit(1)

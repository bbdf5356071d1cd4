"""``openmeter-wsgi completion``: print the completion script of a shell."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from openmeter_wsgi.cli.common import EXIT_CODES

PROGRAM = "openmeter-wsgi"
#: Asks the program for what fits; click's own name for it.
VARIABLE = "_OPENMETER_WSGI_COMPLETE"


@click.command("completion", epilog=EXIT_CODES)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    """Print a script that lets SHELL complete commands and options.

    \b
    bash  eval "$(openmeter-wsgi completion bash)"       in ~/.bashrc
    zsh   eval "$(openmeter-wsgi completion zsh)"        in ~/.zshrc
    fish  openmeter-wsgi completion fish | source        in config.fish
    """
    completion = get_completion_class(shell)
    if completion is None:
        raise click.ClickException(f"click has no completion for {shell}")
    root = context.find_root().command
    click.echo(completion(root, {}, PROGRAM, VARIABLE).source())

"""``openmeter-wsgi import``: convert the configuration of another product."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import click

from openmeter_wsgi.cli.common import EXIT_CODES, printable
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.zuplo import read_policies, read_routes, to_toml, translate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from openmeter_wsgi.zuplo import ZuploPolicy


@click.group("import", epilog=EXIT_CODES)
def command() -> None:
    """Convert the configuration of another product to a file of options."""


@command.command("zuplo", epilog=EXIT_CODES)
@click.argument("policies", type=click.Path(dir_okay=False), metavar="POLICIES")
@click.option(
    "--routes",
    type=click.Path(dir_okay=False),
    multiple=True,
    metavar="FILE",
    help="A routes.oas.json. May be repeated.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write to this file, which must not exist, instead of printing.",
)
@click.option("--json", "as_json", is_flag=True, help="Write JSON instead of TOML.")
def _zuplo(
    policies: str, routes: tuple[str, ...], output: Path | None, as_json: bool
) -> None:
    """Convert Zuplo's POLICIES, a policies.json, to a file of options in TOML.

    The key is left out. References to variables are kept; their values are not read.
    """
    try:
        read = read_policies(policies, resolves=False)
        text = to_toml(translate(read, _read_routes(routes, read)))
    except ConfigError as error:
        problems = "\n  ".join(map(printable, error.problems))
        raise click.ClickException(f"{printable(policies)}\n  {problems}") from None
    if as_json:
        # JSON has no comments: they go to stderr.
        _print_comments(text)
        text = json.dumps(tomllib.loads(text), indent=2) + "\n"
    if output is None:
        click.echo(text, nl=False)
    else:
        _write(output, text)
    if left_out := [policy for policy in read if not policy.metered]:
        names = ", ".join(policy.name or policy.kind for policy in left_out)
        click.echo(printable(f"left out, as they do not meter: {names}"), err=True)


def _write(file: Path, text: str) -> None:
    try:
        with file.open("x", encoding="utf-8") as new:
            new.write(text)
    except FileExistsError:
        raise click.ClickException(f"{printable(repr(str(file)))} exists") from None
    except OSError as error:
        raise click.ClickException(
            f"{printable(repr(str(file)))}: {error.strerror}"
        ) from None


def _print_comments(text: str) -> None:
    for line in text.splitlines():
        if line.startswith("# "):
            click.echo(line.removeprefix("# "), err=True)


def _read_routes(
    files: tuple[str, ...], policies: Sequence[ZuploPolicy]
) -> dict[str, list[str]] | None:
    """Return the routes of all *files*; the first of equal rules holds."""
    if not files:
        return None
    routes: dict[str, list[str]] = {}
    for file in files:
        routes = {**read_routes(file, policies), **routes}
    return routes

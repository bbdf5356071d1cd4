"""Arguments that commands share: a spool, a policy, a server."""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from openmeter_wsgi.cli.api_client import ListingV1
from openmeter_wsgi.cli.api_client_v3 import ListingV3
from openmeter_wsgi.cli.exits import BadConfiguration
from openmeter_wsgi.cli.output import printable
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.policy import Policy
from openmeter_wsgi.spool.files import FORMAT, prepare_directory

if TYPE_CHECKING:
    from collections.abc import Callable

    from openmeter_wsgi.cli.api_client import Listing
    from openmeter_wsgi.options import ApiKey


def spool_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say which spool, and under which policy."""
    return spool_dir_option(policy_option(command))


def spool_dir_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the option that says which spool."""
    return click.option(
        "--spool-dir",
        envvar="OPENMETER_SPOOL_DIR",
        show_envvar=True,
        type=click.Path(),
        help="Directory of the spool.",
    )(command)


def policy_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the option that says which file holds the policy."""
    return click.option(
        "--config",
        "--policy",
        "policy_file",
        type=click.Path(),
        metavar="FILE",
        help="TOML or JSON file with options; OPENMETER_… variables outdo it.",
    )(command)


def server_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say which server, and under which policy."""
    url = click.option(
        "--api-url",
        metavar="URL",
        help="Address of the server, instead of OPENMETER_API_URL's.",
    )
    return policy_option(url(command))


def options_given(**options: Any) -> dict[str, Any]:
    """Return those of *options* that were given."""
    return {name: value for name, value in options.items() if value is not None}


def open_spool(
    path: str | None, *, may_be_empty: bool = False, to_write: bool = False
) -> Path:
    """Return the directory of a spool that is there; never make a directory.

    :raises ClickException: if there is none, it is not the caller's, or it is read-only
        and not only to be read.
    """
    if path is None:
        # Not by click: the help of a subcommand would not be shown without it.
        raise click.UsageError("Missing option '--spool-dir'.")
    directory = Path(os.path.abspath(path))  # not resolved: a symlink is refused
    try:
        owner = directory.lstat().st_uid
        if owner != os.geteuid():
            raise click.ClickException(
                f"{_shown(path)} belongs to {_user(owner)}, and this is run by "
                f"{_user(os.geteuid())}; run it as {_user(owner)}"
            )
        if directory.is_dir() and not _is_spool(directory, may_be_empty):
            raise click.ClickException(
                f"{_shown(path)} is no spool: it has no file {FORMAT!r}"
            )
        return prepare_directory(path, to_write=to_write)
    except OSError as error:
        raise click.ClickException(f"{_shown(path)}: {error.strerror}") from None
    except ConfigError as error:
        raise click.ClickException(_told(error)) from None


def read_policy(file: str | None, **options: Any) -> Policy:
    """Return the policy that a file, if any, and variables say.

    :raises BadConfiguration: naming everything that is wrong with it.
    """
    try:
        if file is None:
            return Policy.from_env(**options)
        return Policy.from_file(file, **options)
    except ConfigError as error:
        raise BadConfiguration(_told(error)) from None


def open_listing(
    policy: Policy, url: str | None = None, key: ApiKey | None = None
) -> Listing:
    """Return OpenMeter's lists, by the version of the API that *policy* names.

    *url* and *key* are where and as whom entitlements are asked for, if that is not
    where events are sent to.
    """
    of_version = ListingV3 if policy.api_flavor == "v3" else ListingV1
    return of_version(url or policy.api_url, key or policy.key, policy.request_timeout)


def _is_spool(directory: Path, may_be_empty: bool) -> bool:
    # A volume that no application has written to yet is waited for.
    entries = os.listdir(directory)
    return FORMAT in entries or (may_be_empty and not entries)


def _told(error: ConfigError) -> str:
    return printable("; ".join(error.problems))


def _shown(path: str) -> str:
    return printable(repr(path))


def _user(number: int) -> str:
    try:
        return f"user {pwd.getpwuid(number).pw_name}"
    except KeyError:
        return f"user {number}"

"""``manage.py openmeter_check``: ``openmeter-wsgi check`` with Django's settings."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError

from openmeter_wsgi.django.settings import check_configuration, policy_of_settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from django.core.management.base import CommandParser

    from openmeter_wsgi.cli.findings import Finding


class Command(BaseCommand):
    """Run the checks, with the settings of the project."""

    help = "Validate the configuration against the server; each problem has a remedy."
    #: Its own are part of what it reports.
    requires_system_checks: list[str] | tuple[str, ...] = ()

    def add_arguments(self, parser: CommandParser) -> None:
        """Add the options of ``openmeter-wsgi check``."""
        parser.add_argument(
            "--no-dedupe-check",
            action="store_true",
            help="Do not send an event twice to see whether OpenMeter drops one.",
        )
        parser.add_argument("--json", action="store_true", help="Print JSON.")

    def handle(self, *_: Any, **options: Any) -> None:
        """Look, and end as ``openmeter-wsgi check`` does."""
        try:
            from openmeter_wsgi.cli.check import FrameworkProject, command
        except ModuleNotFoundError as missing:
            raise CommandError(
                f"{missing.name} is not installed; run: "
                "pip install 'openmeter_wsgi[django]'"
            ) from None
        given = [
            flag
            for flag in ("--no-dedupe-check", "--json")
            if options[flag[2:].replace("-", "_")]
        ]
        named = settings.WSGI_APPLICATION
        project = FrameworkProject(
            policy_of_settings,
            _findings,
            ":".join(named.rsplit(".", 1)) if named else None,
        )
        code = command.main(given, standalone_mode=False, obj=project)
        if code:
            sys.exit(code)


def _findings() -> Iterator[Finding]:
    """Yield the findings of Django's system check."""
    from openmeter_wsgi.cli.findings import failure, warning

    for message in check_configuration():
        finding = failure if message.is_serious() else warning
        yield finding("settings", message.msg, message.hint or "")

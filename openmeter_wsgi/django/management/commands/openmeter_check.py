"""``manage.py openmeter_check``: ``openmeter-wsgi check`` with Django's settings."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError

from openmeter_wsgi.django.settings import check_configuration, policy_of_settings
from openmeter_wsgi.django.view_checks import WRONG_FEATURES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from django.core.management.base import CommandParser

    from openmeter_wsgi.cli.findings import Finding


class Command(BaseCommand):
    """The command ``openmeter_check``, which checks the settings of the project."""

    help = "Validate the configuration against the server; each problem has a remedy."
    #: No system checks run before the command, which reports those of this package.
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
        """Run the checks, and exit as ``openmeter-wsgi check`` does."""
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
        if message.is_silenced():
            continue
        if message.id == WRONG_FEATURES and settings.WSGI_APPLICATION:
            continue  # the check of the application's views has the same finding
        finding = failure if message.is_serious() else warning
        yield finding("settings", message.msg, message.hint or "")

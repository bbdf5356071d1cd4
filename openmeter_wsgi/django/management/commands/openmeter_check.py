"""``manage.py openmeter_check``: ``openmeter-wsgi check`` with Django's settings."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from django.core.management.base import BaseCommand, CommandError

from openmeter_wsgi.django.settings import policy_of_settings

if TYPE_CHECKING:
    from django.core.management.base import CommandParser


class Command(BaseCommand):
    """Run the checks, with the settings of the project."""

    help = "Say whether usage would be billed, and right; and what to do if not."
    #: Its own are part of what it reports.
    requires_system_checks = ()

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
            from openmeter_wsgi.cli.check import command
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
        code = command.main(given, standalone_mode=False, obj=policy_of_settings)
        if code:
            sys.exit(code)

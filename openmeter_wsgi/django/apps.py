"""The Django application for ``INSTALLED_APPS``: system checks and a command."""

from __future__ import annotations

from django.apps import AppConfig
from django.core import checks

from openmeter_wsgi.django.settings import check_configuration


class OpenMeterConfig(AppConfig):
    """The application that adds ``openmeter_check`` and our checks to ``manage.py``."""

    name = "openmeter_wsgi.django"
    label = "openmeter"
    verbose_name: str = "OpenMeter"

    def ready(self) -> None:
        """Register the checks."""
        checks.register(check_configuration, "openmeter")

"""The Django application for ``INSTALLED_APPS``: system checks and a command."""

from __future__ import annotations

from django.apps import AppConfig
from django.core import checks


class OpenMeterConfig(AppConfig):
    """Brings ``manage.py openmeter_check``, and has ``manage.py check`` look."""

    name = "openmeter_wsgi.django"
    label = "openmeter"
    verbose_name: str = "OpenMeter"

    def ready(self) -> None:
        """Register the checks."""
        # Not at the top: there are settings only now.
        from openmeter_wsgi.django.settings import check_configuration

        checks.register(check_configuration, "openmeter")

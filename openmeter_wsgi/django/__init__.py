"""Metering for Django: `get_wsgi_application` for ``wsgi.py``, and `ViewMiddleware`."""

from openmeter_wsgi.errors import missing_extra

try:
    import django  # noqa: F401
except ModuleNotFoundError as _missing:
    raise missing_extra(_missing, "django") from None

from openmeter_wsgi.django.settings import get_wsgi_application as get_wsgi_application
from openmeter_wsgi.django.view_middleware import ViewMiddleware as ViewMiddleware
from openmeter_wsgi.django.view_middleware import subject_from as subject_from

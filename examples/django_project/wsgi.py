"""WSGI application for servers: Django with the middleware of the settings."""

import os

from openmeter_wsgi.django import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "settings")
application = get_wsgi_application()

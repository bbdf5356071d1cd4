"""Settings of an API that sends its usage to OpenMeter.

With a local sandbox instead of OpenMeter::

    openmeter-wsgi sandbox &
    export OPENMETER_API_URL=http://127.0.0.1:8888
    python manage.py migrate
    python manage.py create_customer acme
    gunicorn wsgi
    curl -H 'Authorization: Token …' http://127.0.0.1:8000/products/

With OpenMeter Cloud: set ``OPENMETER_API_KEY`` instead of the address.
"""

import os
from pathlib import Path

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ.get("DATABASE", Path(__file__).parent / "db.sqlite3"),
    }
}
SECRET_KEY = os.environ.get("SECRET_KEY", "not-secret-for-it-is-an-example")
ALLOWED_HOSTS = ["127.0.0.1", "localhost"]
ROOT_URLCONF = "urls"
WSGI_APPLICATION = "wsgi.application"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "rest_framework",
    "rest_framework.authtoken",
    "openmeter_wsgi.django",
    "shop",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "openmeter_wsgi.django.ViewMiddleware",
]
REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": [
        "rest_framework.authentication.TokenAuthentication",
        "rest_framework.authentication.SessionAuthentication",
    ],
    "DEFAULT_PERMISSION_CLASSES": [
        "rest_framework.permissions.IsAuthenticated",
        "openmeter_wsgi.django.rest_framework.HasEntitlements",
    ],
    "DEFAULT_THROTTLE_RATES": {"reports": "2/min"},
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
}

# OPENMETER_API_KEY and OPENMETER_API_URL set the key and the address of OpenMeter.
OPENMETER = {
    "meter": {"type": "api-request", "data": {"region": "eu"}},
    "subject": "request.user.username",
    "event_source": "django-example",
}

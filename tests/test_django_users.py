"""Users that a view logs out or deletes are billed for it; routes in languages."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import flask
import flask_login  # type: ignore[import-untyped]
import pytest

from openmeter_wsgi.flask import OpenMeter as Extension
from openmeter_wsgi.testing import OpenMeter

if TYPE_CHECKING:
    from typing import Any

#: A site with users and sessions in a database, served in a process of its own.
SITE = """
import json, os
from django.conf import settings
settings.configure(
    SECRET_KEY="tests", ROOT_URLCONF="__main__", ALLOWED_HOSTS=["*"], USE_TZ=True,
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth",
                    "django.contrib.sessions", "openmeter_wsgi.django"],
    MIDDLEWARE=["django.contrib.sessions.middleware.SessionMiddleware",
                "django.contrib.auth.middleware.AuthenticationMiddleware",
                "openmeter_wsgi.django.ViewMiddleware"],
    DEFAULT_AUTO_FIELD="django.db.models.AutoField",
    OPENMETER={"meters": {"r": 1}, "dry_run": True, **json.loads(os.environ["MORE"])},
)
import django
django.setup()
from django.contrib import auth
from django.core.management import call_command
from django.http import HttpResponse
from django.test import Client
from django.urls import path
from werkzeug.test import Client as Browser
from openmeter_wsgi.django import get_wsgi_application
from openmeter_wsgi.testing import OpenMeter

User = auth.get_user_model()

def log_out(request):
    auth.logout(request)
    return HttpResponse("bye")

def delete(request):
    request.user.delete()
    return HttpResponse("gone")

def delete_all(request):
    User.objects.filter(username=request.user.username).delete()
    auth.logout(request)
    return HttpResponse("gone")

def delete_other(request):
    User.objects.get(username="other").delete()
    return HttpResponse("gone")

def log_in(request):
    auth.login(request, User.objects.get(username="second"))
    return HttpResponse("hello")

def public(request):
    return HttpResponse("public")

def public_404(request):
    return HttpResponse("no", status=404)

views = [log_out, delete, delete_all, delete_other, log_in, public, public_404]
urlpatterns = [path(view.__name__, view) for view in views]
call_command("migrate", verbosity=0)
application = get_wsgi_application()
billed = {}
for view in views:
    for name in ("first", "second", "other"):
        User.objects.get_or_create(username=name)
    user = User.objects.get(username="first")
    client = Client()
    client.force_login(user)
    browser = Browser(application)
    browser.set_cookie("sessionid", client.cookies["sessionid"].value)
    names = {str(each.pk): each.username for each in User.objects.all()}
    with OpenMeter() as openmeter:
        response = browser.get("/" + view.__name__)
        response.close()
        found = [names.get(e.subject, e.subject) for e in openmeter.events]
        billed[view.__name__] = [found, response.headers.get("Vary")]
print(json.dumps(billed))
"""


@pytest.mark.parametrize("subject", [None, "request.user.username"])
def test_a_view_that_logs_out_or_deletes_its_user_is_billed_to_it(
    subject: str | None,
) -> None:
    more = json.dumps({"subject": subject} if subject else {})

    done = subprocess.run(
        [sys.executable, "-c", SITE],
        env={"MORE": more, "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    billed = json.loads(done.stdout)
    assert {name: found for name, (found, _) in billed.items()} == {
        "log_out": ["first"],
        "delete": ["first"],
        "delete_all": ["first"],
        "delete_other": ["first"],
        "log_in": ["second"],
        "public": ["first"],
        "public_404": [],
    }
    # The subject is read when the headers are made, so no "Vary" is added for it.
    assert billed["public"][1] is billed["public_404"][1] is None


class User(flask_login.UserMixin):  # type: ignore[misc]
    def __init__(self, name: str) -> None:
        self.id = name


@pytest.mark.parametrize("subject", [None, "current_user.id"])
def test_a_view_of_flask_that_logs_out_is_billed_to_its_user(
    subject: str | None,
) -> None:
    app = flask.Flask(__name__)
    app.secret_key = "tests"
    Extension(
        app, meters={"r": 1}, dry_run=True, **({"subject": subject} if subject else {})
    )
    manager = flask_login.LoginManager(app)
    manager.user_loader(User)

    @app.get("/in/<name>")
    def log_in(name: str) -> str:
        flask_login.login_user(User(name))
        return "in"

    @app.get("/out")
    def log_out() -> str:
        flask_login.logout_user()
        return "out"

    client = app.test_client()
    with OpenMeter() as openmeter:
        for path in ("/in/acme", "/out", "/out"):
            client.get(path).close()
        subjects: list[Any] = [event.subject for event in openmeter.events]

    assert subjects == ["acme", "acme"]  # the third is nobody's


#: A site whose routes have a prefix for each language, and names in each.
LANGUAGES = """
import json, os
from django.conf import settings
settings.configure(
    SECRET_KEY="tests", ROOT_URLCONF="__main__", ALLOWED_HOSTS=["*"],
    LANGUAGE_CODE="en", LANGUAGES=[("en", "English"), ("de", "Deutsch")],
    MIDDLEWARE=["django.middleware.locale.LocaleMiddleware",
                "openmeter_wsgi.django.ViewMiddleware"],
    OPENMETER={"meter": {"type": "r", "data": {"route": "$request.route"}},
               "subject": lambda environ: "acme", "dry_run": True},
)
import django
django.setup()
from django.conf.urls.i18n import i18n_patterns
from django.http import HttpResponse
from django.urls import include, path, re_path
from django.utils.functional import lazystr
from django.utils.translation import get_language
from werkzeug.test import Client as Browser
from openmeter_wsgi.django import get_wsgi_application
from openmeter_wsgi.testing import OpenMeter

class Named:
    def __str__(self):
        return {"de": "ueber/"}.get(get_language(), "about/")

def view(request, **_):
    return HttpResponse("x")

more = [re_path("^old/(?P<year>[0-9]+)/$", view), path("<int:pk>/", view)]
urlpatterns = [
    path("plain/", view),
    *i18n_patterns(
        path("users/", include(more)), path(lazystr(Named()), view),
        prefix_default_language=bool(int(os.environ["PREFIX"])),
    ),
]
browser = Browser(get_wsgi_application())
with OpenMeter() as openmeter:
    for url in json.loads(os.environ["URLS"]):
        browser.get(url).close()
    print(json.dumps([event.data["route"] for event in openmeter.events]))
"""


@pytest.mark.parametrize("prefix", ["", "/en"])
def test_a_route_has_one_name_in_all_languages(prefix: str) -> None:
    urls = [
        f"{prefix}/users/7/", "/de/users/7/", f"{prefix}/about/", "/de/ueber/",
        f"{prefix}/users/old/1999/", "/de/users/old/1999/", "/plain/",
    ]  # fmt: skip

    done = subprocess.run(
        [sys.executable, "-c", LANGUAGES],
        env={"PREFIX": "1" if prefix else "0", "URLS": json.dumps(urls), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        "/users/<int:pk>/", "/users/<int:pk>/", "/about/", "/about/",
        "/users/old/<year>/", "/users/old/<year>/", "/plain/",
    ]  # fmt: skip

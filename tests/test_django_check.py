"""The checks of a Django project look at its views, of the REST framework too."""

import importlib
import json
import subprocess
import sys

import django
import pytest
from click.testing import CliRunner
from django.conf import settings
from django.core.management import call_command
from django.test import override_settings

from openmeter_wsgi.cli.check import command
from openmeter_wsgi.django.settings import check_configuration

VIEW_MIDDLEWARE = "openmeter_wsgi.django.ViewMiddleware"

if not settings.configured:
    settings.configure(SECRET_KEY="example", ROOT_URLCONF=())
django.setup()
views = importlib.import_module("django_views")
urls = views.urls


@pytest.fixture
def check(sandbox):
    """Return a function that checks the views of *urls*."""

    def check(urls, openmeter_settings=None, **more):
        said = {
            "MIDDLEWARE": [VIEW_MIDDLEWARE],
            "INSTALLED_APPS": ["rest_framework"],
            "ROOT_URLCONF": urls,
            "OPENMETER": {"api_url": sandbox.url, **(openmeter_settings or {})},
            "LOGGING_CONFIG": None,
            **more,
        }
        with override_settings(**said):
            result = CliRunner().invoke(
                command,
                ["--json", "--no-dedupe-check", "--app", "django_views:application()"],
            )
        assert result.stderr == ""
        findings = json.loads(result.stdout)["findings"]
        told = [(one["name"], one["found"]) for one in findings]
        assert len(set(told)) == len(told), "something is told twice"
        return {one["name"]: one for one in findings}

    return check


def test_the_types_of_decorated_views_are_looked_for(check):
    found = check(views.Urls)

    types = {name for name in found if name.startswith("meter ")}
    assert types == {
        "meter 'of_list'", "meter 'of_create'", "meter 'of_action'",
        "meter 'of_reversed_action'", "meter 'of_function'",
        "meter 'of_function_above'", "meter 'of_post'", "meter 'of_method'",
        "meter 'of_class'",
    }  # fmt: skip
    assert {found[name]["severity"] for name in types} == {"failure"}


def test_the_features_of_decorated_views_are_looked_for(check, sandbox):
    sandbox.grant("acme", "create_books")
    sandbox.grant("acme", "unused")

    found = check(views.Urls)

    assert found["feature 'functions'"]["severity"] == "failure"
    assert found["feature 'create_books'"]["severity"] == "ok"
    assert found["other features"]["found"] == "required by no policy: 'unused'"


def test_the_features_that_a_view_class_names_are_looked_for(check, sandbox):
    found = check(urls(reports=views.Reports))

    assert found["feature 'reports'"]["severity"] == "failure"


@pytest.mark.parametrize(
    ("view", "said"),
    [
        (
            views.Misspelt,
            "OpenMeter takes no feature key like 'Create-Books' (expected a-z",
        ),
        (views.AsText, "expected a list of feature keys, got 'reports'"),
    ],
)
def test_features_that_openmeter_cannot_have_are_a_failure(check, view, said):
    found = check(urls(books=view))

    of_class = found[f"view '{view.__qualname__}'"]
    assert of_class["severity"] == "failure"
    assert of_class["found"].startswith(f"required_entitlements: {said}")
    assert of_class["remedy"].startswith("correct its required_entitlements")


def test_a_decorator_of_an_action_that_contradicts_the_policy_is_a_failure(check):
    found = check(urls(books=views.Misspelt))

    assert "reserve: 'tokens' is not in" in found["view 'Misspelt.list'"]["found"]


def test_actions_that_answer_202_and_bill_a_flat_price_are_warned_of(check):
    found = check(views.Accepting, {"meters": {"videos": 1}})

    assert {name for name in found if name.startswith("accepted work")} == {
        "accepted work of '/^videos/$'", "accepted work of '/function'",
        "accepted work of '/class'",
    }  # fmt: skip


# -- Django's own command, `check`


@pytest.mark.parametrize(
    ("view", "ids"),
    [
        (views.Reports, []), (views.Combined, []), (views.Own, []),
        (views.Varying, []), (views.Computed, []), (views.Books, []),
        (views.Misspelt, ["openmeter.E004"]), (views.AsText, ["openmeter.E004"]),
        (views.Unchecked, ["openmeter.W004"]), (views.Useless, ["openmeter.W005"]),
    ],
)  # fmt: skip
def test_djangos_check_looks_at_the_features_of_views(view, ids):
    found = messages(urls(view=view))

    assert [message.id for message in found] == ids
    assert all(f"django_views.{view.__name__}: " in message.msg for message in found)
    assert all(message.hint for message in found)


def messages(urlconf, **options):
    with override_settings(
        MIDDLEWARE=[VIEW_MIDDLEWARE],
        INSTALLED_APPS=["rest_framework"],
        ROOT_URLCONF=urlconf,
        OPENMETER={"api_key": "om_x", **options},
    ):
        return check_configuration()


def test_a_permission_without_features_of_its_own_checks_those_of_the_settings():
    found = messages(urls(view=views.Useless), required_entitlements=["searches"])

    assert [message.id for message in found] == ["openmeter.W001"]


@pytest.mark.parametrize(
    ("view", "ids"), [("Reports", []), ("Books", ["openmeter.W005"])]
)
def test_a_permission_of_all_views_needs_features_in_one_of_them(
    monkeypatch, view, ids
):
    usual = [views.HasEntitlements]
    for cls in (views.APIView, views.ViewSet):
        monkeypatch.setattr(cls, "permission_classes", usual)

    found = messages(urls(view=getattr(views, view), other=views.Dispatched))

    assert [message.id for message in found] == ids
    assert all("DEFAULT_PERMISSION_CLASSES" in message.msg for message in found)


def test_urls_that_cannot_be_imported_are_left_to_djangos_own_check():
    assert messages("no_such_module") == []


def test_openmeter_check_leaves_out_what_the_project_silences(sandbox, capsys):
    with (
        override_settings(
            MIDDLEWARE=[VIEW_MIDDLEWARE],
            INSTALLED_APPS=["rest_framework", "openmeter_wsgi.django"],
            ROOT_URLCONF=urls(books=views.Useless, reports=views.Unchecked),
            OPENMETER={"api_url": sandbox.url},
            SILENCED_SYSTEM_CHECKS=["openmeter.W004"],
            WSGI_APPLICATION=None,
        ),
    ):
        call_command("openmeter_check", "--json", "--no-dedupe-check")

    findings = json.loads(capsys.readouterr().out)["findings"]
    (found,) = [one["found"] for one in findings if one["name"] == "settings"]
    assert found.startswith("django_views.Useless: HasEntitlements checks nothing")


@pytest.mark.parametrize("wsgi", ["django_views.application()", None])
def test_openmeter_check_tells_wrong_features_once(sandbox, capsys, wsgi):
    with (
        override_settings(
            MIDDLEWARE=[VIEW_MIDDLEWARE],
            INSTALLED_APPS=["rest_framework", "openmeter_wsgi.django"],
            ROOT_URLCONF=urls(books=views.AsText),
            OPENMETER={"api_url": sandbox.url},
            WSGI_APPLICATION=wsgi,
        ),
        pytest.raises(SystemExit),
    ):
        call_command("openmeter_check", "--json", "--no-dedupe-check")

    findings = json.loads(capsys.readouterr().out)["findings"]
    wrong = [one for one in findings if "got 'reports'" in one["found"]]
    assert [one["severity"] for one in wrong] == ["failure"]


PROJECT = """
import json, sys
from django.conf import settings
settings.configure(
    INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth", "shop",
                    "openmeter_wsgi.django"],
    MIDDLEWARE=["openmeter_wsgi.django.ViewMiddleware"], AUTH_USER_MODEL="shop.Person",
    DEFAULT_AUTO_FIELD="django.db.models.AutoField",
    OPENMETER={"dry_run": True, **json.loads(sys.argv[1])},
)
import django
django.setup()
from openmeter_wsgi.django.settings import check_configuration
print(json.dumps([[one.id, one.msg] for one in check_configuration()]))
"""
#: Users with an organization, a profile, claims and a property.
MODELS = """
from django.contrib.auth.models import AbstractBaseUser
from django.db import models

class Organization(models.Model):
    slug = models.SlugField()

class Person(AbstractBaseUser):
    USERNAME_FIELD = "email"
    email = models.EmailField(unique=True)
    org = models.ForeignKey(Organization, models.CASCADE)
    claims = models.JSONField()
    @property
    def customer(self):
        return self

class Profile(models.Model):
    person = models.OneToOneField(Person, models.CASCADE, related_name="profile")
    plan = models.SlugField()
"""


@pytest.fixture
def subject_problems(tmp_path):
    """Return a function that checks a project with these models and some options."""
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "__init__.py").touch()
    (tmp_path / "shop" / "models.py").write_text(MODELS)

    def check(options):
        done = subprocess.run(
            [sys.executable, "-c", PROJECT, json.dumps(options)],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return check


def test_a_path_of_subjects_that_users_lack_is_a_warning(subject_problems):
    paths = {
        "request.user.pk": None, "request.user.org.slug": None,
        "request.user.org_id": None, "request.user.claims.sub": None,
        "request.user.customer.anything": None, "request.user.profile.plan": None,
        "request.auth.sub": None, "request.user": None,
        "request.user.organization.slug": "Person has no attribute 'organization'",
        "request.user.org.slugg": "Organization has no attribute 'slugg'",
        "request.user.profile.plam": "Profile has no attribute 'plam'",
    }  # fmt: skip
    routes = {f"/{n}": {"subject": path} for n, path in enumerate(paths)}

    found = subject_problems({"routes": routes, "subject": "request.user.slug"})

    expected = {path: said for path, said in paths.items() if said}
    expected["request.user.slug"] = "Person has no attribute 'slug'"
    assert {id_ for id_, _ in found} == {"openmeter.W006"}
    assert [text for _, text in found] == [
        f"subject: {path!r}: the model {expected[path]}; unless something else sets "
        "it, requests have no subject and are not billed"
        for path in sorted(expected)
    ]

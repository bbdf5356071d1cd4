"""The checks of a Django project look at its views, of the REST framework too."""

import importlib
import json

import django
import pytest
from click.testing import CliRunner
from django.conf import settings
from django.test import override_settings

from openmeter_wsgi.cli.check import command

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
    assert of_class["remedy"].startswith("mend its required_entitlements")


def test_a_decorator_of_an_action_that_contradicts_the_policy_is_a_failure(check):
    found = check(urls(books=views.Misspelt))

    assert "reserve: 'tokens' is not in" in found["view 'Misspelt.list'"]["found"]


def test_actions_that_answer_202_and_bill_a_flat_price_are_warned_of(check):
    found = check(views.Accepting, {"meters": {"videos": 1}})

    assert {name for name in found if name.startswith("accepted work")} == {
        "accepted work of '/^videos/$'", "accepted work of '/function'",
        "accepted work of '/class'",
    }  # fmt: skip

"""Bills of the example projects and applications, on real servers."""

import json
import subprocess
import sys

import pytest

from openmeter_wsgi.sandbox import Sandbox
from served_examples import PAGE, ROOT, ServedExample
from servers import GUNICORN, TIMEOUT, WAITRESS, environment

DJANGO = ROOT / "examples" / "django_project"
REQUEST = ("api-request", {"region": "eu"})
ONE_WORKER = [*GUNICORN, "--worker-class", "gthread", "--threads", "2"]


def of(subject, *usage):
    return sorted(((subject, *each) for each in usage), key=repr)


# -- Flask


@pytest.fixture
def flask_project(tmp_path):
    app = "examples.flask_project:create_app()"
    with ServedExample(ONE_WORKER, app, tmp_path, path=ROOT) as served:
        yield served


def by_bearer(token):
    return {"headers": {"Authorization": f"Bearer {token}"}}


def test_the_flask_project_bills_the_company_of_whoever_calls(flask_project):
    question = {"prompt": "why is it so", "max_tokens": 7}
    acme = by_bearer("acme-token")

    assert flask_project.get("/v1/products", **acme).json() == [
        "anvil",
        "rocket skates",
    ]
    assert flask_project.get("/v1/products/7", **acme).status_code == 404
    assert flask_project.get("/v1/products").status_code == 401
    assert flask_project.get("/health").text == "ok"
    assert flask_project.request("POST", "/v1/chat", json=question, **acme).ok
    assert flask_project.get("/v1/export/3", **acme).content == PAGE * 3

    tokens = [
        ("tokens", {"kind": "prompt", "tokens": 4}),
        ("tokens", {"kind": "completion", "tokens": 7}),
    ]
    assert flask_project.billed() == of(
        "acme", REQUEST, REQUEST, *tokens, REQUEST, ("credits", {"total": 3})
    )


def test_the_flask_project_bills_a_session_like_a_token(flask_project):
    person = {"name": "hank", "token": "globex-token"}

    assert flask_project.request("POST", "/login", data=person).ok
    assert flask_project.get("/v1/products/0").json() == {"name": "anvil"}

    assert flask_project.billed() == of("globex", REQUEST)


def test_the_flask_project_lets_in_whose_plan_has_the_feature(flask_project):
    flask_project.sandbox.grant("acme", "reports")
    flask_project.sandbox.grant("globex", "anything")

    allowed = flask_project.get("/v1/reports", **by_bearer("acme-token"))
    denied = flask_project.get("/v1/reports", **by_bearer("globex-token"))

    assert allowed.json() == {"report": "all is well"}
    assert (denied.status_code, denied.json()["reason"]) == (403, "no_access")
    assert denied.headers["Content-Type"] == "application/problem+json"
    assert flask_project.billed() == of("acme", ("reports", {"total": 1}))


# -- Django


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """The database of a project with two customers, and their tokens."""
    path = tmp_path_factory.mktemp("django") / "db.sqlite3"
    manage(path, "migrate", "--verbosity", "0")
    tokens = {
        name: manage(path, "create_customer", name).stdout.strip()
        for name in ("acme", "globex")
    }
    return path, tokens


def manage(database, *arguments, check=True, **variables):
    """Run a command of the Django project."""
    return subprocess.run(
        [sys.executable, "manage.py", *arguments],
        cwd=DJANGO,
        env=environment(DATABASE=str(database), **{**OPENMETER, **variables}),
        capture_output=True,
        text=True,
        check=check,
        timeout=TIMEOUT,
    )


#: Nothing listens there.
OPENMETER = {"OPENMETER_API_URL": "http://127.0.0.1:9"}


@pytest.fixture
def django_project(database, tmp_path):
    path, _ = database
    with ServedExample(
        WAITRESS, "wsgi:application", tmp_path, path=DJANGO, DATABASE=str(path)
    ) as served:
        yield served


@pytest.fixture
def by_token(database):
    _, tokens = database
    return lambda name: {"headers": {"Authorization": f"Token {tokens[name]}"}}


def test_the_django_project_bills_the_user_of_a_token(django_project, by_token):
    question = {"prompt": "why is it so", "max_tokens": 7}
    acme = by_token("acme")

    assert django_project.get("/products/1/", **acme).json() == {"name": "anvil"}
    assert django_project.get("/products/7/", **acme).status_code == 404
    assert django_project.get("/products/").status_code == 401
    assert django_project.get("/health/").text == "ok"
    assert django_project.request("POST", "/chat/", json=question, **acme).ok
    assert django_project.get("/export/3/", **acme).content == PAGE * 3

    tokens = [
        ("tokens", {"kind": "prompt", "tokens": 4}),
        ("tokens", {"kind": "completion", "tokens": 7}),
    ]
    assert django_project.billed() == of(
        "acme", REQUEST, REQUEST, *tokens, REQUEST, ("credits", {"total": 3})
    )


def test_the_django_project_lets_in_whose_plan_has_the_feature(
    django_project, by_token
):
    django_project.sandbox.grant("acme", "reports")
    django_project.sandbox.grant("globex", "anything")

    allowed = [django_project.get("/reports/", **by_token("acme")) for _ in range(3)]
    denied = django_project.get("/reports/", **by_token("globex"))

    assert [response.status_code for response in allowed] == [200, 200, 429]
    assert allowed[2].headers["Content-Type"] == "application/json"  # it is throttled
    assert (denied.status_code, denied.json()["reason"]) == (403, "no_access")
    assert denied.headers["Content-Type"] == "application/problem+json"
    reports = ("reports", {"total": 1})
    assert django_project.billed() == of("acme", REQUEST, REQUEST, reports, reports)


def test_djangos_check_reports_every_problem(database):
    path, _ = database
    wrong = {"OPENMETER_EVENT_SOURCE": "x", "OPENMETER_SUBJECT_PATH": "a..b"}

    right = manage(path, "check")
    found = manage(path, "check", check=False, OPENMETER_API_URL="ftp://x", **wrong)

    assert "no issues" in right.stdout
    assert found.returncode == 1
    assert "(openmeter.E001) api_url: expected a URL such as" in found.stderr
    assert "(openmeter.E001) subject_path: expected a path" in found.stderr


def test_djangos_own_commands_need_no_key(tmp_path):
    path = tmp_path / "db.sqlite3"
    cloud = {"OPENMETER_API_URL": "https://openmeter.cloud"}
    person = {
        "DJANGO_SUPERUSER_PASSWORD": "secret",
        "DJANGO_SUPERUSER_EMAIL": "wile@example.com",
    }
    named = ("createsuperuser", "--noinput", "--username", "wile")

    migrated = manage(path, "migrate", "--verbosity", "0", **cloud)
    created = manage(path, *named, **cloud, **person)
    checked = manage(path, "check", **cloud)
    loaded = manage(path, "shell", "-c", "import wsgi", check=False, **cloud)

    assert "(openmeter.W002) api_key: expected a key" in migrated.stderr
    assert "Superuser created" in created.stdout
    assert "(openmeter.W002)" in checked.stderr
    assert "ConfigError: api_key: expected a key" in loaded.stderr


def test_djangos_openmeter_check_says_whether_usage_would_be_billed(database):
    path, _ = database

    found = manage(path, "openmeter_check", check=False)
    wrong = manage(path, "openmeter_check", check=False, OPENMETER_API_URL="ftp://x")

    assert (found.returncode, found.stderr) == (3, "")
    assert "127.0.0.1:9" in found.stdout
    assert wrong.returncode == 2
    assert "api_url: expected a URL" in wrong.stdout


def test_djangos_openmeter_check_looks_at_what_the_settings_meter(database):
    path, _ = database
    with Sandbox() as sandbox:
        variables = {"OPENMETER_API_URL": sandbox.url}
        flags = ("--json", "--no-dedupe-check")
        said = manage(path, "openmeter_check", *flags, check=False, **variables).stdout

    found = {each["name"]: each["severity"] for each in json.loads(said)["findings"]}
    assert found["server"] == "ok"
    assert found["meter 'api-request'"] == "failure"  # the sandbox has no meter
    assert "deduplication" not in found


@pytest.mark.parametrize(
    ("settings", "name", "said"),
    [
        (
            "WSGI_APPLICATION = 'own_wsgi.application'",
            "application",
            "own_wsgi:application is not wrapped in OpenMeterMiddleware",
        ),
        (
            "WSGI_APPLICATION = None; ASGI_APPLICATION = 'asgi.application'",
            "settings",
            "ASGI_APPLICATION: requests that asgi.application serves are not metered",
        ),
    ],
)
def test_djangos_openmeter_check_looks_at_what_is_served(
    database, tmp_path, settings, name, said
):
    path, _ = database
    (tmp_path / "own_settings.py").write_text(f"from settings import *\n{settings}\n")
    (tmp_path / "own_wsgi.py").write_text(
        "from django.core.wsgi import get_wsgi_application\n"
        "application = get_wsgi_application()\n"
    )
    own = {"DJANGO_SETTINGS_MODULE": "own_settings", "PYTHONPATH": str(tmp_path)}

    result = manage(path, "openmeter_check", "--json", check=False, **own)

    assert result.returncode == 3
    found = {each["name"]: each for each in json.loads(result.stdout)["findings"]}
    assert found[name]["severity"] == "failure"
    assert found[name]["found"].startswith(said)
    assert "wsgi.py" in found[name]["remedy"]


# -- Other frameworks

APPS = {
    "bottle": ("/products/<name>", "/export/<pages:int>"),
    "falcon": ("/products/{name}", "/export/{pages:int}"),
    "pyramid": ("/products/{name}", "/export/{pages}"),
}


@pytest.mark.parametrize("framework", APPS)
def test_an_application_bills_who_called_which_route(framework, tmp_path):
    app = f"examples.{framework}_app:app"
    acme = {"headers": {"X-API-Key": "acme-key"}}
    with ServedExample(WAITRESS, app, tmp_path) as served:
        assert served.get("/products/anvil", **acme).json() == {"name": "anvil"}
        assert served.get("/products/moon", **acme).status_code == 404
        assert served.get("/products/anvil").status_code == 401
        assert served.get("/export/3", **acme).content == PAGE * 3
        denied = served.get("/report", **acme)
        billed = served.billed()

    assert (denied.status_code, denied.json()["feature"]) == (403, "reports")
    product, export = ({"route": route} for route in APPS[framework])
    assert billed == of(
        "acme",
        ("api-request", product),
        ("api-request", export),
        ("credits", {"total": 3}),
    )


def test_an_application_without_a_framework_bills_what_it_sent(tmp_path):
    acme = {"headers": {"X-Customer": "acme"}}
    with ServedExample(WAITRESS, "examples.bare_wsgi:app", tmp_path) as served:
        assert served.get("/products", **acme).text == "anvil\nrocket skates\n"
        assert served.get("/nowhere", **acme).status_code == 404
        billed = served.billed()

    assert billed == of(
        "acme", ("api_requests", {"total": 1}), ("credits", {"total": 2})
    )

"""Times of imports: few modules with the package, all others before a request."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import requests

import openmeter_wsgi
from openmeter_wsgi.sandbox import Sandbox
from servers import TIMEOUT, environment

if TYPE_CHECKING:
    from collections.abc import Iterator

FEATURE = "searches"

#: Modules that are large or slow to import: see docs/performance.md.
LATER = {
    "difflib", "jsonpath", "redis", "sqlite3", "tomllib", "werkzeug.routing", "xml",
    "openmeter_wsgi.delivery", "openmeter_wsgi.quota", "openmeter_wsgi.options",
    "openmeter_wsgi.bodies.llm", "openmeter_wsgi.bodies.multi_status",
}  # fmt: skip


def run(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", code, *arguments],
        env=environment(), capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- With the package


def loaded_by(code: str) -> set[str]:
    return set(run(f"import sys\n{code}\nprint(*sys.modules)").split())


@pytest.mark.parametrize("module", ["openmeter_wsgi", "openmeter_wsgi.pytest_plugin"])
def test_the_package_and_its_plugin_import_nothing(module: str) -> None:
    own = {
        "openmeter_wsgi", "openmeter_wsgi.version", "openmeter_wsgi.pytest_plugin",
    }  # fmt: skip
    added = loaded_by(f"import pytest, {module}") - loaded_by("import pytest")

    assert added <= own


@pytest.mark.parametrize("name", ["OpenMeterMiddleware", "set_meters", "Decision"])
def test_the_first_name_imports_all_that_a_handler_calls_and_no_more(name: str) -> None:
    loaded = loaded_by(f"from openmeter_wsgi import {name}")

    assert "openmeter_wsgi.middleware" in loaded
    assert not LATER & loaded


def test_a_middleware_in_memory_imports_nothing_of_spool_routes_and_bodies() -> None:
    loaded = set(
        run(
            "import sys\n"
            "from openmeter_wsgi import OpenMeterMiddleware\n"
            "OpenMeterMiddleware(print, meters={'requests': 1}, api_key='om_made_up')\n"
            "print(*sys.modules)"
        ).split()
    )

    assert "openmeter_wsgi.delivery.queue" in loaded
    assert not [name for name in loaded if name.startswith("openmeter_wsgi.spool")]
    assert not loaded & {
        "openmeter_wsgi.spool", "openmeter_wsgi.bodies.llm",
        "werkzeug.routing", "difflib", "tomllib", "xml.parsers.expat", "redis",
    }  # fmt: skip


def test_names_that_come_late_are_there_like_all_others() -> None:
    code = """
import openmeter_wsgi
for name in dir(openmeter_wsgi):
    getattr(openmeter_wsgi, name)
from openmeter_wsgi import Policy, Stats, StatusCodes, meter, no_meter
assert Policy is openmeter_wsgi.Policy
print(Policy.__name__, Stats.__name__, StatusCodes.__name__, meter.__name__,
      no_meter.__name__, end="")
"""

    assert run(code) == "Policy Stats StatusCodes meter no_meter"
    assert {"Policy", "Stats", "StatusCodes", "meter"} <= set(dir(openmeter_wsgi))


def test_a_name_that_is_none_is_told_as_by_any_module() -> None:
    with pytest.raises(AttributeError, match="'openmeter_wsgi' has no attribute 'met'"):
        _ = openmeter_wsgi.met  # type: ignore[attr-defined]


# -- With a request


#: Makes a middleware, records all later imports, serves, delivers, forks,
#: serves and delivers again. Imports as little as possible, since an earlier import
#: would hide a later one.
SERVING = """
import json, os, sys
from wsgiref.util import setup_testing_defaults
from openmeter_wsgi import OpenMeterMiddleware, add_meters, check_entitlements, meter

options, view_options, asks = json.loads(sys.argv[1])

def view(environ):
    add_meters(environ, {"tokens": 5})
    if asks:
        check_entitlements(environ, asks)

if view_options:
    view = meter(**view_options)(view)

def app(environ, start_response):
    view(environ)
    status = environ["HTTP_X_STATUS"]
    start_response(status, [("Content-Type", "application/json")])
    return [b'{"usage": {"total_tokens": 3}, "results": [{"status": 200}], "n": 1}']

def serve(who, status="200 OK"):
    environ = {"HTTP_X_WHO": who, "HTTP_X_STATUS": status, "PATH_INFO": "/v1/things/7"}
    setup_testing_defaults(environ)
    try:
        response = middleware(environ, lambda status, headers: None)
    except Exception as denied:
        assert type(denied).__name__ == "EntitlementDenied", denied
        return
    list(response)
    if hasattr(response, "close"):
        response.close()

def serve_and_deliver():
    for _ in range(2):
        serve("acme")
    serve("nobody")
    serve("acme", "404 Not Found")
    assert middleware.flush(30)

middleware = OpenMeterMiddleware(app, **options)
imported = []
sys.addaudithook(lambda event, args: event == "import" and imported.append(args[0]))
serve_and_deliver()
child = os.fork()
serve_and_deliver()
if child:
    assert os.waitpid(child, 0)[1] == 0
    middleware.health()
    middleware.invalidate("acme")
    middleware.close(30)
print(json.dumps([imported, middleware.stats().delivered]), flush=True)
os._exit(0)
"""

LLM = "$llm.total_tokens"


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "memory": ({}, {}, ""),
    "spool": ({"spool_dir": "spool"}, {}, ""),
    "entitlements": ({"required_entitlements": [FEATURE]}, {}, ""),
    "countdown": (
        {"required_entitlements": [FEATURE], "entitlement_meters": [FEATURE]}, {}, "",
    ),
    "countdown on a host": (
        {
            "required_entitlements": [FEATURE], "entitlement_meters": [FEATURE],
            "spool_dir": "spool", "usage_headers": True,
        },
        {}, "",
    ),
    "asked by the handler alone": ({}, {}, FEATURE),
    "routes": (
        {"routes": {"/v1/things/<id>": {"meters": {"things": 1}}, "/none": None}},
        {}, "",
    ),
    "routes with a quota": (
        {"routes": {"/v1/things/<id>": {"required_entitlements": [FEATURE]}}}, {}, "",
    ),
    "bodies": (
        {
            "meters": {
                "a": LLM, "b": "$response.succeeded", "c": "$response.records ?? 0",
                "d": "$response.json.n",
            },
            "meter_when": "$response.succeeded",
        },
        {}, "",
    ),
    "view": ({}, {"meters": {"a": LLM}, "required_entitlements": [FEATURE]}, ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    meter = {"slug": FEATURE, "eventType": FEATURE, "aggregation": "SUM",
             "valueProperty": "$.total"}  # fmt: skip
    with Sandbox() as sandbox:
        made = requests.post(f"{sandbox.url}/api/v1/meters", json=meter, timeout=10)
        made.raise_for_status()
        sandbox.grant("acme", FEATURE, 1_000_000)
        yield sandbox


@pytest.mark.parametrize("case", CASES)
def test_a_request_and_its_delivery_import_nothing_in_any_process(
    sandbox, tmp_path, monkeypatch, case
) -> None:
    monkeypatch.chdir(tmp_path)
    options, view_options, asks = CASES[case]
    url = sandbox.url.replace("127.0.0.1", "localhost")
    usual = {
        "meters": {FEATURE: 1}, "api_url": url, "subject": "header:X-Who",
        "entitlement_timeout": 30,
    }  # fmt: skip

    said = run(SERVING, json.dumps([usual | options, view_options, asks]))

    (in_child, _), (in_parent, delivered) = map(json.loads, said.splitlines())
    assert in_child == in_parent == []
    assert delivered > 0

"""Mistakes that people make: ``check`` finds, names and explains each of them."""

import contextlib
import json
import os
import shlex
import shutil
import ssl
import subprocess
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
import trustme
from click.testing import CliRunner

from openmeter_server import Answer, OpenMeterServer, problem, redirect
from openmeter_wsgi.cli import check_configuration, check_server
from openmeter_wsgi.cli.check import command
from openmeter_wsgi.sandbox import Sandbox
from openmeter_wsgi.spool import files as directory
from spool_support import event, put, shipping

NOBODY = 65534


@pytest.fixture(autouse=True)
def _hurried(monkeypatch):
    monkeypatch.setattr(check_server, "PAUSE", 0.01)
    monkeypatch.setattr(check_server, "GRACE", 0.01)
    monkeypatch.setattr(check_server, "EVENT_PATIENCE", 0.01)


@pytest.fixture
def certificate():
    return trustme.CA().issue_cert("127.0.0.1")


@pytest.fixture
def secure_openmeter(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    with OpenMeterServer(context) as server:
        yield server


@pytest.fixture
def application(tmp_path, monkeypatch):
    """Return a function that writes a module and names it."""
    monkeypatch.chdir(tmp_path)

    def write(text, name="app"):
        module = f"checked_{tmp_path.name.replace('-', '_')}"
        monkeypatch.delitem(sys.modules, module, raising=False)
        (tmp_path / f"{module}.py").write_text(text)
        return f"{module}:{name}"

    return write


def check(*arguments, **variables):
    """Return the exit code, and the findings except ``ok``: name to (what, remedy)."""
    environ = {f"OPENMETER_{k.upper()}": str(v) for k, v in variables.items()}
    result = CliRunner().invoke(command, ["--json", *arguments], env=environ)
    assert result.stderr == ""
    findings = json.loads(result.stdout)["findings"]
    wrong = {
        one["name"]: (one["severity"], one["found"], one["remedy"])
        for one in findings
        if one["severity"] in {"failure", "warning"}
    }
    return result.exit_code, wrong


def date(seconds):
    moment = datetime.now(UTC) + timedelta(seconds=seconds)
    return {"Date": format_datetime(moment, usegmt=True)}


# -- The server


@pytest.mark.parametrize(("status", "names_the_key"), [(403, True), (404, False)])
def test_a_key_is_blamed_only_for_what_a_key_may_not(openmeter, status, names_the_key):
    openmeter.rule = lambda request: (
        problem(status) if request.method == "GET" else None
    )

    result = CliRunner().invoke(
        command, ["--json"], env={"OPENMETER_API_URL": openmeter.url}
    )

    remedies = {f["name"]: f["remedy"] for f in json.loads(result.stdout)["findings"]}
    for name, what in (("meters", "list meters"), ("event", "list events")):
        expected = f"use a key that may {what}" if names_the_key else None
        assert remedies[name] == expected


def test_a_wrong_key(openmeter):
    openmeter.rule = lambda request: problem(401, "the key is unknown")

    code, wrong = check(api_url=openmeter.url, api_key="om_wrong")

    assert (code, [*wrong]) == (3, ["key"])
    assert wrong["key"] == (
        "failure",
        "refused with 401: the key is unknown",
        "give a key of this server that may ingest events",
    )


def test_a_key_of_kong_konnect_for_another_api(openmeter):
    openmeter.rule = lambda request: problem(401)

    _, wrong = check(api_url=openmeter.url, api_key="kpat_secret")

    assert "api_flavor to 'v3' and api_url to" in wrong["key"][2]
    assert "kpat_secret" not in str(wrong)


def test_a_wrong_url_where_nobody_listens(openmeter):
    openmeter.down()

    code, wrong = check(api_url=openmeter.url)

    assert (code, [*wrong]) == (3, ["server"])
    assert wrong["server"] == (
        "failure",
        f"{openmeter.url} does not answer: connection refused",
        "set api_url to the address of the server, and let this machine reach it",
    )


def test_a_wrong_url_whose_host_is_misspelt():
    _, wrong = check(api_url="https://openmeter.invalid")

    assert wrong["server"][1].endswith("does not answer: no such host is known")
    assert "is 'openmeter.invalid' misspelt?" in wrong["server"][2]


def test_the_path_of_ingest_in_the_url(sandbox):
    code, wrong = check(api_url=f"{sandbox.url}/api/v1/events")

    assert (code, [*wrong]) == (2, ["configuration"])
    assert "without the path of the API, got" in wrong["configuration"][1]
    assert "write scheme, host and port alone" in wrong["configuration"][2]


def test_a_part_of_the_path_in_the_url(sandbox):
    code, wrong = check(api_url=f"{sandbox.url}/api/v1")

    assert (code, [*wrong]) == (3, ["answer"])
    assert "404" in wrong["answer"][1]
    assert wrong["answer"][2].startswith(f"set api_url to {sandbox.url!r}")


def test_http_instead_of_https(secure_openmeter):
    insecure = secure_openmeter.url.replace("https", "http")

    code, wrong = check(api_url=insecure)

    assert (code, [*wrong]) == (3, ["server"])
    assert (
        f"{insecure} does not answer over http, only over https" in wrong["server"][1]
    )
    assert wrong["server"][2] == f"set api_url to {secure_openmeter.url!r}"


def test_https_instead_of_http_never_sends_the_key_in_the_clear(openmeter):
    secure = openmeter.url.replace("http", "https")

    code, wrong = check(api_url=secure, api_key="om_secret")

    assert (code, [*wrong]) == (3, ["server"])
    assert "does not answer over https, only over http" in wrong["server"][1]
    assert wrong["server"][2] == f"set api_url to {openmeter.url!r}"
    assert openmeter.requests
    assert not any("Authorization" in one.headers for one in openmeter.requests)


def test_https_with_a_certificate_that_is_not_trusted(secure_openmeter):
    _, wrong = check(api_url=secure_openmeter.url)

    assert "its certificate is not trusted" in wrong["server"][1]
    assert "REQUESTS_CA_BUNDLE" in wrong["server"][2]


def test_http_that_is_redirected_to_https(openmeter):
    openmeter.rule = lambda request: redirect(308, "https://openmeter.example/")

    _, wrong = check(api_url=openmeter.url)

    assert "redirect to 'https://openmeter.example/'" in wrong["answer"][1]
    assert "https instead of http" in wrong["answer"][2]


def test_a_key_that_travels_unencrypted():
    server = OpenMeterServer()
    host = f"http://0.0.0.0:{server.port}"  # this machine, but not its loopback
    with server:
        _, wrong = check(api_url=host, api_key="om_secret")

    assert wrong["key"][0] == "warning"
    assert "sent unencrypted to 0.0.0.0" in wrong["key"][1]


def test_a_clock_that_is_an_hour_off(openmeter):
    openmeter.rule = lambda request: (
        Answer(200, b"[]", date(3_600)) if request.method == "GET" else None
    )

    _, wrong = check(api_url=openmeter.url)

    severity, found, remedy = wrong["clock"]
    assert (severity, remedy) == (
        "warning",
        "let NTP set the clock of this machine",
    )
    assert found.startswith("this machine is 3")
    assert "s behind the server" in found


# -- Meters and features


def test_a_meter_type_that_no_meter_counts(sandbox, api):
    api.meter("calls", "COUNT", eventType="api-request")

    code, wrong = check(api_url=sandbox.url, meters='{"api_request": 1}')

    assert code == 3
    severity, found, remedy = wrong["meter 'api_request'"]
    assert severity == "failure"
    assert "no meter on the server counts events of this type" in found
    assert "its meters count 'api-request'" in found
    assert "create a meter with eventType 'api_request'" in remedy


CREATED = {
    '{"api_request": 1}': {
        "slug": "api_request",
        "eventType": "api_request",
        "aggregation": "SUM",
        "valueProperty": "$.total",
    },
    '{"Chat tokens": "$response.bytes"}': {
        "slug": "chat_tokens",
        "eventType": "Chat tokens",
        "aggregation": "SUM",
        "valueProperty": "$.total",
    },
}


@pytest.mark.parametrize("meters", CREATED)
def test_the_command_that_creates_a_missing_meter_is_told(sandbox, meters):
    command = missing_meter(api_url=sandbox.url, meters=meters)

    assert json.loads(command[command.index("-d") + 1]) == CREATED[meters]
    assert f"{sandbox.url}/api/v1/meters" in command


@pytest.mark.parametrize(
    ("document", "aggregation", "path", "group_by"),
    [
        ({"type": "call"}, "COUNT", None, None),
        (
            {"type": "call", "data": {"model": "m", "in": 3, "out": 4}},
            "SUM",
            "$.in",
            ["model"],
        ),
        ({"type": "call", "data": {"tokens used": 3}}, "SUM", "$['tokens used']", None),
        ({"type": "llm", "data": "$llm"}, "SUM", "$.total_tokens", ["model"]),
        ({"type": "llm", "data": "$llm:openai"}, "SUM", "$.total_tokens", ["model"]),
        (
            {"type": "llm", "data": "$llm:openai/type:groq"},
            "SUM",
            "$.tokens",
            ["type", "model", "provider"],
        ),
        (
            {
                "type": "call",
                "data": {
                    "version": 2,
                    "route": "$request.route",
                    "model": "$llm.model",
                    "usage": {"in": "$llm.input_tokens"},
                },
            },
            "SUM",
            "$.usage.in",
            ["route", "model"],
        ),
    ],
)
def test_the_command_fits_the_data_of_the_event(
    sandbox, document, aggregation, path, group_by
):
    command = missing_meter(api_url=sandbox.url, meter=json.dumps(document))

    created = json.loads(command[command.index("-d") + 1])
    assert created.pop("aggregation") == aggregation
    assert created.pop("valueProperty", None) == path
    dimensions = group_by and {name: f"$.{name}" for name in group_by}
    assert created.pop("groupBy", None) == dimensions


def test_without_knowing_the_data_no_command_is_told(sandbox, application):
    name = application(
        "from openmeter_wsgi import OpenMeterMiddleware, computed\n"
        "def bare(environ, start_response): ...\n"
        f"app = OpenMeterMiddleware(bare, api_url={sandbox.url!r},\n"
        "    meter={'type': 'call', 'data': computed(lambda exchange: {})})"
    )

    findings = commands("--app", name)

    assert findings == {}
    assert "that fits its data" in check("--app", name)[1]["meter 'call'"][2]


@pytest.mark.parametrize(
    ("path", "severity", "said"),
    [
        (
            "$.total_tokens",
            "ok",
            "reads $.total_tokens, which the policy measures: $llm",
        ),
        ("$.model", "failure", "not a number"),
        ("$.tokens", "failure", "which is not in"),
    ],
)
def test_a_meter_of_the_tokens_of_a_model_reads_what_is_sent(
    sandbox, api, path, severity, said
):
    api.meter("llm", "SUM", path, eventType="llm")
    variables = {
        "OPENMETER_API_URL": sandbox.url,
        "OPENMETER_METER": '{"type": "llm", "data": "$llm"}',
    }

    result = CliRunner().invoke(command, ["--json"], env=variables)

    findings = {one["name"]: one for one in json.loads(result.stdout)["findings"]}
    assert findings["meter 'llm'"]["severity"] == severity
    assert said in findings["meter 'llm'"]["found"]


def test_the_command_creates_a_meter_that_check_accepts(sandbox, api):
    api.meter("api_request", "COUNT", eventType="another type")
    document = {"type": "api_request", "data": {"plan": "it's", "n": 1}}
    variables = {"api_url": sandbox.url, "meter": json.dumps(document)}

    done = subprocess.run(
        missing_meter(**variables), capture_output=True, check=True, timeout=40
    )

    assert json.loads(done.stdout)["slug"] == "api_request_2"
    assert "meter 'api_request'" not in check("--no-dedupe-check", **variables)[1]


def test_the_command_for_version_3_has_its_words_and_the_key(openmeter):
    openmeter.rule = answer_v3

    command = missing_meter(
        api_url=openmeter.url, api_flavor="v3", api_key="om_x", meters='{"call": 1}'
    )

    assert json.loads(command[command.index("-d") + 1]) == {
        "key": "call",
        "name": "call",
        "event_type": "call",
        "aggregation": "sum",
        "value_property": "$.total",
    }
    assert f"{openmeter.url}/api/v3/openmeter/meters" in command
    assert "Authorization: Bearer $OPENMETER_API_KEY" in command
    assert not [part for part in command if "om_x" in part]


def test_the_command_stands_in_one_line_of_its_own(sandbox):
    variables = {"OPENMETER_API_URL": sandbox.url, "OPENMETER_METERS": '{"call": 1}'}

    result = CliRunner().invoke(command, ["--no-dedupe-check"], env=variables)

    (line,) = [line for line in result.output.splitlines() if "curl" in line]
    assert shlex.split(line)[0] == "curl"


def answer_v3(request):
    if request.method == "GET":
        empty = {"data": [], "meta": {"page": {"number": 1, "size": 100, "total": 0}}}
        return Answer(200, json.dumps(empty).encode())
    return Answer(204)


def missing_meter(**variables):
    """Return the words of the command that creates the meter that is missing."""
    (told,) = commands(**variables).values()
    return told


def commands(*arguments, **variables):
    """Return the words of the commands in the remedies, by finding."""
    environ = {f"OPENMETER_{k.upper()}": str(v) for k, v in variables.items()}
    arguments = ["--json", "--no-dedupe-check", *arguments]
    result = CliRunner().invoke(command, arguments, env=environ)
    findings = json.loads(result.stdout)["findings"]
    return {
        one["name"]: shlex.split(one["command"]) for one in findings if one["command"]
    }


def test_the_types_in_the_decorators_of_views_are_looked_for(sandbox, application):
    name = application(VIEWS.format(url=sandbox.url))

    _, wrong = check("--no-dedupe-check", "--app", name)

    assert sorted(wrong) == [
        "billed status codes of view 'chat'",
        "meter 'call'",
        "meter 'of_class'",
        "meter 'of_function'",
        "meter 'of_method'",
        "meter 'of_route'",
    ]


def test_a_decorator_whose_options_contradict_the_policy(sandbox, application):
    name = application(
        "from flask import Flask\nweb = Flask('web')\n"
        "from openmeter_wsgi import OpenMeterMiddleware, meter\n"
        "@web.get('/')\n@meter(reserve={'tokens': 1})\n"
        "def view(): return 'x'\n"
        f"app = OpenMeterMiddleware(web.wsgi_app, api_url={sandbox.url!r})\n"
    )

    code, wrong = check("--no-dedupe-check", "--app", name)

    assert (code, [*wrong]) == (3, ["view 'view'"])
    assert "reserve: 'tokens' is not in entitlement_meters" in wrong["view 'view'"][1]


VIEWS = """
from flask import Flask
from flask.views import MethodView
from openmeter_wsgi import OpenMeterMiddleware, meter, no_meter
web = Flask("web")

@web.get("/chat")
@meter(meters={{"of_function": 1}}, meter_on_status_codes="200-499")
def chat(): return "x"

@web.get("/free")
@no_meter
def free(): return "x"

@web.get("/inherits")
@meter(on_failure="all")
def inherits(): return "x"

class Class(MethodView):
    decorators = [meter(meters={{"of_class": 1}})]
    @meter(meters={{"of_method": 1}})
    def get(self): return "x"
web.add_url_rule("/class", view_func=Class.as_view("class"))

app = OpenMeterMiddleware(web.wsgi_app, api_url={url!r}, meters={{"call": 1}},
                          routes={{"/inherits": {{"meters": {{"of_route": 1}}}}}})
"""


def test_a_meter_type_of_a_single_route_that_no_meter_counts(sandbox, tmp_path):
    file = tmp_path / "policy.toml"
    file.write_text('[routes."POST /chat"]\nmeters = {tokens = "$response.bytes"}\n')

    code, wrong = check("--config", str(file), api_url=sandbox.url)

    assert (code, [*wrong]) == (3, ["meter 'tokens'"])


def test_a_meter_that_no_policy_feeds(sandbox, api):
    api.meter("tokens", "SUM", "$.tokens", eventType="llm")
    api.meter("images", "COUNT", eventType="image")
    api.ingest({"specversion": "1.0", "id": "1", "source": "other", "type": "image",
                "subject": "acme"})  # fmt: skip

    code, wrong = check(api_url=sandbox.url)

    assert (code, [*wrong]) == (0, ["meters without usage"])
    severity, found, remedy = wrong["meters without usage"]
    assert severity == "warning"
    assert found.startswith(
        "no policy feeds 'tokens' (event type 'llm'), and nothing else has"
    )
    assert "set_meters" in remedy


def test_a_value_property_that_is_not_in_the_data(sandbox, api):
    api.meter("calls", "SUM", "$.count")

    code, wrong = check(api_url=sandbox.url, meters='{"call": 1}')

    assert code == 3
    severity, found, remedy = wrong["meter 'call'"]
    assert severity == "failure"
    assert found == (
        "the meter 'calls' reads $.count, which is not in {\"total\": 1}: it counts "
        "nothing"
    )
    assert "meter={'type': ..., 'data': ...}" in remedy


def test_a_hyphenated_feature(sandbox):
    code, wrong = check(api_url=sandbox.url, required_entitlements="api-requests")

    assert code == 2
    severity, found, _ = wrong["configuration"]
    assert severity == "failure"
    assert "OpenMeter takes no feature key like 'api-requests'" in found
    assert "write 'api_requests' here and in OpenMeter" in found


def test_the_id_of_a_feature(sandbox, api):
    made = api.post(
        "/api/v1/features", json={"key": "searches", "name": "searches"}
    ).json()

    code, wrong = check(api_url=sandbox.url, required_entitlements=made["id"])

    assert code == 3
    severity, found, remedy = wrong[f"feature {made['id']!r}"]
    assert severity == "failure"
    assert found.startswith("this is the id of a feature, not its key")
    assert remedy == "write 'searches'"


def test_a_key_that_may_not_list_customers(openmeter):
    openmeter.rule = lambda request: (
        problem(403, "forbidden")
        if request.target.startswith("/api/v1/customers?")
        else problem(404, "customer not found")
    )

    code, wrong = check(api_url=openmeter.url, required_entitlements="searches")

    assert code == 3
    severity, found, remedy = wrong["entitlements"]
    assert severity == "failure"
    assert "it answers 403: forbidden; fail_mode decides" in found
    assert "may list customers" in remedy


def test_a_feature_that_openmeter_does_not_know(sandbox):
    code, wrong = check(api_url=sandbox.url, required_entitlements="search")

    assert code == 3
    assert "it denies every customer" in wrong["feature 'search'"][1]
    assert "create the feature 'search'" in wrong["feature 'search'"][2]
    assert "each customer also needs an entitlement" in wrong["feature 'search'"][2]


def test_the_commands_create_a_meter_and_its_feature(sandbox, api):
    variables = {
        "api_url": sandbox.url,
        "meters": '{"Search": 1}',
        "entitlement_meters": '{"searches": "Search"}',
        "required_entitlements": "exports",
    }

    told = commands(**variables)

    assert [*told] == ["meter 'Search'", "feature 'exports'", "feature 'searches'"]
    for words in told.values():
        subprocess.run(words, capture_output=True, check=True, timeout=40)
    assert check("--no-dedupe-check", **variables)[0] == 0
    made = {one["key"]: one for one in api.get("/api/v1/features").json()}
    assert made["searches"]["meterSlug"] == "search"
    assert "meterSlug" not in made["exports"]


def test_the_command_for_a_feature_names_the_meter_as_the_version_does(sandbox, api):
    api.meter("searches", "COUNT", eventType="search")
    (listed,) = api.get("/api/v1/meters").json()
    variables = {
        "api_url": sandbox.url,
        "entitlements_api_key": "secret",
        "required_entitlements": "searches",
    }

    for flavor, path, meter in (
        ("v1", "/api/v1/features", {"meterSlug": "searches"}),
        ("v3", "/api/v3/openmeter/features", {"meter": {"id": listed["id"]}}),
    ):
        words = missing_meter(**variables, api_flavor=flavor)
        sent = json.loads(words[words.index("-d") + 1])
        assert sent == {"key": "searches", "name": "searches", **meter}
        assert f"{sandbox.url}{path}" in words
        assert "Authorization: Bearer $OPENMETER_ENTITLEMENTS_API_KEY" in words


def test_no_feature_is_created_of_a_meter_that_nothing_creates(sandbox):
    variables = {"api_url": sandbox.url, "entitlement_meters": '{"searches": "find"}'}

    assert commands(**variables) == {}
    (_, _, remedy) = check(**variables)[1]["feature 'searches'"]
    assert "create the feature 'searches' after its meter, or use" in remedy


def test_over_v3_a_feature_is_created_after_its_meter(sandbox):
    told = commands(
        api_url=sandbox.url,
        api_flavor="v3",
        meters='{"searches": 1}',
        required_entitlements="searches",
    )

    assert [*told] == ["meter 'searches'"]


@pytest.mark.parametrize(
    ("counted", "severity", "said"),
    [
        ({"required_entitlements": "searches"}, "warning", "no policy sends"),
        (
            {"entitlement_meters": '{"searches": "find"}'},
            "failure",
            "'find' is counted",
        ),
    ],
    ids=["nothing uses it up", "another type is counted down"],
)
def test_a_feature_whose_quota_is_not_used_up(sandbox, api, counted, severity, said):
    api.meter("searches", "COUNT", eventType="search")
    sandbox.grant("acme", "searches", 10)

    _, wrong = check(api_url=sandbox.url, **counted)

    assert wrong["feature 'searches'"][0] == severity
    assert said in wrong["feature 'searches'"][1]


def test_a_key_that_may_not_ask(openmeter):
    openmeter.rule = lambda request: (
        problem(403, "not yours") if "/entitlements/" in request.target else None
    )

    code, wrong = check(api_url=openmeter.url, required_entitlements="search")

    assert code == 3
    assert "it answers 403: not yours" in wrong["entitlements"][1]
    assert "entitlements_api_key" in wrong["entitlements"][2]


# -- Billed twice, or billed although free


def test_deduplication_that_is_off():
    with Sandbox(dedupe=False) as sandbox:
        code, wrong = check(api_url=sandbox.url)

    assert (code, [*wrong]) == (3, ["deduplication"])
    assert wrong["deduplication"][0] == "failure"
    assert "is stored twice" in wrong["deduplication"][1]
    assert "a ticket that is settled again" in wrong["deduplication"][1]
    assert "repeated under its idempotency key" in wrong["deduplication"][1]
    assert "sink.dedupe" in wrong["deduplication"][2]


ACCEPTING = """
import http, os
from flask import Flask, Response
from flask.views import MethodView
from openmeter_wsgi import OpenMeterMiddleware, defer, meter
app = Flask(__name__)

@app.post("/tuple")
def _tuple(): return {}, 202

@app.post("/status")
def status(): return Response(status="202 Accepted")

@app.post("/name")
def name():
    def inner(): return {}, http.HTTPStatus.ACCEPTED
    return inner()

class Video(MethodView):
    def post(self): return {}, 202
app.add_url_rule("/class", view_func=Video.as_view("video"))

@app.post("/deferred")
def deferred(): return {"ticket": defer(None)}, 202

@app.post("/created")
def created(): return {}, 201

@app.post("/free")
def free(): return {}, 202

@app.post("/only-200")
def only_200(): return {}, 202

@app.post("/measured")
@meter(meters={"bytes": "$response.bytes"})
def measured(): return {}, 202

app.wsgi_app = OpenMeterMiddleware(
    app.wsgi_app, meters={"videos": 1}, api_url=os.environ["OPENMETER_API_URL"],
    routes={
        "/<path:rest>": {}, "/free": None, "/only-200": {"meter_on_status_codes": "200"}
    },
)
"""


def test_views_that_answer_202_and_bill_a_flat_price(sandbox, application):
    _, wrong = check("--app", application(ACCEPTING), api_url=sandbox.url)

    assert [name for name in wrong if name.startswith("accepted work")] == [
        f"accepted work of '/{name}'" for name in ("tuple", "status", "name", "class")
    ]
    severity, found, remedy = wrong["accepted work of '/class'"]
    assert severity == "warning"
    assert "a flat price ('videos'), also if the work" in found
    assert "usage.settle(ticket, meters)" in remedy


ACCEPTING_ONCE = """
import os
from flask import Flask
from openmeter_wsgi import OpenMeterMiddleware, meter
app = Flask(__name__)

@app.post("/policy")
def policy(): return {}, 202

@app.post("/route")
def route(): return {}, 202

@app.post("/view")
@meter(meters={"views": 1})
def view(): return {}, 202

@app.get("/other")
def other(): return {}

app.wsgi_app = OpenMeterMiddleware(
    app.wsgi_app, meters={"policies": 1}, meter_on_status_codes="200, 202",
    api_url=os.environ["OPENMETER_API_URL"],
    routes={"/route": {"meters": {"r": 1}}, "/other": {"meters": {"others": 1}}},
)
"""


def test_a_view_that_answers_202_is_warned_of_once(sandbox, application):
    name = application(ACCEPTING_ONCE)
    environ = {"OPENMETER_API_URL": sandbox.url}

    result = CliRunner().invoke(command, ["--json", "--app", name], env=environ)

    findings = json.loads(result.stdout)["findings"]
    assert [one["name"] for one in findings if "accepted" in one["name"]] == [
        "accepted work of '/policy'",
        "accepted work of '/route'",
        "accepted work of '/view'",
    ]


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({"meter_on_status_codes": "200, 202", "meters": '{"a": 1}'}, True),
        ({"meter_on_status_codes": "202", "meters": '{"a": "$response.bytes"}'}, False),
        ({"meter_on_status_codes": "2xx", "meters": '{"a": 1}'}, False),
        (
            {
                "meter_on_status_codes": "202", "meters": '{"a": 1}',
                "ticket_secret": "a-secret-of-the-tests",
            },
            False,
        ),
    ],
)  # fmt: skip
def test_a_policy_that_names_202_beside_a_flat_price(sandbox, options, warned):
    _, wrong = check(api_url=sandbox.url, **options)

    assert ("accepted work" in wrong) == warned
    assert not warned or "defer(request)" in wrong["accepted work"][2]


def test_a_status_range_that_is_widened(sandbox):
    code, wrong = check(api_url=sandbox.url, meter_on_status_codes="200-499")

    assert (code, [*wrong]) == (0, ["billed status codes"])
    severity, found, remedy = wrong["billed status codes"]
    assert (severity, found) == ("warning", "200-499 bills errors too, 400-499")
    assert "'200-299'" in remedy


def test_a_status_range_that_a_route_widens(sandbox, tmp_path):
    file = tmp_path / "policy.toml"
    file.write_text('[routes."/search"]\nmeter_on_status_codes = "2xx, 404"\n')

    code, wrong = check("--config", str(file), api_url=sandbox.url)

    assert (code, [*wrong]) == (0, ["billed status codes of '/search'"])


def test_a_variable_that_is_misspelt(sandbox):
    code, wrong = check(api_url=sandbox.url, batch_sise="3")

    assert (code, [*wrong]) == (0, ["configuration"])
    assert "did you mean OPENMETER_BATCH_SIZE?" in wrong["configuration"][1]


@pytest.mark.parametrize(
    ("option", "remedy"),
    [
        ("no_such_thing", "look the name up in the list of options, docs/options.md"),
        ("billable_statuses", "write meter_on_status_codes"),
        ("status_codes", "write meter_on_status_codes"),
    ],
)
def test_an_option_that_is_unknown(sandbox, tmp_path, option, remedy):
    file = tmp_path / "policy.json"
    file.write_text(json.dumps({option: "2xx"}))

    code, wrong = check("--policy", str(file), api_url=sandbox.url)

    assert (code, [*wrong]) == (2, ["configuration"])
    assert f"unknown option '{option}'" in wrong["configuration"][1]
    assert remedy in wrong["configuration"][2]


# -- The spool


@contextlib.contextmanager
def as_nobody():
    """Run as the user nobody if root runs the tests: file modes do not bind root."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_spool_directory_that_is_not_writable(sandbox):
    with tempfile.TemporaryDirectory(dir="/tmp") as made:
        spool = Path(made)
        if not os.geteuid():
            os.chown(spool, NOBODY, NOBODY)
        spool.chmod(0o500)

        with as_nobody():
            code, wrong = check(
                "--no-dedupe-check", api_url=sandbox.url, spool_dir=made
            )

    wrong.pop("spool volume", None)  # wherever these tests run
    assert (code, [*wrong]) == (3, ["spool directory"])
    severity, found, remedy = wrong["spool directory"]
    assert severity == "failure"
    assert found.startswith(f"{made!r} cannot be written: no permission")
    assert "mode 0700" in remedy


def test_a_disk_with_less_room_than_the_spool_may_take(sandbox, tmp_path):
    tmp_path.chmod(0o700)
    room = shutil.disk_usage(tmp_path).total

    _, wrong = check(
        "--no-dedupe-check",
        api_url=sandbox.url,
        spool_dir=tmp_path,
        max_spool_bytes=room,
    )

    severity, found, remedy = wrong["spool disk"]
    assert severity == "warning"
    assert "free, and the spool may take" in found
    assert "max_spool_bytes" in remedy


def test_a_spool_on_the_own_layer_of_a_container(sandbox, tmp_path, monkeypatch):
    spool = tmp_path / "spool"
    spool.mkdir(mode=0o700)
    mounts = tmp_path / "mountinfo"
    mounts.write_text("1 0 0:1 / / rw - overlay overlay rw\n")
    monkeypatch.setattr(directory, "_MOUNTS", mounts)
    monkeypatch.setattr(check_configuration, "_ROOT", tmp_path)  # the same device

    code, wrong = check("--no-dedupe-check", api_url=sandbox.url, spool_dir=spool)

    assert (code, [*wrong]) == (0, ["spool volume"])
    severity, found, remedy = wrong["spool volume"]
    assert severity == "warning"
    assert "the next deployment deletes it" in found
    assert "mount a volume" in remedy


def test_a_spool_that_nobody_ships(openmeter, tmp_path):
    spool = tmp_path / "spool"
    put(spool, event("1"))
    options = {"api_url": openmeter.url, "spool_dir": spool, "delivery": "ship"}

    _, wrong = check("--no-dedupe-check", **options)
    with shipping(spool, openmeter) as ship:
        ship.wait_for("is the sender")
        _, shipped = check("--no-dedupe-check", **options)

    severity, found, remedy = wrong["sender of the spool"]
    assert severity == "warning"
    assert "none is running: usage waits in the spool" in found
    assert remedy == f"run openmeter-wsgi ship --spool-dir {spool}"
    assert "sender of the spool" not in shipped


# -- The application

METERED = """
from openmeter_wsgi import OpenMeterMiddleware

def bare(environ, start_response):
    start_response("200 OK", [])
    return [b""]

def metered(app, **options):
    return OpenMeterMiddleware(app, api_url={url!r}, **options)
"""
LAYERS = {
    "alike": "app = metered(metered(bare))",
    "apart": "app = metered(metered(bare, meters={'call': 1}))",
    "with another between": """
from werkzeug.middleware.proxy_fix import ProxyFix
app = ProxyFix(metered(ProxyFix(metered(bare))))
""",
    "in flask": """
from flask import Flask
app = Flask("app")
app.wsgi_app = metered(app.wsgi_app)
app.wsgi_app = metered(app.wsgi_app)
""",
    "in a closure": """
def logged(app):
    def call(environ, start_response):
        return app(environ, start_response)
    return call

app = logged(metered(logged(metered(bare))))
""",
    "by a factory": "def make(): return metered(metered(bare))",
}


@pytest.mark.parametrize("layers", LAYERS)
def test_a_middleware_that_is_wrapped_twice(sandbox, application, layers):
    text = METERED.format(url=sandbox.url) + LAYERS[layers]
    name = application(text, "make()" if "factory" in layers else "app")

    code, wrong = check("--no-dedupe-check", "--app", name)

    severity, found, remedy = wrong["application"]
    apart = layers == "apart"
    assert (code, severity) == ((3, "failure") if apart else (0, "warning"))
    assert f"{name} is wrapped 2 times; only the outermost bills" in found
    assert ("are never billed" in found) is apart
    assert "remove the others" in remedy


def test_what_an_application_prints_is_not_taken_for_a_finding(application):
    name = application("print('hello'); app = lambda environ, start_response: []")

    result = CliRunner().invoke(command, ["--json", "--app", name])

    assert json.loads(result.stdout)["findings"][0]["name"] == "application"
    assert result.stderr == "hello\n"


ASGI = {
    "function": "async def app(scope, receive, send): pass",
    "object": "class App:\n"
    "    async def __call__(self, scope, receive, send): pass\napp = App()",
}


@pytest.mark.parametrize("kind", ASGI)
def test_an_asgi_application(application, kind):
    code, wrong = check("--app", application(ASGI[kind]))

    assert (code, [*wrong]) == (3, ["application"])
    severity, found, remedy = wrong["application"]
    assert (severity, "is an ASGI application" in found) == ("failure", True)
    assert "WSGI" in remedy


def test_an_event_source_that_is_the_default(sandbox):
    environ = {"OPENMETER_API_URL": sandbox.url}
    arguments = ["--no-dedupe-check"]

    default = CliRunner().invoke(command, arguments, env=environ)
    own = CliRunner().invoke(
        command, arguments, env=environ | {"OPENMETER_EVENT_SOURCE": "shop"}
    )

    assert "event source: 'openmeter_wsgi', the default" in default.output
    assert "event source" not in own.output


def test_an_application_that_is_not_wrapped(application):
    name = application("def app(environ, start_response): return []")

    code, wrong = check("--app", name)

    assert (code, [*wrong]) == (3, ["application"])
    assert "nothing is billed" in wrong["application"][1]


MISPLACED = {
    "flask": ("from flask import Flask; web = Flask('web')", "web.wsgi_app"),
    "bottle": ("from bottle import Bottle; web = Bottle()", "web"),
}


@pytest.mark.parametrize("framework", MISPLACED)
@pytest.mark.parametrize("decorator", ["no_meter", "meter(meters={'a': 1})"])
def test_a_decorator_above_the_one_that_registers_the_view(
    sandbox, application, framework, decorator
):
    made, wsgi = MISPLACED[framework]
    name = application(
        f"{made}\nfrom openmeter_wsgi import OpenMeterMiddleware, meter, no_meter\n"
        f"@{decorator}\n@web.get('/free')\ndef free(): return 'x'\n"
        f"@web.get('/right')\n@{decorator}\ndef right(): return 'x'\n"
        f"app = OpenMeterMiddleware({wsgi}, api_url={sandbox.url!r})\n"
    )

    code, wrong = check("--no-dedupe-check", "--app", name)

    in_effect = ["meter 'a'"] if decorator.startswith("meter") else []
    assert (code, [*wrong]) == (3, ["view free", *in_effect])
    assert "above the decorator that registers it for /free" in wrong["view free"][1]


SERVED = {
    "flask": """
from flask import Flask
web = Flask("web")
for rule in ("/p/<int:id>", "/files/<path:name>", "/a/b"):
    web.add_url_rule(rule, rule, lambda **_: "x", methods=["GET"])
wsgi = web.wsgi_app
""",
    "bottle": """
from bottle import Bottle
wsgi = Bottle()
for rule in ("/p/<id:int>", "/files/<name:path>", "/a/b"):
    wsgi.get(rule, callback=lambda **_: "x")
""",
    "falcon": """
import falcon
class View:
    def on_get(self, req, resp, **_): pass
wsgi = falcon.App()
for rule in ("/p/{id:int}", "/files/{name:path}", "/a/b"):
    wsgi.add_route(rule, View())
""",
    "pyramid": """
from pyramid.config import Configurator
with Configurator() as config:
    for rule in ("/p/{id}", "/files/*name", "/a/b"):
        config.add_route(rule, rule)
    wsgi = config.make_wsgi_app()
""",
}
REACHED = ("/p/<id>", "/p/7", "GET /p/<int:id>", "HEAD /files/a/b", "/<x>/b", "/a/b/",
           "/files/<path:rest>", "/<path:all>", "/files/<a>/<b>/c")  # fmt: skip
UNREACHED = ("/q", "/p", "/p/<id>/x", "/a/<path:rest>/c", "/v1/p/<id>")


@pytest.mark.parametrize("framework", SERVED)
def test_a_rule_that_no_request_can_match(sandbox, application, framework):
    rules = (*REACHED, *UNREACHED, "POST /a/b")
    name = application(
        f"{SERVED[framework]}\nfrom openmeter_wsgi import OpenMeterMiddleware\n"
        f"app = OpenMeterMiddleware(wsgi, api_url={sandbox.url!r}, "
        f"routes=dict.fromkeys({rules!r}, {{}}))\n"
    )

    result = CliRunner().invoke(command, ["--json", "--no-dedupe-check", "--app", name])

    said = [f for f in json.loads(result.stdout)["findings"] if f["name"] == "routes"]
    unreached = [one["found"].split("'")[1] for one in said]
    # Pyramid keeps methods at its views.
    assert unreached == [*UNREACHED, *(["POST /a/b"] if framework != "pyramid" else [])]
    assert {one["severity"] for one in said} == {"warning"}


def test_rules_of_an_application_of_which_nothing_is_known(sandbox, application):
    name = application(
        METERED.format(url=sandbox.url)
        + "from werkzeug.middleware.dispatcher import DispatcherMiddleware as Several\n"
        "from flask import Flask\n"
        "several = Several(Flask('a'), {'/v1': Flask('b')})\n"
        "app = metered(several, routes={'/v1/x': {}})\n"
        "other = metered(bare, routes={'/v1/x': {}})\n"
    )

    for each in (name, name.replace(":app", ":other")):
        _, wrong = check("--no-dedupe-check", "--app", each)
        assert "routes" not in wrong


UNMETERED = """
import os
from flask import Flask
from openmeter_wsgi import OpenMeterMiddleware, no_meter
app = Flask(__name__, static_folder=None)
rules = {
    "/v1/search": ["GET"], "/v1/suggest": ["GET"], "/v1/both": ["GET", "POST"],
    "/healthz": ["GET"],
}
for rule, methods in rules.items():
    app.add_url_rule(rule, rule, lambda: "x", methods=methods)

@app.get("/free")
@no_meter
def free(): return "x"

app.wsgi_app = OpenMeterMiddleware(
    app.wsgi_app, api_url=os.environ["OPENMETER_API_URL"], meters=METERS, routes=ROUTES
)
"""


@pytest.mark.parametrize(
    ("meters", "routes", "unmetered"),
    [
        (
            {"calls": 1},
            {"/v1/search": {}, "POST /v1/both": {}, "/healthz": None, "*": None},
            "GET /v1/suggest, GET /v1/both",
        ),
        ({"calls": 1}, {"/v1/<path:rest>": {}, "*": None}, "GET /healthz"),
        ({"calls": 1}, {"/v1/search": {}}, None),
        ({"calls": 1}, {"*": None}, None),
        ({"calls": 1}, None, None),
        (
            None,
            {"/v1/search": {"meters": {"searches": 1}}},
            "GET /v1/suggest, GET,POST /v1/both, GET /healthz",
        ),
    ],
)
def test_routes_that_no_rule_meters_are_noted(
    sandbox, application, meters, routes, unmetered
):
    text = UNMETERED.replace("METERS", repr(meters)).replace("ROUTES", repr(routes))
    name = application(text)
    environ = {"OPENMETER_API_URL": sandbox.url}

    result = CliRunner().invoke(command, ["--json", "--app", name], env=environ)

    notes = [
        one["found"]
        for one in json.loads(result.stdout)["findings"]
        if (one["name"], one["severity"]) == ("routes", "note")
    ]
    assert notes == ([f"not metered by any rule: {unmetered}"] if unmetered else [])


def test_the_list_of_unmetered_routes_is_bounded(sandbox, application):
    name = application(
        "from flask import Flask\nfrom openmeter_wsgi import OpenMeterMiddleware\n"
        "app = Flask('web', static_folder=None)\n"
        "for n in range(30): app.add_url_rule(f'/r{n}', str(n), lambda: 'x')\n"
        f"app.wsgi_app = OpenMeterMiddleware(app.wsgi_app, api_url={sandbox.url!r}, "
        "routes={'/r0': {}, '*': None})\n"
    )

    result = CliRunner().invoke(command, ["--no-dedupe-check", "--app", name])

    assert "GET /r1, " in result.stdout
    assert "GET /r20 and 9 more" in result.stdout
    assert "/r21" not in result.stdout


@pytest.mark.parametrize("every_other", [{"*": None}, {"*": {}}, {}])
def test_entitlements_by_routes_beside_unmetered_ones(sandbox, tmp_path, every_other):
    file = tmp_path / "policy.json"
    own = {"required_entitlements": ["deep"]}
    options = {"routes": {"/a": own, **every_other}, "api_url": sandbox.url}
    file.write_text(json.dumps(options))

    _, wrong = check("--no-dedupe-check", "--policy", str(file))

    assert ("routes" in wrong) is (every_other == {"*": None})
    if every_other == {"*": None}:
        assert "'/a' requires entitlements" in wrong["routes"][1]
        assert "Policy.from_zuplo adds this rule" in wrong["routes"][1]
        assert "Flask and Django" in wrong["routes"][1]
        assert "@meter(required_entitlements=" in wrong["routes"][2]


def test_a_path_that_also_finds_what_customers_send(sandbox, application):
    name = application(
        "from openmeter_wsgi import OpenMeterMiddleware, response_json\n"
        f"app = OpenMeterMiddleware(lambda e, s: [], api_url={sandbox.url!r}, meters={{"
        "'a': response_json('$..total'), 'b': '$response.json..tokens', "
        "'c': '$response.json[\"..\"].d'})\n"
    )

    result = CliRunner().invoke(command, ["--json", "--no-dedupe-check", "--app", name])

    findings = json.loads(result.stdout)["findings"]
    warned = [f["found"] for f in findings if f["name"] == "configuration"]
    assert len(warned) == 2
    for path, said in zip(("$..total", "$..tokens"), warned, strict=True):
        assert path in said
        assert "values that a customer sends" in said


def test_an_application_is_checked_under_its_own_policy(sandbox, application):
    text = METERED.format(url=sandbox.url)
    name = application(f"{text}\napp = metered(bare, meters={{'no_such_type': 1}})")

    code, wrong = check("--no-dedupe-check", "--app", name)

    assert (code, [*wrong]) == (3, ["meter 'no_such_type'"])


OWN_CODE_FAILS = "MODULE:APP was found, and its own code fails"


@pytest.mark.parametrize(
    ("text", "said", "remedy"),
    [
        (
            "import no_such_package",
            "No module named 'no_such_package' ({file}, line 1)",
            OWN_CODE_FAILS,
        ),
        (
            "\nfrom openmeter_wsgi import no_such_name",
            "cannot import name 'no_such_name'",
            OWN_CODE_FAILS,
        ),
        ("raise SystemExit('no database')", "SystemExit: no database", OWN_CODE_FAILS),
        ("app = (", "SyntaxError: '(' was never closed", OWN_CODE_FAILS),
        ("other = 1", "has no 'app'", "write the name that the application has in"),
        (
            "app = 1",
            "expected a WSGI application, got 1",
            "a function that returns the application needs () at the end",
        ),
    ],
)
def test_an_application_that_cannot_be_loaded(application, text, said, remedy):
    name = application(text)
    file = f"{name.partition(':')[0]}.py"

    code, wrong = check("--app", name)

    assert (code, [*wrong]) == (2, ["application"])
    assert said.format(file=file) in wrong["application"][1]
    assert remedy in wrong["application"][2]


def test_a_function_that_makes_the_application_and_fails(application):
    name = application("def make():\n    return {}['url']", "make()")

    _, wrong = check("--app", name)

    assert "KeyError: 'url'" in wrong["application"][1]
    assert "line 2)" in wrong["application"][1]
    assert OWN_CODE_FAILS in wrong["application"][2]


@pytest.mark.parametrize(
    "name", ["no_such_module:app", "json.no_such_module:app", "json.py:app", ":app"]
)
def test_an_application_whose_module_is_not_found(application, name):
    code, wrong = check("--app", name)

    assert (code, [*wrong]) == (2, ["application"])
    _, found, remedy = wrong["application"]
    assert "no module" in found
    assert "run check in the directory from which the server imports it" in remedy


def test_an_application_whose_options_are_wrong(application):
    name = application(METERED.format(url="nowhere") + "app = metered(bare)")

    code, wrong = check("--app", name)

    assert (code, [*wrong]) == (2, ["configuration"])
    assert "expected a URL" in wrong["configuration"][1]


def test_an_application_brings_its_own_configuration():
    result = CliRunner().invoke(command, ["--app", "a:b", "--api-url", "http://x"])

    assert result.exit_code == 2
    assert "--app has a policy of its own" in result.output

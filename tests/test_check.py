"""The findings of ``openmeter-wsgi check``, on working and on faulty servers."""

import json
import os
import pty
import subprocess
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from click.testing import CliRunner

from openmeter_server import HANG, PAGE, Answer, problem, redirect
from openmeter_wsgi.cli import check_configuration, check_server
from openmeter_wsgi.cli.check import FrameworkProject, command, run_checks
from openmeter_wsgi.cli.check_configuration import is_on_layer
from openmeter_wsgi.cli.findings import MARK
from openmeter_wsgi.policy import Policy
from openmeter_wsgi.sandbox import Sandbox
from openmeter_wsgi.spool import files as directory
from spool_support import COMMAND, days_ago, put
from spool_support import event as spooled
from test_sandbox_support import event


@pytest.fixture(autouse=True)
def _hurried(monkeypatch):
    """The sandbox stores at once, so nothing need be waited for."""
    monkeypatch.setattr(check_server, "PAUSE", 0.01)
    monkeypatch.setattr(check_server, "GRACE", 0.01)
    monkeypatch.setattr(check_server, "EVENT_PATIENCE", 0.01)


def run(*arguments, **variables):
    environ = {f"OPENMETER_{k.upper()}": str(v) for k, v in variables.items()}
    return CliRunner().invoke(command, arguments, env=environ)


def found(*arguments, code=0, **variables):
    """Return the findings by name; of one name those that are not ok come last."""
    result = run("--json", *arguments, **variables)
    assert result.exit_code == code, (result.output, result.exception)
    findings = json.loads(result.stdout)["findings"]
    findings.sort(key=lambda finding: finding["severity"] != "ok")
    return {finding["name"]: finding for finding in findings}


def severities(findings):
    return {name: finding["severity"] for name, finding in findings.items()}


def date(seconds=0):
    moment = datetime.now(UTC) + timedelta(seconds=seconds)
    return {"Date": format_datetime(moment, usegmt=True)}


# -- As a whole


def test_nothing_fails_where_all_is_right(sandbox, api, tmp_path):
    api.meter("calls", "SUM", "$.total")
    (tmp_path / "spool").mkdir(mode=0o700)

    findings = found(
        api_url=sandbox.url,
        meters='{"call": 1}',
        event_source="shop",
        spool_dir=tmp_path / "spool",
        max_spool_bytes=16 * 1024**2,
    )

    volume = findings.pop("spool volume")
    assert volume["severity"] in {"ok", "warning"}  # wherever these tests run
    assert findings.pop("handlers") == {
        "name": "handlers", "severity": "note", "remedy": None, "command": None,
        "found": "types that handlers state with set_meters or add_meters are not "
        "checked",
    }  # fmt: skip
    assert findings["event"]["found"] == (
        f"test event {MARK}: stored, and deliberately counted by no meter"
    )
    assert findings["meter 'call'"]["found"] == (
        "the meter 'calls' reads $.total, which the policy sets to 1"
    )
    assert severities(findings) == dict.fromkeys(
        [
            "billed status codes", "spool directory", "server", "key", "answer",
            "clock", "event", "meter 'call'", "deduplication",
        ],
        "ok",
    )  # fmt: skip
    # A client cannot find out if OpenMeter deduplicates.
    assert findings.pop("deduplication")["remedy"] is not None
    assert all(finding["remedy"] is None for finding in findings.values())


def test_no_more_is_sent_than_marked_events_that_nobody_pays_for(sandbox, api):
    found(api_url=sandbox.url)

    events = [listed["event"] for listed in api.events()]
    assert [(one["type"], one["subject"]) for one in events] == [(MARK, MARK)] * 2


def test_a_finding_stands_in_a_line_with_its_remedy_below():
    result = run("--no-dedupe-check", api_url="http://127.0.0.1:9")

    assert result.exit_code == 3
    lines = result.stdout.splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("failure"))
    assert lines[at].startswith("failure  server: http://127.0.0.1:9 does not answer")
    assert lines[at + 1].startswith("         → set api_url to")


def test_what_a_server_says_does_not_steer_the_terminal(openmeter):
    openmeter.rule = lambda request: problem(401, "\x1b[31mred\u202e")

    result = run(api_url=openmeter.url)

    assert "\x1b" not in result.output
    assert "\u202e" not in result.output
    assert "red" in result.output


def test_on_a_terminal_it_is_coloured_and_wrapped(sandbox):
    shown, terminal = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, "check", "--no-dedupe-check"],
        stdout=terminal,
        stderr=terminal,
        env=os.environ | {"OPENMETER_API_URL": sandbox.url, "TERM": "xterm-256color"},
    ) as process:
        os.close(terminal)
        said = b""
        try:
            while chunk := os.read(shown, 10_000):
                said += chunk
        except OSError:
            pass  # the other end is closed
        os.close(shown)
        assert process.wait(40) == 0, said

    lines = said.decode().splitlines()
    assert lines[0] == f"\x1b[1mChecking {sandbox.url}\x1b[0m"
    assert any(line.startswith("\x1b[32m✓\x1b[0m  server ") for line in lines)
    assert "\x1b[34m2 notes\x1b[0m · \x1b[32m8 ok\x1b[0m" in lines[-1]


# -- The configuration


def test_a_command_of_a_framework_brings_the_policy_of_its_settings(sandbox):
    made = []

    def policy_of_settings():
        made.append(Policy(api_url=sandbox.url, meter_on_status_codes="201"))
        return made[0]

    result = CliRunner().invoke(
        command,
        ["--json", "--no-dedupe-check"],
        obj=FrameworkProject(policy_of_settings),
    )

    findings = json.loads(result.stdout)["findings"]
    assert (result.exit_code, len(made)) == (0, 1)
    assert ["billed status codes", "201"] in [
        [one["name"], one["found"]] for one in findings
    ]
    names = [finding.name for finding in run_checks(made[0])]
    assert [one["name"] for one in findings] == names


def test_every_problem_of_a_configuration_is_told():
    wrong = {"api_url": "nowhere", "meter_on_status_codes": "*"}

    assert list(found(code=2, **wrong)) == ["configuration"]
    assert "failure  configuration: api_url: expected a URL" in run(**wrong).output
    assert "configuration: meter_on_status_codes: '*' would" in run(**wrong).output


def test_a_file_is_read_and_variables_outdo_it(sandbox, tmp_path):
    file = tmp_path / "policy.toml"
    file.write_text('api_url = "http://127.0.0.1:9"\nmeter_on_status_codes = "201"\n')

    findings = found("--config", str(file), api_url=sandbox.url)

    assert findings["billed status codes"]["found"] == "201"
    assert findings["server"]["severity"] == "ok"


def test_a_file_that_is_not_there_is_a_problem_of_the_configuration(tmp_path):
    findings = found("--config", str(tmp_path / "none.toml"), code=2)

    assert "No such file" in findings["configuration"]["found"]


@pytest.mark.parametrize("codes", ["200-599", "2xx, 404", "500"])
def test_billed_errors_are_warned_of(sandbox, codes):
    findings = found(api_url=sandbox.url, meter_on_status_codes=codes)

    assert findings["billed status codes"]["severity"] == "warning"
    assert "unless they are to pay" in findings["billed status codes"]["remedy"]


def test_a_dry_run_is_warned_of(sandbox):
    assert found(api_url=sandbox.url, dry_run=1)["dry run"]["severity"] == "warning"


# -- The server


def test_a_server_that_is_not_there_fails_and_the_rest_is_unknown(openmeter):
    openmeter.down()
    findings = found(code=3, api_url=openmeter.url)

    assert severities(findings) == {
        "billed status codes": "ok",
        "event source": "ok",
        "spool directory": "note",
        "server": "failure",
        "clock": "unknown",
        "event": "unknown",
        "meters": "unknown",
        "features": "unknown",
        "deduplication": "unknown",
    }
    assert findings["server"]["found"].endswith("does not answer: connection refused")


def test_a_server_that_is_silent_fails(openmeter):
    openmeter.rule = lambda request: HANG
    findings = found(code=3, api_url=openmeter.url, request_timeout=0.1)

    assert "does not answer" in findings["server"]["found"]


def test_a_server_that_breaks_fails_with_its_reason(openmeter):
    openmeter.rule = lambda request: problem(503, "no room")
    findings = found(code=3, api_url=openmeter.url)

    assert "answers 503: no room" in findings["server"]["found"]


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("key", ["wrong", ""])
def test_a_key_that_is_refused_fails(openmeter, status, key):
    openmeter.rule = lambda request: problem(status, "who are you?")
    findings = found(code=3, api_url=openmeter.url, api_key=key)

    assert findings["server"]["severity"] == "ok"
    assert findings["key"]["severity"] == "failure"
    assert findings["key"]["found"] == f"refused with {status}: who are you?"
    assert ("OPENMETER_API_KEY" in findings["key"]["remedy"]) is not key


def test_a_key_that_is_accepted_is_told_from_none(sandbox):
    accepted = found(api_url=sandbox.url, api_key="k")["key"]
    assert accepted["found"] == "sent, and not refused"
    assert found(api_url=sandbox.url)["key"]["found"].startswith("none is sent")


@pytest.mark.parametrize(
    ("answer", "said", "remedy"),
    [
        (PAGE, "a web page", "address of the API"),
        (problem(404), "Not Found", "api_flavor (now 'v1')"),
        (redirect(301, "https://x/"), "'https://x/'", "https instead of http"),
        (problem(400, "no events found"), "no events found", "one changes events"),
    ],
    ids=["page", "elsewhere", "redirect", "refused"],
)
def test_an_answer_that_is_no_openmeters_fails(openmeter, answer, said, remedy):
    openmeter.rule = lambda request: answer
    findings = found(code=3, api_url=openmeter.url)

    assert findings["answer"]["severity"] == "failure"
    assert said in findings["answer"]["found"]
    assert remedy in findings["answer"]["remedy"]


@pytest.mark.parametrize(
    ("seconds", "severity", "said"),
    [
        (0, "ok", "agree"),
        (-50, "ok", "agree"),
        (-100, "warning", "s ahead of the server"),
        (100, "warning", "s behind the server"),
    ],
)
def test_a_clock_that_is_far_off_is_warned_of(openmeter, seconds, severity, said):
    openmeter.rule = lambda request: (
        Answer(200, b"[]", date(seconds)) if request.method == "GET" else None
    )
    clock = found(api_url=openmeter.url)["clock"]

    assert clock["severity"] == severity
    assert said in clock["found"]


@pytest.mark.parametrize("headers", [{}, {"Date": "now"}])
def test_without_a_date_the_clock_is_unknown(openmeter, headers):
    openmeter.rule = lambda request: (
        Answer(200, b"[]", headers) if request.method == "GET" else None
    )

    assert found(api_url=openmeter.url)["clock"]["severity"] == "unknown"


# -- The event


def test_an_event_that_is_taken_and_not_listed_is_warned_of(openmeter):
    openmeter.rule = lambda request: (
        Answer(200, b"[]") if request.method == "GET" else None
    )
    findings = found(api_url=openmeter.url)

    assert findings["event"]["severity"] == "warning"
    assert "sink worker" in findings["event"]["remedy"]
    assert findings["deduplication"]["severity"] == "unknown"


def test_what_openmeter_finds_wrong_with_the_event_is_told(sandbox, api):
    api.meter("mistake", "SUM", "$.tokens", eventType=MARK)
    event = found(api_url=sandbox.url)["event"]

    assert event["severity"] == "warning"
    assert 'missing value property: "$.tokens"' in event["found"]
    assert "customer" not in event["found"]


@pytest.mark.parametrize("body", [b"{}", b"[1]", b"no json", b'[{"event": {}}]'])
def test_a_list_that_is_none_leaves_the_event_unknown(openmeter, body):
    openmeter.rule = lambda request: (
        Answer(200, body) if request.method == "GET" else None
    )

    assert found(api_url=openmeter.url)["event"]["severity"] == "unknown"


def test_over_v3_everything_is_found_out_that_is_over_v1(sandbox, api):
    api.meter("calls", "SUM", "$.total")
    api.meter("idle", "COUNT", eventType="idle")
    for feature in ({"key": "calls", "meterSlug": "calls"}, {"key": "exports"}):
        api.post("/api/v1/features", json={"name": "a", **feature}).raise_for_status()
    options = {
        "api_url": sandbox.url, "api_key": "k", "meters": '{"call": 1, "word": 1}',
        "required_entitlements": "calls, exports, unheard_of",
    }  # fmt: skip

    by_v1 = found(code=3, **options)
    by_v3 = found(code=3, **options, api_flavor="v3")

    assert "unknown" not in severities(by_v3).values()
    for findings in (by_v1, by_v3):
        del findings["server"]  # says how long it took
        # Each version has its own words.
        findings["meter 'word'"].pop("command")
        findings["feature 'unheard_of'"].pop("command")
    assert by_v3 == by_v1
    assert {"event", "clock", "deduplication", "meter 'call'", "feature 'calls'",
            "meters without usage", "entitlements"} <= {*by_v3}  # fmt: skip


def test_over_v3_a_key_that_may_not_ask_is_told(sandbox, openmeter):
    openmeter.rule = lambda request: (
        problem(403, "no role") if request.method == "GET" else None
    )

    findings = found(
        code=3, api_url=openmeter.url, api_flavor="v3", api_key="kpat_x",
        required_entitlements="calls",
    )  # fmt: skip

    assert findings["entitlements"]["severity"] == "failure"
    assert "403: no role" in findings["entitlements"]["found"]
    assert findings["event"]["remedy"] == "use a key that may list events"


# -- The meters


def test_a_type_that_no_meter_counts_fails(sandbox, api):
    api.meter("calls", "COUNT", eventType="api-request")
    findings = found(code=3, api_url=sandbox.url, meters='{"api_request": 1}')

    meter = findings["meter 'api_request'"]
    assert meter["severity"] == "failure"
    assert "its meters count 'api-request'" in meter["found"]
    assert "eventType 'api_request'" in meter["remedy"]


@pytest.mark.parametrize(
    ("aggregation", "path", "data", "severity"),
    [
        ("COUNT", None, {}, "ok"),
        ("SUM", "$.tokens", {"tokens": 3}, "ok"),
        ("SUM", "$.tokens", {"tokens": "3.5"}, "ok"),
        ("SUM", "$.usage.tokens", {"usage": {"tokens": 3}}, "ok"),
        ("SUM", "$['usage'][1]", {"usage": [1, 2]}, "ok"),
        ("UNIQUE_COUNT", "$.user", {"user": "carol"}, "ok"),
        ("SUM", "$.tokens", {"token": 3}, "failure"),
        ("SUM", "$.tokens", {}, "failure"),
        ("SUM", "$.usage.tokens", {"usage": 3}, "failure"),
        ("SUM", "$['usage'][1]", {"usage": [1]}, "failure"),
        ("SUM", "$.tokens", {"tokens": "many"}, "failure"),
        ("SUM", "$.tokens", {"tokens": True}, "failure"),
        ("SUM", "$.tokens", {"tokens": None}, "failure"),
    ],
)
def test_a_meter_must_find_its_value_in_the_data(
    sandbox, api, aggregation, path, data, severity
):
    api.meter("calls", aggregation, path)
    findings = found(
        code=0 if severity == "ok" else 3,
        api_url=sandbox.url,
        meter=json.dumps({"type": "call", "data": data}),
    )

    assert findings["meter 'call'"]["severity"] == severity


def test_a_path_that_is_not_read_here_is_unknown(openmeter):
    meters = [{"slug": "m", "eventType": "a", "aggregation": "SUM"}]
    meters[0]["valueProperty"] = "$..tokens"
    openmeter.rule = lambda request: (
        Answer(200, json.dumps(meters).encode()) if request.method == "GET" else None
    )
    findings = found(api_url=openmeter.url, meters='{"a": 1}')

    assert findings["meter 'a'"]["severity"] == "unknown"


def test_meters_that_something_else_feeds_are_told(sandbox, api):
    api.meter("calls", "COUNT", eventType="call")
    api.meter("tokens", "COUNT", eventType="llm")
    api.ingest(event(type="llm"))
    others = found(api_url=sandbox.url, meters='{"call": 1}')["other meters"]

    assert others["severity"] == "ok"
    assert "'tokens' (event type 'llm')" in others["found"]
    assert "calls" not in others["found"]


def test_all_pages_of_meters_are_read(openmeter):
    meters = [
        {"slug": f"m{n}", "eventType": f"t{n}", "aggregation": "COUNT"}
        for n in range(1_001)
    ]

    def rule(request):
        if request.method != "GET":
            return None
        page = meters[1_000:] if "page=2&" in request.target else meters[:1_000]
        listed = page if "/meters" in request.target else []
        return Answer(200, json.dumps(listed).encode())

    openmeter.rule = rule
    findings = found(api_url=openmeter.url, meters='{"t1000": 1}')

    assert findings["meter 't1000'"]["severity"] == "ok"


# -- Old events


def test_a_spool_whose_events_kafka_may_delete_is_warned_of(
    sandbox, tmp_path, monkeypatch
):
    monkeypatch.setenv("SPOOL_SERVER", sandbox.url)
    spool = _made(tmp_path)
    put(spool, spooled("1", time=days_ago(6.9)))
    young = found("--no-dedupe-check", api_url=sandbox.url, spool_dir=spool)
    put(spool, spooled("2", time=days_ago(8.6)))

    old = found("--no-dedupe-check", api_url=sandbox.url, spool_dir=spool)

    assert "age of the spool" not in young
    assert old["age of the spool"]["severity"] == "warning"
    assert "the oldest waiting event is 9 days old" in old["age of the spool"]["found"]
    assert "retention.ms" in old["age of the spool"]["remedy"]


# -- Deduplication


def test_a_server_that_stores_a_repetition_fails_with_the_remedy(tmp_path):
    with Sandbox(dedupe=False) as sandbox:
        findings = found(code=3, api_url=sandbox.url, spool_dir=_made(tmp_path))

    assert findings["deduplication"]["severity"] == "failure"
    assert "sink.dedupe" in findings["deduplication"]["remedy"]
    assert _verdict(tmp_path)["deduplicates"] is False


def test_a_server_that_drops_a_repetition_is_fine_and_the_spool_remembers(
    sandbox, tmp_path
):
    findings = found(api_url=sandbox.url, spool_dir=_made(tmp_path))

    assert findings["deduplication"]["severity"] == "ok"
    # From outside the two ways of deduplication look the same, and one loses usage.
    assert "sink.dedupe" in findings["deduplication"]["remedy"]
    assert "dedupe.enabled" in findings["deduplication"]["remedy"]
    verdict = _verdict(tmp_path)
    assert (verdict["api_url"], verdict["deduplicates"]) == (sandbox.url, True)
    assert datetime.fromisoformat(verdict["time"]) <= datetime.now(UTC)
    (file,) = (tmp_path / "spool").rglob("deduplication*")
    assert file.stat().st_mode & 0o777 == 0o600


def test_the_two_are_equal_and_five_seconds_apart(openmeter, monkeypatch):
    """So far that they are in different flushes of OpenMeter's sink."""
    monkeypatch.setattr(check_server, "PAUSE", 5.0)
    stored = []

    def rule(request):
        if request.method == "GET" and "/events" in request.target:
            return Answer(200, json.dumps([{"event": e} for e in stored]).encode())
        stored.extend(request.events)
        return None

    openmeter.rule = rule
    findings = found(code=3, api_url=openmeter.url)

    posts = [request for request in openmeter.requests if request.method == "POST"]
    assert posts[0].body == posts[1].body
    assert posts[1].at - posts[0].at >= 5
    assert findings["deduplication"]["severity"] == "failure"


def test_a_repetition_is_not_sent_where_it_is_not_wanted(openmeter, tmp_path):
    findings = found("--no-dedupe-check", api_url=openmeter.url)

    assert len([r for r in openmeter.requests if r.method == "POST"]) == 1
    assert "deduplication" not in findings


def _made(tmp_path):
    (tmp_path / "spool").mkdir(mode=0o700, exist_ok=True)
    return tmp_path / "spool"


def _verdict(tmp_path):
    return json.loads(
        next((tmp_path / "spool").rglob("deduplication.json")).read_text()
    )


# -- The spool


def test_without_a_spool_a_note_names_its_variable(sandbox):
    spool = found(api_url=sandbox.url)["spool directory"]

    assert spool["severity"] == "note"
    assert "set OPENMETER_SPOOL_DIR" in spool["remedy"]


def test_a_spool_that_others_could_write_fails(sandbox, tmp_path):
    _made(tmp_path).chmod(0o777)
    findings = found(code=3, api_url=sandbox.url, spool_dir=tmp_path / "spool")

    assert findings["spool directory"]["severity"] == "failure"
    assert "can be written by others" in findings["spool directory"]["found"]
    assert list((tmp_path / "spool").rglob("deduplication.json")) == []


def test_a_spool_that_is_a_link_or_a_file_fails(sandbox, tmp_path):
    (tmp_path / "link").symlink_to(_made(tmp_path))
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        findings = found(code=3, api_url=sandbox.url, spool_dir=tmp_path / name)
        assert "is no directory" in findings["spool directory"]["found"]


def test_a_spool_that_is_not_there_is_not_made(sandbox, tmp_path):
    findings = found(api_url=sandbox.url, spool_dir=tmp_path / "spool")
    assert findings["spool directory"]["severity"] == "unknown"
    assert not (tmp_path / "spool").exists()

    findings = found(code=3, api_url=sandbox.url, spool_dir=tmp_path / "a" / "b")
    assert "cannot be created" in findings["spool directory"]["found"]


def test_a_try_to_write_leaves_nothing(sandbox, tmp_path):
    found("--no-dedupe-check", api_url=sandbox.url, spool_dir=_made(tmp_path))

    assert [path.name for path in (tmp_path / "spool").iterdir()] == ["format"]


@pytest.mark.parametrize(("kind", "expected"), [("overlay", True), ("ext4", False)])
def test_a_directory_on_an_overlaid_root_dies_with_its_container(
    tmp_path, monkeypatch, kind, expected
):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"1 0 0:1 / {tmp_path} rw - {kind} {kind} rw\n")
    monkeypatch.setattr(directory, "_MOUNTS", mounts)

    assert is_on_layer(_made(tmp_path), tmp_path) is expected


def test_a_directory_on_another_device_outlives_the_container(tmp_path, monkeypatch):
    mounts = tmp_path / "mountinfo"
    mounts.write_text("1 0 0:1 / / rw - overlay overlay rw\n")
    monkeypatch.setattr(directory, "_MOUNTS", mounts)

    assert not is_on_layer(Path("/proc"), Path("/"))
    assert is_on_layer(Path("/"), Path("/"))


@pytest.mark.parametrize(
    ("kind", "severity", "said"),
    [
        ("overlay", "warning", "the next deployment deletes it"),
        ("tmpfs", "warning", "in memory (tmpfs)"),
        ("ext4", "ok", "not on the writable layer of a container"),
    ],
)
def test_a_place_that_the_spool_does_not_outlive_is_warned_of(
    sandbox, tmp_path, monkeypatch, kind, severity, said
):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"1 0 0:1 / / rw - {kind} {kind} rw\n")
    monkeypatch.setattr(directory, "_MOUNTS", mounts)
    monkeypatch.setattr(check_configuration, "_ROOT", tmp_path)  # the same device

    volume = found("--no-dedupe-check", api_url=sandbox.url, spool_dir=_made(tmp_path))[
        "spool volume"
    ]

    assert volume["severity"] == severity
    assert said in volume["found"]


def test_a_spool_of_another_user_fails(sandbox, tmp_path, monkeypatch):
    _made(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    findings = found(code=3, api_url=sandbox.url, spool_dir=tmp_path / "spool")

    assert "belongs to user" in findings["spool directory"]["found"]
    assert list((tmp_path / "spool").iterdir()) == []


# -- Quotas


@pytest.mark.parametrize(
    ("options", "severity", "said"),
    [
        ({}, "warning", "each process counts for itself"),
        ({"spool_dir": "spool"}, "ok", "that use this spool"),
        ({"redis_url": "redis://127.0.0.1:1"}, "ok", "that use this Redis"),
    ],
)
def test_whether_processes_count_a_quota_down_together_is_told(
    sandbox, tmp_path, monkeypatch, options, severity, said
):
    monkeypatch.chdir(tmp_path)
    counted = {"entitlement_meters": "calls", "meters": '{"calls": 1}'}

    finding = found(code=3, api_url=sandbox.url, **counted, **options)["quotas"]

    assert finding["severity"] == severity
    assert said in finding["found"]
    assert "'calls'" in finding["found"]


@pytest.mark.parametrize("how", ["SUM", "COUNT", "UNIQUE_COUNT", "LATEST"])
def test_a_meter_that_cannot_be_counted_down_is_named(sandbox, api, how):
    path = None if how == "COUNT" else "$.total"
    api.meter("calls", how, path, eventType="calls")
    feature = {"key": "calls", "name": "calls", "meterSlug": "calls"}
    api.post("/api/v1/features", json=feature).raise_for_status()

    findings = found(
        api_url=sandbox.url, meters='{"calls": 1}', entitlement_meters="calls"
    )

    counted_down = how in {"SUM", "COUNT"}
    finding = findings["feature 'calls'"]
    assert finding["severity"] == ("ok" if counted_down else "warning")
    assert (f"is of {how}" in finding["found"]) is not counted_down


@pytest.mark.parametrize(("status", "severity"), [(None, "ok"), (403, "warning")])
def test_whether_events_may_be_listed_is_told_where_a_quota_is_counted_down(
    openmeter, status, severity
):
    empty = {"items": [], "totalCount": 0, "pageSize": 100}
    openmeter.rule = lambda request: (
        None
        if request.method == "POST"
        else Answer(200, json.dumps(empty).encode())
        if status is None or "/api/v2/events" not in request.target
        else problem(status, "no role")
    )
    variables = {"meters": '{"calls": 1}', "entitlement_meters": "calls"}

    finding = found(api_url=openmeter.url, **variables)["visibility of usage"]

    assert finding["severity"] == severity
    assert ("403: no role" in finding["found"]) is (severity == "warning")

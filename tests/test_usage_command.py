"""``openmeter-wsgi usage``: its questions to the server, and its output."""

import json
import os
import pty
import subprocess
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from click.testing import CliRunner

from openmeter_server import Answer, problem
from openmeter_wsgi.cli import usage as periods
from openmeter_wsgi.cli.usage import command
from openmeter_wsgi.sandbox import Sandbox
from spool_support import COMMAND
from test_sandbox_support import Api, event

VERSIONS = ["v1", "v3"]
BERLIN = ZoneInfo("Europe/Berlin")


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as sandbox, Api(sandbox.url) as api:
        api.meter("calls", "COUNT", eventType="call")
        models = {"model": "$.model"}
        api.meter("tokens", "SUM", "$.tokens", eventType="llm", groupBy=models)
        for number, (day, subject, model, tokens) in enumerate([
            ("01", "acme", "small", 5),
            ("01", "hooli", "small", 7),
            ("02", "acme", "large", 0.1),
        ]):  # fmt: skip
            data = {"model": model, "tokens": tokens}
            time = f"2026-11-{day}T23:30:10Z"
            llm = event(number, type="llm", subject=subject, data=data, time=time)
            api.ingest([llm, event(f"call-{number}", subject=subject, time=time)])
        yield sandbox


def usage(server, *arguments, **variables):
    environ = {f"OPENMETER_{k.upper()}": str(v) for k, v in variables.items()}
    environ = {"OPENMETER_API_URL": server.url} | environ
    return CliRunner().invoke(command, arguments, env=environ)


def rows(server, *arguments):
    result = usage(server, "--json", *arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


def values(found, *names):
    return [tuple(row[name] for name in (*names, "value")) for row in found]


def asked(openmeter, *arguments):
    """Return the parameters of the one question that is asked."""
    openmeter.rule = lambda request: Answer(200, b'{"data": []}')
    result = usage(openmeter, "calls", *arguments)
    assert result.exit_code == 0, result.output
    (request,) = openmeter.requests
    return request.target


def test_all_meters_are_shown_in_lines_of_fields(sandbox):
    result = usage(sandbox)

    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "meter\tfrom\tto\tvalue",
        "calls\t2026-11-01T23:30:00Z\t2026-11-02T23:31:00Z\t3",
        "tokens\t2026-11-01T23:30:00Z\t2026-11-02T23:31:00Z\t12.1",
    ]


@pytest.mark.parametrize("arguments", [
    [],
    ["tokens"],
    ["calls", "tokens", "--subject", "hooli", "--from", "1h"],
    ["tokens", "--group-by", "subject", "--group-by", "model"],
    ["tokens", "--window", "day"],
    ["tokens", "--window", "DAY", "--timezone", "Europe/Berlin"],
    ["--window", "month", "--subject", "acme"],
    ["tokens", "--subject", "hooli", "--subject", "acme"],
    ["tokens", "--filter", "model=large"],
    ["tokens", "--filter", "model=large", "--filter", "model=small"],
    ["--from", "2026-11-02", "--to", "2026-11-03"],
    ["--group-by", "model"],
], ids=" ".join)  # fmt: skip
def test_usage_is_the_same_over_v1_and_v3(sandbox, arguments):
    if arguments.count("--filter") < 2:  # which version 1 refuses
        plain = [usage(sandbox, *arguments, api_flavor=flavor) for flavor in VERSIONS]
        assert plain[0].output == plain[1].output
        assert plain[0].exit_code == plain[1].exit_code == 0

    over_v3 = usage(sandbox, "--json", *arguments, api_flavor="v3")

    found = sorted((r["meter"], r["value"]) for r in json.loads(over_v3.stdout))
    if arguments.count("--filter") < 2:
        by_v1 = rows(sandbox, *arguments)
        assert json.loads(over_v3.stdout) == by_v1
    else:
        assert found == [("tokens", 12.1)]


def test_kong_konnect_is_asked_at_its_own_path(openmeter, monkeypatch):
    """Through a proxy, so that nothing leaves this machine."""
    monkeypatch.setenv("HTTP_PROXY", openmeter.url)
    openmeter.rule = lambda request: Answer(200, b'{"data": []}')
    host = "http://eu.api.konghq.com"

    result = usage(openmeter, api_url=host, api_flavor="v3", api_key="kpat_x")

    assert result.exit_code == 0, result.output
    (request,) = openmeter.requests
    assert request.target.startswith(f"{host}/v3/openmeter/meters?")
    assert request.headers["Authorization"] == "Bearer kpat_x"


def test_over_v3_the_meter_that_is_not_there_is_named(sandbox):
    result = usage(sandbox, "words", api_flavor="v3")

    assert result.exit_code == 1
    assert "no meter 'words' is on the server" in result.stderr


def test_a_meter_that_has_counted_nothing_is_shown_too(sandbox):
    result = usage(sandbox, "calls", "tokens", "--subject", "hooli", "--from", "1h")

    assert result.output.splitlines()[1:] == ["calls\t-\t-\t-\t-", "tokens\t-\t-\t-\t-"]
    assert rows(sandbox, "calls", "--from", "1h") == []


def test_usage_is_cut_by_subject_and_dimension(sandbox):
    found = rows(sandbox, "tokens", "--group-by", "subject", "--group-by", "model")

    cut = sorted((r["subject"], r["group_by"]["model"], r["value"]) for r in found)
    assert cut == [("acme", "large", 0.1), ("acme", "small", 5), ("hooli", "small", 7)]
    table = usage(sandbox, "tokens", "--group-by", "subject", "--group-by", "model")
    assert table.output.startswith("meter\tfrom\tto\tsubject\tmodel\tvalue\n")


def test_usage_is_cut_into_days_of_a_time_zone(sandbox):
    utc = rows(sandbox, "tokens", "--window", "day")
    berlin = rows(sandbox, "tokens", "--window", "DAY", "--timezone", "Europe/Berlin")

    assert values(utc, "from") == [
        ("2026-11-01T00:00:00Z", 12),
        ("2026-11-02T00:00:00Z", 0.1),
    ]
    assert values(berlin, "from") == [
        ("2026-11-02T00:00:00+01:00", 12),
        ("2026-11-03T00:00:00+01:00", 0.1),
    ]


def test_usage_is_of_one_subject_one_value_and_one_period(sandbox):
    assert values(rows(sandbox, "tokens", "--subject", "hooli"), "subject") == [
        ("hooli", 7)
    ]
    assert values(rows(sandbox, "tokens", "--filter", "model=large")) == [(0.1,)]
    assert values(rows(sandbox, "tokens", "--from", "2026-11-02")) == [(0.1,)]
    assert values(rows(sandbox, "tokens", "--to", "2026-11-02")) == [(12,)]


def test_only_meters_that_have_a_dimension_are_asked_for_it(sandbox):
    assert {row["meter"] for row in rows(sandbox, "--group-by", "model")} == {"tokens"}
    assert len({row["meter"] for row in rows(sandbox, "--group-by", "subject")}) == 2


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [
        ([], ""),
        (["--from", "2026-11-01T10:20:30Z"], "from=2026-11-01T10%3A20%3A00Z"),
        (["--to", "2026-11-01T10:20:30Z"], "to=2026-11-01T10%3A21%3A00Z"),
        (["--to", "2026-11-01T10:20:00Z"], "to=2026-11-01T10%3A20%3A00Z"),
        (
            ["--from", "2026-11-01T10:20:30Z", "--window", "MONTH"],
            "from=2026-11-01T00%3A00%3A00Z&windowSize=MONTH&windowTimeZone=UTC",
        ),
        (
            ["--from", "2026-11-01", "--timezone", "Europe/Berlin"],
            "from=2026-10-31T23%3A00%3A00Z",
        ),
        (["--subject", "a", "--subject", "b"], "subject=a&subject=b"),
        (["--filter", "m=a", "--filter", "m=b=c"],
         "filterGroupBy%5Bm%5D=a&filterGroupBy%5Bm%5D=b%3Dc"),
    ],
)  # fmt: skip
def test_the_server_is_asked_for_whole_windows(openmeter, arguments, parameters):
    mark = "?" if parameters else ""
    assert asked(openmeter, *arguments) == (
        f"/api/v1/meters/calls/query{mark}{parameters}"
    )


def test_an_age_is_counted_back_from_now():
    now = datetime(2026, 11, 27, 12, 30, tzinfo=UTC)

    ages = [
        periods.read_moment(text, UTC, now) for text in ("90min", "24h", "7d", "2w")
    ]

    assert [f"{moment:%m-%d %H:%M}" for moment in ages] == [
        "11-27 11:00", "11-26 12:30", "11-20 12:30", "11-13 12:30",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("window", "start", "stop"),
    [
        # The clocks of Berlin are set back at 01:00 UTC: the hour from 2 is two.
        ("HOUR", "2026-10-25T00:00:00Z", "2026-10-25T01:00:00Z"),
        ("DAY", "2026-10-24T22:00:00Z", "2026-10-25T23:00:00Z"),
        ("MONTH", "2026-09-30T22:00:00Z", "2026-10-31T23:00:00Z"),
    ],
)
def test_windows_end_where_the_clocks_of_their_zone_say(window, start, stop):
    moment = datetime(2026, 10, 25, 0, 30, tzinfo=UTC).astimezone(BERLIN)

    assert periods.time_text(periods.window_begin(moment, window)) == start
    assert periods.time_text(periods.window_end(moment, window)) == stop


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--from", "yesterday"], "--from: expected RFC 3339, a date such as"),
        (["--to", "99999999w"], "--to: expected RFC 3339"),
        (["--from", "999999w"], "--from: "),
        (["--window", "YEAR"], "'YEAR' is not one of"),
        (["--timezone", "Mars"], "expected a time zone such as Europe/Berlin"),
        (["--filter", "model"], "expected DIMENSION=VALUE, got 'model'"),
    ],
)
def test_a_wrong_call_is_told_from_a_failure(openmeter, arguments, told):
    result = usage(openmeter, *arguments)

    assert result.exit_code == 2
    assert told in " ".join(result.output.split())


def test_a_meter_that_is_not_there_is_named(sandbox):
    result = usage(sandbox, "no_such_meter")

    assert result.exit_code == 1
    assert result.stderr == (
        "Error: no meter 'no_such_meter' is on the server: its meters are calls, "
        "tokens\n"
    )


@pytest.mark.parametrize(("named", "code"), [([], 0), (["calls"], 1)])
def test_a_server_without_meters_is_told(openmeter, named, code):
    openmeter.rule = lambda request: (
        problem(404) if "/query" in request.target else Answer(200, b"[]")
    )

    result = usage(openmeter, *named)

    assert result.exit_code == code
    assert "the server has no meters (see openmeter-wsgi check)\n" in result.stderr


def test_what_the_server_refuses_is_one_line_with_its_reason(openmeter):
    openmeter.rule = lambda request: problem(401, "who are you?")

    result = usage(openmeter)

    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        f"Error: {openmeter.url}/api/v1/meters answered 401: who are you?\n"
    )


@pytest.mark.parametrize("body", [b"[]", b'{"data": 1}', b"no json"])
def test_an_answer_that_is_none_is_one_line(openmeter, body):
    openmeter.rule = lambda request: Answer(200, body)

    result = usage(openmeter, "calls")

    assert result.exit_code == 1
    assert f"{openmeter.url}/api/v1/meters/calls/query" in result.stderr


@pytest.mark.parametrize(
    ("value", "shown"),
    [(12, "12"), (0.1, "0.1"), (1e-9, "0.000000001"), (1e21, "1000000000000000000000")],
)
def test_numbers_have_all_their_digits(openmeter, value, shown):
    row = {"value": value, "windowStart": "a", "windowEnd": "b"}
    openmeter.rule = lambda request: Answer(200, json.dumps({"data": [row]}).encode())

    line = usage(openmeter, "calls").output.splitlines()[1]

    assert line.split("\t")[-1] == shown


def test_on_a_terminal_numbers_stand_at_the_right(sandbox):
    shown, terminal = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, "usage"],
        stdout=terminal,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OPENMETER_API_URL": sandbox.url, "COLUMNS": "80"},
    ) as process:
        os.close(terminal)
        said = b""
        try:
            while chunk := os.read(shown, 10_000):
                said += chunk
        except OSError:
            pass  # the other end is closed
        os.close(shown)
        assert process.wait(40) == 0

    _, calls, tokens = said.decode().splitlines()
    assert calls.endswith("     3")
    assert tokens.endswith("  12.1")


def test_the_help_says_how_to_get_totals_and_how_to_repeat_options():
    result = CliRunner().invoke(command, ["--help"], terminal_width=200)

    text = " ".join(result.output.split())
    assert "Without --window and --group-by this is one total per meter" in text
    assert text.count("May be repeated.") == 3

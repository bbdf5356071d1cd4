import dataclasses
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest

from openmeter_wsgi import ConfigError, OpenMeterMiddleware, Policy, StatusCodes

LOCAL = "http://127.0.0.1:8888"
KEY = "om_secret_0123456789"


def problem(**options: Any) -> str:
    """Return the error message for the options."""
    with pytest.raises(ConfigError) as refused:
        Policy(**{"api_url": LOCAL, **options})
    return str(refused.value)


def test_the_defaults_need_nothing_but_a_server_without_authentication() -> None:
    policy = Policy(api_url=LOCAL)

    assert policy.meter_on_status_codes == StatusCodes("200-299")
    assert (policy.on_failure, policy.on_abort) == ("measured", "all")
    assert (policy.batch_size, policy.flush_interval) == (500, 1.0)
    assert policy.static_meters == ()


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        Policy(
            batch_sise=3,
            batch_size=0,
            flush_interval=-1,
            on_abort="some",
            meters={},
            meter_on_status_codes="*",
        )

    problems = refused.value.problems
    assert len(problems) == 6
    assert problems[0] == "unknown option 'batch_sise' (did you mean 'batch_size'?)"
    assert "batch_size: expected `int` >= 1, got 0" in problems
    assert "on_abort: expected one of 'all', 'measured', 'none', got 'some'" in problems
    assert str(refused.value).splitlines() == list(problems)


def test_a_config_error_survives_pickling() -> None:
    error = ConfigError(["a: b", "c: d"])

    assert pickle.loads(pickle.dumps(error)).problems == error.problems


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"batch_size": "100"}, "batch_size: expected `int`, got '100'"),
        ({"batch_size": True}, "batch_size: expected `int`, got True"),
        ({"batch_size": 100_001}, "batch_size: expected `int` <= 100000, got 100001"),
        ({"flush_interval": 3601}, "flush_interval: expected `float` <= 3600.0"),
        ({"flush_interval": float("nan")}, "flush_interval: expected"),
        ({"request_timeout": 0}, "request_timeout: expected `float` > 0.0, got 0"),
        ({"dry_run": "yes"}, "dry_run: expected `bool`, got 'yes'"),
        ({"api_flavor": "v2"}, "api_flavor: expected one of 'v1', 'v3', got 'v2'"),
        ({"api_flavor": "konnect"}, "write 'v3', and api_url 'https://<region>.api."),
        ({"api_url": "https://eu.api.konghq.com"}, "api_flavor: expected 'v3' for ht"),
        ({"entitlements_url": "https://x.api.konghq.com"}, "api_flavor: expected 'v3'"),
        ({"api_url": "openmeter.cloud"}, "api_url: expected a URL such as"),
        ({"api_url": "ftp://x"}, "api_url: expected a URL such as"),
        ({"api_url": "http://x:port"}, "api_url: "),
        ({"api_url": "http://u:pw@x"}, "use api_key"),
        ({"api_url": "http://x/?a=b"}, "without ? and #"),
        ({"api_url": "http://x/api/v1/events"}, "without the path of the API"),
        (
            {"api_url": "https://eu.api.konghq.com/v3/openmeter/"},
            "without the path of the API",
        ),
        ({"event_source": "127.0.0.1:8080"}, "event_source: expected a URI reference"),
        ({"event_source": "my api"}, "event_source: expected a URI reference"),
        ({"event_source": "100%"}, "event_source: expected a URI reference"),
        ({"event_source": ""}, "event_source: expected a URI reference"),
        ({"subject": "X-Customer"}, "subject: expected a callable"),
        ({"subject": "header:"}, "subject: expected a callable"),
        ({"subject": "header:X Customer"}, "subject: expected a callable"),
        ({"subject": "header:Authorization"}, "contains no secret"),
        ({"subject": "header:cookie"}, "contains no secret"),
        ({"subject": "header: x-api-key"}, "contains no secret"),
        ({"subject_path": ""}, "subject_path: expected a path"),
        ({"subject_path": ".a..b"}, "subject_path: expected a path"),
        ({"on_missing_subject": ""}, "on_missing_subject: expected text"),
        ({"meters": {"a": -1}}, "meters: meter 'a': expected a number"),
        ({"meters": {"a": True}}, "meters: meter 'a': expected a number"),
        ({"meters": {"a": float("inf")}}, "meters: meter 'a': expected a number"),
        ({"meters": [{"a": 1}]}, "meters: expected a mapping of type to number"),
        ({"meter": {"api_requests": 1}}, "for numbers by type use the option meters"),
        ({"meter": []}, "meter: expected"),
        ({"meter": "api-request"}, "meter: expected {'type'"),
        ({"meter": {"type": "a", "value": 1}}, "'data': {'value': 1}"),
        ({"meter": {"type": "a", "dta": {}}}, "unknown key 'dta'"),
        ({"meter": {"type": "a", "data": [1]}}, "expected a JSON object"),
        ({"meter": {"type": "", "data": {}}}, "expected text that is not empty"),
        ({"meter": {"type": "a", "data": {}, "id": "x"}}, "billed once"),
        ({"api_key": "two words"}, "api_key: expected visible ASCII"),
        ({"api_key": ""}, "api_key: expected a key, got empty text"),
        ({"api_key": "a", "api_key_file": "b"}, "api_key_file: expected api_key or a"),
        ({"api_key_file": "/nowhere/at/all"}, "api_key_file '/nowhere/at/all': "),
        (
            {"trusted_request_id_header": "X-Request-ID"},
            "event_source: expected the name",
        ),
        ({"trusted_request_id_header": "X Request"}, "trusted_request_id_header: "),
        ({"not_an_option_at_all": 1}, "unknown option 'not_an_option_at_all'"),
    ],
)
def test_a_problem_names_the_option_the_expected_and_the_given(
    options: dict[str, Any], expected: str
) -> None:
    assert expected in problem(**options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"api_url": "https://eu.api.konghq.com", "api_flavor": "v3"},
    ],
)
def test_a_hosted_openmeter_wants_a_key(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="api_key: expected a key") as caught:
        Policy(**options)

    assert str(caught.value).endswith(
        "got none (or set OPENMETER_API_KEY); for a server of your own or the sandbox, "
        "set OPENMETER_API_URL"
    )
    Policy(**options, api_key=KEY)
    Policy(**options, dry_run=True)


@pytest.mark.parametrize("bad", ["", "with space", "line\nbreak", "ключ"])
def test_a_bad_key_is_not_repeated_in_the_error(bad: str) -> None:
    assert bad.strip() == "" or bad not in problem(api_key=f"{KEY}{bad}\x00")
    assert KEY not in problem(api_key=f"{KEY} {bad}\x00")


def test_the_key_is_in_no_repr() -> None:
    policy = Policy(api_key=KEY, entitlements_api_key=KEY)

    assert KEY not in repr(policy)
    assert KEY not in repr(policy.key)


def test_a_policy_is_frozen_equal_and_can_be_changed_in_a_copy(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    policy = Policy(
        api_key_file=str(file),
        meter=[{"type": "a", "data": {}}],
        meters={"b": 1},
        subject="header:X-Customer-Id",
        meter_on_status_codes=[200],
    )

    copy = dataclasses.replace(policy, batch_size=7)

    assert copy.batch_size == 7
    assert dataclasses.replace(copy, batch_size=500) == policy
    assert copy.static_meters == policy.static_meters
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.batch_size = 3  # type: ignore[misc]


def test_static_meters_are_numbers_then_documents_without_zeros() -> None:
    policy = Policy(
        api_url=LOCAL,
        meter={"type": "doc", "data": {"n": 2}},
        meters={"one": 1, "zero": 0, "half": 0.5},
    )

    assert [(m.type, m.data) for m in policy.static_meters] == [
        ("one", b'{"total":1}'),
        ("half", b'{"total":0.5}'),
        ("doc", b'{"n":2}'),
    ]


def test_variables_say_what_keywords_leave_out() -> None:
    environ = {
        "OPENMETER_API_KEY": f" {KEY}\n",
        "OPENMETER_API_URL": LOCAL + "/",
        "OPENMETER_BATCH_SIZE": "7",
        "OPENMETER_FLUSH_INTERVAL": "0.5",
        "OPENMETER_DRY_RUN": "true",
        "OPENMETER_METERS": '{"api_requests": 1}',
        "OPENMETER_METER": '{"type": "a", "data": {"b": 2}}',
        "OPENMETER_METER_ON_STATUS_CODES": "2xx",
        "OPENMETER_SUBJECT": "header:X-Customer-Id",
        "OPENMETER_ON_ABORT": "none",
        "OPENMETER_EVENT_SOURCE": "",
    }

    policy = Policy.from_env(environ, batch_size=8)

    assert policy.key.current() == KEY
    assert policy.api_url == LOCAL
    assert (policy.batch_size, policy.flush_interval) == (8, 0.5)
    assert policy.dry_run
    assert [meter.type for meter in policy.static_meters] == ["api_requests", "a"]
    assert policy.meter_on_status_codes == StatusCodes("200-299")
    assert policy.event_source == "openmeter_wsgi"
    assert policy.on_abort == "none"


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("OPENMETER_BATCH_SIZE", "many"),
        ("OPENMETER_FLUSH_INTERVAL", "soon"),
        ("OPENMETER_DRY_RUN", "perhaps"),
        ("OPENMETER_METERS", "api_requests=1"),
        ("OPENMETER_ON_ABORT", "some"),
    ],
)
def test_a_variable_that_cannot_be_read_is_named(variable: str, text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Policy.from_env({"OPENMETER_API_URL": LOCAL, variable: text})

    assert variable.removeprefix("OPENMETER_") in str(refused.value).upper()
    assert repr(text) in str(refused.value)


def test_a_misspelt_variable_is_warned_of_and_a_strange_one_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        Policy.from_env(
            {
                "OPENMETER_API_URL": LOCAL,
                "OPENMETER_BATCHSIZE": "7",
                "OPENMETER_HELM_RELEASE": "x",
            }
        )

    assert "did you mean OPENMETER_BATCH_SIZE" in caplog.text
    assert "HELM" not in caplog.text


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_a_file_says_what_variables_and_keywords_leave_out(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / f"policy.{suffix}"
    if suffix == "json":
        options = {"api_url": LOCAL, "batch_size": 7, "meters": {"a": 1}}
        file.write_text(json.dumps({**options, "flush_interval": 2}))
    else:
        file.write_text(
            f'api_url = "{LOCAL}"\nbatch_size = 7\nflush_interval = 2\n'
            "[meters]\na = 1\n"
        )
    monkeypatch.setenv("OPENMETER_BATCH_SIZE", "8")

    policy = Policy.from_file(file, flush_interval=3)

    assert (policy.batch_size, policy.flush_interval) == (8, 3.0)
    assert policy.static_meters[0].data == b'{"total":1}'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("missing.toml", None),
        ("broken.toml", "api_url = "),
        ("broken.json", "{"),
        ("list.json", "[]"),
        ("binary.toml", b"\xff\xfe"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: str | bytes | None
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())

    with pytest.raises(ConfigError, match=name):
        Policy.from_file(file)


def test_the_middleware_takes_a_policy_options_or_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        return []

    monkeypatch.setenv("OPENMETER_API_URL", LOCAL)
    policy = Policy(api_url="http://127.0.0.1:9999", batch_size=5)

    assert OpenMeterMiddleware(app, batch_size=3).policy.api_url == LOCAL
    assert OpenMeterMiddleware(app, policy).policy is policy
    assert OpenMeterMiddleware(app, policy, batch_size=3).policy == dataclasses.replace(
        policy, batch_size=3
    )
    with pytest.raises(ConfigError, match="did you mean 'batch_size'"):
        OpenMeterMiddleware(app, batchsize=3)
    with pytest.raises(ConfigError, match="did you mean 'batch_size'"):
        OpenMeterMiddleware(app, policy, batchsize=3)


def test_the_reference_is_a_source_as_the_server_parses_it() -> None:
    for source in (
        "my-api",
        "https://api.example.com/v1",
        "urn:uuid:1",
        "a/b:c",
        "%41",
    ):
        assert Policy(api_url=LOCAL, event_source=source).event_source == source
    for source in ("1a:b", ":b", "http://[::1", "http://h:x", "a b", "ü", "a%4"):
        assert "event_source" in problem(event_source=source)

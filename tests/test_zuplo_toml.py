"""Zuplo's configuration as a file of ours, and the command that prints it."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from openmeter_wsgi import ConfigError, Policy, cli
from openmeter_wsgi.cli.import_zuplo import command
from openmeter_wsgi.zuplo import Translation, read_policies, to_toml, translate

FIXTURES = Path(__file__).parent / "fixtures" / "zuplo"

#: The default of Zuplo, where a file names no source.
SOURCE = {"event_source": "api-gateway"}


def toml(name: str, **environ: str) -> str:
    return to_toml(translate(read_policies(FIXTURES / name, environ)))


def imported(*arguments: object, **environ: str | None) -> Result:
    return CliRunner().invoke(command, ["zuplo", *map(str, arguments)], env=environ)


def by_rule(policy: Policy) -> dict[str, Policy | None]:
    return {rule.text: own for rule, own in policy.route_policies}


@pytest.mark.parametrize(
    "name",
    [
        "openmeter-one-meter.json",
        "openmeter-several-meters.json",
        "openmeter-status-codes.json",
        "monetization.json",
        "monetization-without-handler.json",
        "monetization-first-version.json",
    ],
)
def test_the_file_makes_the_policy_that_zuplo_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "openmeter.toml"
    file.write_text(toml(name))
    said = translate(read_policies(FIXTURES / name, {})).default_options or {}
    monkeypatch.setenv("OPENMETER_API_KEY", "key-in-the-file")

    assert Policy.from_file(file) == Policy(
        **{"api_key": "key-in-the-file", **SOURCE, **said}
    )


def test_the_key_is_never_written() -> None:
    text = toml("openmeter.json", OPENMETER_API_KEY="om_secret")

    assert "om_secret" not in text
    assert "\n# The key is read from the variable OPENMETER_API_KEY.\n" in text
    assert "key-in-the-file" not in toml("openmeter-one-meter.json")
    assert "OPENMETER_API_KEY" in toml("openmeter-one-meter.json")


def test_a_feature_that_openmeter_cannot_have_is_written_by_another_key() -> None:
    text = toml("openmeter.json", OPENMETER_API_KEY="om_secret")

    comment, *_ = text.splitlines()
    assert comment.startswith("# ")
    assert "requiredEntitlements[0]: " in comment
    assert "'map-tile'" in comment
    assert "'map_tile'" in comment
    assert '\nrequired_entitlements = ["map_tile"]\n' in text


def test_a_variable_of_another_name_is_told() -> None:
    policy = {"type": "openmeter-inbound", "options": {"apiKey": "$env(A)$env(B)"}}
    text = to_toml(translate(read_policies(json.dumps(policy), {"A": "1", "B": "2"})))

    assert (
        text == "# Set the variable OPENMETER_API_KEY to the value of A and B.\n"
        'event_source = "api-gateway"\n'
    )


def test_routes_are_tables_and_false_where_nothing_is_metered() -> None:
    result = imported(
        FIXTURES / "gateway.policies.json",
        "--routes",
        FIXTURES / "gateway.routes.oas.json",
    )

    assert result.exit_code == 0
    assert result.stderr == "left out, as they do not meter: mock, keys\n"
    options = {
        "subject_path": ".data.openmeter.subjectId",
        "event_source": "$env(OPENMETER_SOURCE)",
        "meter": {"type": "request", "data": {"value": 1}},
        "required_entitlements": ["requests"],
    }
    assert tomllib.loads(result.stdout) == {
        **SOURCE,
        "routes": {
            "PUT /maps/public": False,
            "*": False,
            "GET /maps": options,
            "PUT /maps/<map_id>": options,
        },
    }
    assert (
        "# Not taken over: GET /maps: inbound[1]: no policy is named" in result.stdout
    )


def test_several_files_of_routes_are_one(tmp_path: Path) -> None:
    files = []
    for name, policy in [("a", "standard"), ("b", "language"), ("c", "bulk")]:
        route = {"x-zuplo-route": {"policies": {"inbound": [policy]}}}
        document = {"paths": {f"/{name}": {"get": route}, "/all": {"get": route}}}
        file = tmp_path / f"{name}.oas.json"
        file.write_text(json.dumps(document))
        files += ["--routes", file]

    result = imported(FIXTURES / "monetization-three.json", *files)

    assert tomllib.loads(result.stdout)["routes"] == {
        "GET /a": {"meters": {"searches": 1}},
        "GET /all": {"meters": {"searches": 1}},
        "GET /b": {"meters": {"searches": 1, "tokens": 1}},
        "GET /c": {"meters": {"credits": 10}},
        "*": False,
    }


def test_the_file_has_the_routes_of_the_policy_in_code(tmp_path: Path) -> None:
    routes = tmp_path / "routes.oas.json"
    route = {"x-zuplo-route": {"policies": {"inbound": ["standard"]}}}
    routes.write_text(json.dumps({"paths": {"/a": {"get": route}}}))
    policies = FIXTURES / "monetization-three.json"
    file = tmp_path / "openmeter.toml"

    assert imported(policies, "--routes", routes, "--output", file).exit_code == 0

    in_code = Policy.from_zuplo(policies, routes, api_url="http://a")
    in_file = Policy.from_file(file, api_url="http://a")
    assert by_rule(in_file) == by_rule(in_code)
    assert by_rule(in_file).keys() == {"GET /a", "*"}


def test_the_command_needs_no_variable_and_shows_none() -> None:
    result = imported(FIXTURES / "gateway.policies.json", OPENMETER_SOURCE="s3cr3t")

    assert result.exit_code == 0
    assert "s3cr3t" not in result.output
    assert 'event_source = "$env(OPENMETER_SOURCE)"' in result.stdout
    assert (
        "# Replace each reference to a variable by its value: OPENMETER_SOURCE.\n"
        in result.stdout
    )
    assert (
        "# Set the variable OPENMETER_API_URL to the value of OPENMETER_URL.\n"
        in result.stdout
    )
    assert "$env(OPENMETER_URL)" not in result.stdout


def test_a_file_with_a_reference_is_no_policy(tmp_path: Path) -> None:
    file = tmp_path / "openmeter.toml"
    imported(FIXTURES / "gateway.policies.json", "--output", file)

    with pytest.raises(ConfigError) as refused:
        Policy.from_file(file)

    (problem,) = refused.value.problems
    assert problem == (
        f"{str(file)!r}: expected values, got '$env(OPENMETER_SOURCE)' of Zuplo's "
        "file: replace each reference by its value"
    )


def test_the_command_writes_a_file_and_replaces_none(tmp_path: Path) -> None:
    file = tmp_path / "openmeter.toml"
    arguments = (FIXTURES / "monetization.json", "--output", file)

    first, second = imported(*arguments), imported(*arguments)

    assert (first.exit_code, first.stdout) == (0, "")
    assert Policy.from_file(file, api_key="k").static.numbers == {"searches": 1}
    assert second.exit_code == 1
    assert second.stderr == f"Error: {str(file)!r} exists\n"


def test_json_says_the_same_and_its_comments_go_elsewhere() -> None:
    files = [
        FIXTURES / "gateway.policies.json",
        "--routes",
        FIXTURES / "gateway.routes.oas.json",
    ]
    in_toml, in_json = (imported(*files, *options) for options in ([], ["--json"]))

    lines = in_toml.stdout.splitlines()
    comments = [line[2:] for line in lines if line.startswith("# ")]
    assert json.loads(in_json.stdout) == tomllib.loads(in_toml.stdout)
    assert comments
    assert in_json.stderr.splitlines()[: len(comments)] == comments


def test_the_command_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(FIXTURES / "monetization.json")
    monkeypatch.setattr("sys.argv", ["openmeter-wsgi", "import", "zuplo", file])

    with pytest.raises(SystemExit) as ended:
        cli.main()

    assert ended.value.code == 0
    assert "meters = { searches = 1 }" in capsys.readouterr().out


def test_nothing_in_a_file_steers_the_terminal_or_leaves_its_comment() -> None:
    name = "\x1b[31m\napi_url = 1\x85\u2028"
    text = to_toml(Translation({}, {}, [name]))

    assert tomllib.loads(text) == SOURCE
    assert "\x1b" not in text
    assert len(text.splitlines()) == 2


def test_null_is_refused_with_its_place() -> None:
    options = {"meter": [{"type": "a", "data": {"b": [None]}}]}

    with pytest.raises(ConfigError) as refused:
        to_toml(Translation(options, {}, []))

    assert refused.value.problems == (
        "meter[0].data.b[0]: expected a value of TOML, got null",
    )


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
VALUES = st.recursive(
    st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3)
    ),
    max_leaves=5,
)
OPTIONS = st.dictionaries(TEXT.map("x".__add__), VALUES, max_size=4)


@given(OPTIONS)
def test_whatever_it_says_is_read_back(options: dict[str, Any]) -> None:
    assert tomllib.loads(to_toml(Translation(options, {}, []))) == {**SOURCE, **options}


@given(st.dictionaries(TEXT, st.none() | OPTIONS, max_size=4))
def test_whatever_its_routes_are_is_read_back(routes: dict[str, Any]) -> None:
    read = tomllib.loads(to_toml(Translation(None, routes, [])))

    assert read["routes"] == {
        rule: False if options is None else options
        for rule, options in {**routes, "*": None}.items()
    }

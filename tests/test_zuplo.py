"""Zuplo's policies.json and routes.oas.json, read as they are."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmeter_wsgi import ConfigError, Policy
from openmeter_wsgi.zuplo import read_policies, read_routes, translate

FIXTURES = Path(__file__).parent / "fixtures" / "zuplo"
ENVIRON = {
    "OPENMETER_API_KEY": "om_secret",
    "OPENMETER_SOURCE": "maps",
    "OPENMETER_URL": "https://openmeter.example",
}
SEARCH = {"type": "search", "data": {"index": "places"}}
IN_FILE = {"api_key": "key-in-the-file"}


def openmeter(name: str | None = "metering", **options: Any) -> dict[str, Any]:
    """Return an openmeter-inbound policy as in a policies.json."""
    handler = {"export": "OpenMeterInboundPolicy", "options": options}
    return {"name": name, "policyType": "openmeter-inbound", "handler": handler}


def monetization(name: str = "monetization", **options: Any) -> dict[str, Any]:
    return {"name": name, "type": "monetization-inbound", "options": options}


def group(name: str, *members: str) -> dict[str, Any]:
    handler = {"export": "CompositeInboundPolicy", "options": {"policies": members}}
    return {"name": name, "handler": handler}


def other(name: str) -> dict[str, Any]:
    return {"name": name, "policyType": "rate-limit-inbound", "handler": {}}


def read(*policies: Any, **environ: str) -> list[Any]:
    return read_policies(json.dumps({"policies": policies}), environ)


def options(*policies: Any, **environ: str) -> dict[str, Any]:
    """Return the options of the first of *policies*."""
    found: dict[str, Any] = read(*policies, **environ)[0].options
    return found


def problems(*policies: Any, **environ: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as refused:
        read(*policies, **environ)
    return refused.value.problems


def refused(policies: list[Any], routes: dict[str, list[str]] | None) -> str:
    with pytest.raises(ConfigError) as error:
        translate(policies, routes)
    return str(error.value)


def document(**paths: Any) -> str:
    """Return routes.oas.json; by path the methods, by method the inbound policies."""
    return json.dumps({"openapi": "3.1.0", "paths": paths})


def inbound(*names: str) -> dict[str, Any]:
    return {"x-zuplo-route": {"policies": {"inbound": names}}}


DOCUMENTED = {
    "openmeter": {
        "api_key": "om_secret",
        "meter": {"type": "map-tile", "data": {"tiles": 1}},
        "required_entitlements": ["map_tile"],
    },
    "openmeter-without-meter": {
        "api_url": "https://openmeter.example",
        "event_source": "map-gateway",
        "required_entitlements": ["tiles", "search", "sso"],
        "subject_path": ".data.tenantId",
    },
    "openmeter-one-meter": {
        **IN_FILE,
        "meter": {"type": "search", "data": {"index": "places", "plan": "gold"}},
    },
    "openmeter-several-meters": {
        **IN_FILE,
        "meter": [SEARCH, {"type": "traffic", "data": {"bytes": 512}}],
    },
    "openmeter-entitlements": {
        **IN_FILE,
        "meter": SEARCH,
        "required_entitlements": ["search", "gold_plan"],
    },
    "openmeter-status-codes": {
        **IN_FILE,
        "meter_on_status_codes": "200-299,304",
        "meter": {"type": "search"},
    },
    "gateway.policies": {
        "api_key": "om_secret",
        "subject_path": ".data.openmeter.subjectId",
        "event_source": "maps",
        "api_url": "https://openmeter.example",
        "meter": {"type": "request", "data": {"value": 1}},
        "required_entitlements": ["requests"],
    },
    "monetization": {"meters": {"searches": 1}},
    "monetization-entitlements": {
        "allow_ttl": 60,
        "meters": {"searches": 1},
        "required_entitlements": ["own_maps"],
    },
    "monetization-without-handler": {
        "meters": {"api": 1},
        "meter_on_status_codes": "200-299",
    },
    "monetization-first-version": {
        "meter_on_status_codes": "200-299",
        "meters": {"searches": 2, "credits": 5},
    },
    "monetization-handler-alone": {"meters": {"searches": 1, "credits": 5}},
    "group.policies": {"meters": {"searches": 1}},
}


def entitled(*features: str, kind: str = "openmeter-inbound", **options: Any) -> Any:
    said = {"requiredEntitlements": features, **options}
    return read_policies(
        json.dumps([{"type": kind, "options": said}]), {"FEATURE": "Map Tiles"}
    )


def test_a_feature_gets_the_key_that_openmeter_takes_for_it() -> None:
    (policy,) = entitled("api-request", "fine", "api_request", "$env(FEATURE)")

    assert policy.options["required_entitlements"] == [
        "api_request", "fine", "map_tiles",
    ]  # fmt: skip
    assert [place.rpartition(".")[2] for place, _ in policy.ignored] == [
        "requiredEntitlements[0]", "requiredEntitlements[3]",
    ]  # fmt: skip
    assert "'api_request' is used instead" in policy.ignored[0][1]


def test_a_feature_that_no_key_is_like_is_a_problem() -> None:
    with pytest.raises(ConfigError, match="requiredEntitlements: OpenMeter takes no"):
        entitled("日本")


def test_a_meter_that_is_asked_for_by_another_key_is_asked_for() -> None:
    (policy,) = entitled(
        "own-maps", kind="monetization-inbound", meters={"own-maps": 1}
    )

    assert not [why for _, why in policy.ignored if "without a balance" in why]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_documented_form_becomes_options(name: str) -> None:
    (policy,) = [
        policy
        for policy in read_policies(FIXTURES / f"{name}.json", ENVIRON)
        if policy.metered
    ]

    assert policy.options == DOCUMENTED[name]
    assert translate([policy]).default_options == DOCUMENTED[name]


@pytest.mark.parametrize(
    "name", [name for name, its in DOCUMENTED.items() if not its.keys() & {
        "required_entitlements", "allow_ttl"}]
)  # fmt: skip
def test_the_options_make_a_policy(name: str) -> None:
    translation = translate(read_policies(FIXTURES / f"{name}.json", ENVIRON))

    assert translation.default_options is not None
    Policy(**{"api_key": "of-the-environment", **translation.default_options})


def test_every_fixture_is_read_by_a_test_and_its_page_named() -> None:
    pages = (FIXTURES / "README.md").read_text()
    names = {path.name for path in FIXTURES.glob("*.json")}
    read_here = {f"{name}.json" for name in DOCUMENTED}

    assert names - read_here == {
        "gateway.routes.oas.json",
        "monetization-three.json",
        "monetization-three.routes.oas.json",
    }
    assert {n for n in names if n not in pages} == {
        "gateway.policies.json",
        "gateway.routes.oas.json",
        "monetization-three.routes.oas.json",
    }


def test_policies_are_read_from_a_file_a_list_and_alone(tmp_path: Path) -> None:
    one = monetization(meters={"api": 1})
    file = tmp_path / "policies.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps({"policies": [one]}).encode())

    assert read_policies(str(file)) == read_policies(file)
    assert read_policies(file)[0].options == {"meters": {"api": 1}}
    assert read_policies(json.dumps([one]))[0].options == {"meters": {"api": 1}}
    assert read_policies(json.dumps(one))[0].options == {"meters": {"api": 1}}


def test_what_does_not_meter_is_listed_and_left_out() -> None:
    policies = read(other("limit"), monetization(meters={"api": 1}))

    assert [(p.name, p.metered, p.ignored) for p in policies[:1]] == [
        ("limit", False, [("policies[0]", "does not meter")])
    ]
    assert translate(policies).default_options == {"meters": {"api": 1}}
    assert "limit" not in " ".join(translate(policies).warnings)


def test_the_export_counts_and_not_the_type_for_the_editor() -> None:
    policy = {**openmeter(meter=SEARCH), "policyType": "my-own-type"}

    assert options(policy) == {"meter": SEARCH}


def test_a_variable_may_stand_anywhere_in_a_text() -> None:
    policy = openmeter(
        eventSource="$env(STAGE)-$env( REGION )",
        meter={"type": "a-$env(STAGE)", "data": {"deep": ["$env(STAGE)"]}},
    )

    assert options(policy, STAGE="test", REGION="eu") == {
        "event_source": "test-eu",
        "meter": {"type": "a-test", "data": {"deep": ["test"]}},
    }


def test_a_variable_that_is_missing_or_empty_is_named_with_its_place() -> None:
    meter = {"type": "a", "data": {"stage": ["$env(STAGE)"]}}

    assert problems(openmeter(apiKey="$env(KEY)", meter=meter), STAGE="") == (
        "policies[0].handler.options.apiKey: the variable 'KEY' is not set, "
        "or is empty; set it, or replace the file's value: by OPENMETER_API_KEY or "
        "api_key= (api_key=None if the server needs no key)",
        "policies[0].handler.options.meter.data.stage[0]: the variable 'STAGE' is not "
        "set, or is empty",
    )


def test_variables_of_policies_that_do_not_meter_are_not_looked_up() -> None:
    keys = {"policyType": "api-key-inbound", "options": {"bucketName": "$env(NO)"}}

    assert [policy.kind for policy in read(keys)] == ["api-key-inbound"]


def test_without_secrets_the_key_is_neither_looked_up_nor_returned() -> None:
    text = json.dumps(openmeter(apiKey="$env(A)$env(B)", eventSource="maps"))

    (policy,) = read_policies(text, {}, resolves=False)

    assert policy.options == {"event_source": "maps"}
    assert policy.key_variables == ("A", "B")


def test_a_key_is_never_shown() -> None:
    policies = read(openmeter(apiKey="$env(KEY)"), KEY="om_secret")

    assert policies[0].options == {"api_key": "om_secret"}
    assert "om_secret" not in repr(policies)
    assert "om_secret" not in repr(translate(policies))


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"apiKey": "om_secret"}),
        json.dumps(["om_secret"]),
        json.dumps(openmeter(apiKey=["om_secret"])),
        json.dumps({"type": "openmeter-inbound", "options": ["om_secret"]}),
        json.dumps({"policies": "om_secret"}),
        json.dumps({"policies": [["om_secret"]]}),
    ],
)
def test_no_problem_shows_a_key(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_policies(text, {})

    assert "om_secret" not in str(refused.value)


def test_what_has_no_meaning_here_is_listed_with_its_place() -> None:
    policy = monetization(
        meters={"api": 1, "asked": 2},
        requiredEntitlements=["asked"],
        authHeader="x-key",
        bucketId="b",
    )
    (found,) = read({**policy, "$comment": "…"})

    assert [place for place, _ in found.ignored] == [
        "policies[0].$comment",
        "policies[0].options.authHeader",
        "policies[0].options.bucketId",
        "policies[0].options.meters",
    ]
    assert "'api'; required_entitlements does so here" in found.ignored[3][1]
    assert translate([found]).warnings == [f"{p}: {why}" for p, why in found.ignored]


def test_the_cache_of_what_is_not_asked_is_left_out() -> None:
    (policy,) = read(monetization(meters={"api": 1}, cacheTtlSeconds=90))

    assert policy.options == {"meters": {"api": 1}}
    assert policy.ignored[-1][0] == "policies[0].options.cacheTtlSeconds"


def test_empty_options_say_nothing() -> None:
    assert options(openmeter(meter=[], requiredEntitlements=[])) == {}
    assert options(monetization(meters={})) == {}


@pytest.mark.parametrize(
    ("policy", "problem"),
    [
        (
            openmeter(meterOnStatusCode="200"),
            "policies[0].handler.options.meterOnStatusCode: unknown option "
            "(did you mean 'meterOnStatusCodes'?)",
        ),
        (
            openmeter(api_key="k"),
            "policies[0].handler.options.api_key: unknown option "
            "(did you mean 'apiKey'?)",
        ),
        (
            openmeter(meters={"a": 1}),
            "policies[0].handler.options.meters: unknown option "
            "(did you mean 'meter'?)",
        ),
        (
            openmeter(meterOnStatusCodes="*"),
            "policies[0].handler.options.meterOnStatusCodes: '*' would bill errors "
            "too: write '200-599' if that is what you mean",
        ),
        (
            openmeter(apiKey=5),
            "policies[0].handler.options.apiKey: expected text, got int",
        ),
        (
            openmeter(eventSource=" "),
            "policies[0].handler.options.eventSource: expected text that is not empty",
        ),
        (
            openmeter(meter="search"),
            "policies[0].handler.options.meter: expected {'type': …, 'data': {…}}, "
            "got 'search'",
        ),
        (
            openmeter(meter={"type": "a", "dta": {}}),
            "policies[0].handler.options.meter: meter 'a': unknown key 'dta', "
            "expected one of type, data, id, subject, source, time",
        ),
        (
            openmeter(meter={"type": "a", "id": "1"}),
            "policies[0].handler.options.meter: meter 'a': with the same id for every "
            "request, only one would be billed",
        ),
        (
            openmeter(meter=[{"type": "b", "time": "2026-01-01T00:00:00Z"}]),
            "policies[0].handler.options.meter: meter 'b': with the same time for "
            "every request, only one would be billed",
        ),
        (
            openmeter(requiredEntitlements="a"),
            "policies[0].handler.options.requiredEntitlements: expected a list of "
            "names, got 'a'",
        ),
        (
            monetization(meters=["api"]),
            "policies[0].options.meters: expected a mapping of meter to number, "
            "got ['api']",
        ),
        (
            monetization(meters={"api": -1}),
            "policies[0].options.meters: meter 'api': expected a number, finite and "
            "not negative, got -1",
        ),
        (
            monetization(meters={"type": "api"}),
            "policies[0].options.meters: meter 'type': expected a number, got 'api'",
        ),
        (
            monetization(cacheTtlSeconds="60"),
            "policies[0].options.cacheTtlSeconds: expected a number of seconds above "
            "0, got '60'",
        ),
        (
            monetization(cacheTtlSeconds=True),
            "policies[0].options.cacheTtlSeconds: expected a number of seconds above "
            "0, got True",
        ),
        (
            {"name": 5, "type": "rate-limit-inbound"},
            "policies[0].name: expected a name, got 5",
        ),
        (
            {"name": "a", "options": {}},
            "policies[0].policyType: expected the type of a policy, got None",
        ),
        (
            {"policyType": "openmeter-metering-inbound"},
            "policies[0].policyType: expected 'openmeter-inbound', "
            "got 'openmeter-metering-inbound'",
        ),
        (
            {**openmeter(), "handler": {"export": "OpenMeterInbound"}},
            "policies[0].handler: expected the export of a policy of the type "
            "'openmeter-inbound', got 'OpenMeterInbound' "
            "(did you mean 'OpenMeterInboundPolicy'?)",
        ),
        (
            {**openmeter(), "options": {}},
            "policies[0].options: expected options once, got the handler's too",
        ),
        (
            {"type": "openmeter-inbound", "options": 5},
            "policies[0].options: expected an object",
        ),
        (
            group("all", ""),
            "policies[0].handler.options.policies: expected a list of names, got ['']",
        ),
    ],
)
def test_each_problem_is_told_with_its_place(policy: Any, problem: str) -> None:
    assert problems(policy) == (problem,)


def test_all_problems_are_told_at_once() -> None:
    told = problems(openmeter("a", apiKey=1, meter=2), openmeter("a", subjctPath=".a"))

    assert [text.partition(":")[0] for text in told] == [
        "policies[0].handler.options.apiKey",
        "policies[0].handler.options.meter",
        "policies[1].handler.options.subjctPath",
        "policies[1].name",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "the text: Input data was truncated"),
        ("{}", "expected a policy or a list of them, got the keys []"),
        ('{"policies": 5}', "policies: expected a list of policies"),
        ("[5]", "[0]: expected an object"),
    ],
)
def test_what_is_no_policies_json_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_policies(text, {})

    assert refused.value.problems == (problem,)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "bytes.json").write_bytes(b"\xff")
    (tmp_path / "number.json").write_bytes(b"5")

    for name, problem in [
        ("missing.json", "No such file or directory"),
        ("bytes.json", "can't decode byte"),
        ("number.json", "the document: expected a list of policies"),
    ]:
        with pytest.raises(ConfigError, match=problem) as refused:
            read_policies(tmp_path / name, {})
        assert name in str(refused.value) or name == "number.json"


# -- Routes


def test_the_routes_of_a_gateway_are_those_of_its_document() -> None:
    policies = read_policies(FIXTURES / "gateway.policies.json", ENVIRON)
    routes = read_routes(FIXTURES / "gateway.routes.oas.json", policies)

    assert routes == {
        "GET /maps": ["keys", "check-balance", "meter-everything"],
        "POST /maps": ["keys", "check-balance"],
        "PUT /maps/<map_id>": ["keys", "meter-everything"],
        "DELETE /maps/<map_id>": [],
        "PUT /maps/public": ["keys"],
    }
    translation = translate(policies, routes)
    metered = DOCUMENTED["gateway.policies"]
    assert translation.default_options is None
    assert translation.routes == {
        "GET /maps": metered,
        "PUT /maps/<map_id>": metered,
        "PUT /maps/public": None,
    }
    assert translation.delivery == {
        "api_key": "om_secret",
        "api_url": "https://openmeter.example",
    }
    assert [text for text in translation.warnings if "check-balance" in text] == [
        "GET /maps: inbound[1]: no policy is named 'check-balance'",
        "POST /maps: inbound[1]: no policy is named 'check-balance'",
    ]


def test_each_route_has_its_own_policy() -> None:
    policies = read_policies(FIXTURES / "monetization-three.json")
    routes = read_routes(FIXTURES / "monetization-three.routes.oas.json", policies)

    assert translate(policies, routes).routes == {
        "POST /v1/search": {"meters": {"searches": 1}},
        "POST /v1/summarize": {"meters": {"searches": 1, "tokens": 1}},
        "POST /v1/export": {"meters": {"credits": 10}},
    }


def test_a_group_stands_for_its_members() -> None:
    policies = read_policies(FIXTURES / "group.policies.json")

    translation = translate(policies, {"GET /": ["all"]})

    assert translation.routes == {"GET /": {"meters": {"searches": 1}}}


def test_a_group_that_contains_itself_is_refused() -> None:
    policies = read(group("a", "b"), group("b", "a"), monetization(meters={"api": 1}))

    assert refused(policies, {"GET /": ["a"]}) == (
        "GET /: inbound[0] (a) (b): the group 'a' contains itself"
    )


def test_a_misspelt_name_of_ours_is_refused() -> None:
    policies = read(monetization(meters={"api": 1}))

    assert refused(policies, {"GET /": ["monetisation"]}) == (
        "GET /: inbound[0]: no policy is named 'monetisation' "
        "(did you mean 'monetization'?)"
    )


def test_policies_that_no_route_names_are_told() -> None:
    policies = read(monetization("a", meters={"x": 1}), monetization("b"))

    assert translate(policies, {"GET /": ["a"]}).warnings[-1] == (
        "'b': no route names it"
    )
    assert refused(policies, {"GET /": []}) == (
        "routes: expected one that names a policy that meters"
    )


def test_without_routes_there_must_be_one_policy() -> None:
    assert refused(read(other("limit")), None) == (
        "expected a policy of the type 'openmeter-inbound' or 'monetization-inbound', "
        "got none"
    )
    assert refused(read(monetization("a"), openmeter(None)), None) == (
        "routes: expected, as several policies meter: 'a', "
        "the nameless openmeter-inbound"
    )


def test_two_policies_on_a_route_add_up_their_meters() -> None:
    policies = read(
        openmeter("a", apiKey="k", meter=SEARCH, requiredEntitlements=["x", "y"]),
        monetization("b", meters={"api": 1, "credits": 2}, meterOnStatusCodes="2xx"),
        openmeter("c", meter=[{"type": "traffic"}], requiredEntitlements=["y", "z"]),
        monetization("d", meters={"api": 0.5}),
    )

    assert translate(policies, {"GET /": ["a", "b", "c", "d"]}).routes == {
        "GET /": {
            "api_key": "k",
            "meter": [SEARCH, {"type": "traffic"}],
            "meters": {"api": 1.5, "credits": 2},
            "required_entitlements": ["x", "y", "z"],
            "meter_on_status_codes": "2xx",
        }
    }


def test_a_policy_that_a_route_names_twice_counts_once() -> None:
    policies = read(monetization(meters={"api": 1}), group("all", "monetization"))

    translation = translate(policies, {"GET /": ["monetization", "all"]})

    assert translation.routes == {"GET /": {"meters": {"api": 1}}}
    assert (
        "GET /: 'monetization' is named twice, and counts once" in translation.warnings
    )


@pytest.mark.parametrize(
    ("one", "another", "name"),
    [
        ({"subjectPath": ".data.id"}, {}, "subject_path"),
        ({"eventSource": "a"}, {"eventSource": "b"}, "event_source"),
        ({"meterOnStatusCodes": [201]}, {}, "meter_on_status_codes"),
    ],
)
def test_two_policies_on_a_route_must_agree_in_all_else(
    one: dict[str, Any], another: dict[str, Any], name: str
) -> None:
    policies = read(openmeter("a", **one), openmeter("b", **another))

    assert refused(policies, {"GET /": ["a", "b"]}) == (
        f"GET /: {name}: expected the same value in all policies of a route, "
        "they differ: 'a', 'b'"
    )


def test_what_is_a_default_of_zuplos_agrees_with_what_is_left_out() -> None:
    stated = {
        "subjectPath": ".sub",
        "eventSource": "api-gateway",
        "meterOnStatusCodes": "200-299",
    }
    policies = read(openmeter("a", **stated), openmeter("b"))

    assert translate(policies, {"GET /": ["b", "a"]}).routes["GET /"] is not None


def test_numbers_that_add_up_to_no_number_are_refused() -> None:
    policies = read(*(monetization(name, meters={"x": 1e308}) for name in "ab"))

    assert "is too large" in refused(policies, {"GET /": ["a", "b"]})


def test_all_routes_share_the_server_and_its_key() -> None:
    policies = read(
        openmeter("a", apiKey="secret", apiUrl="https://a.example"), monetization("b")
    )
    delivery = {"api_key": "secret", "api_url": "https://a.example"}

    translation = translate(policies, {"GET /a": ["a"], "GET /b": ["b"]})

    assert translation.routes == {"GET /a": delivery, "GET /b": delivery}
    assert translation.delivery == delivery


def test_two_servers_or_keys_are_refused_and_the_keys_not_shown() -> None:
    policies = read(
        openmeter("a", apiKey="secret-a", apiUrl="https://a.example"),
        openmeter("b", apiKey="secret-b", apiUrl="https://b.example"),
    )
    told = refused(policies, {"GET /a": ["a"], "GET /b": ["b"]})

    assert [line.partition(":")[0] for line in told.splitlines()] == [
        "api_key",
        "api_url",
    ]
    assert "secret" not in told
    text = json.dumps([openmeter(n, apiKey=f"$env(K{n})") for n in "ab"])
    unread = read_policies(text, {}, resolves=False)
    assert refused(unread, {"GET /a": ["a"], "GET /b": ["b"]}).startswith("api_key")


def test_the_more_exact_rule_governs_and_a_different_order_is_told() -> None:
    policies = read(monetization("a", meters={"x": 1}), monetization("b"))
    by_id, by_name = "GET /users/<id>", "GET /users/me"

    exact_first = translate(policies, {by_name: [], by_id: ["a"]})
    exact_last = translate(policies, {by_id: ["a"], by_name: ["b"]})
    apart = translate(policies, {by_id: ["a"], "GET /users": [], "POST /users/me": []})

    assert exact_first.routes == {by_name: None, by_id: {"meters": {"x": 1}}}
    assert not [text for text in exact_first.warnings if "comes first" in text]
    assert exact_last.warnings[-1] == (
        "GET /users/me: Zuplo would use GET /users/<id>, which comes first in "
        "the file; here the more specific rule governs"
    )
    assert list(apart.routes) == [by_id]


def test_a_route_that_is_not_metered_keeps_out_of_a_wildcard() -> None:
    policies = read(monetization(meters={"x": 1}))
    text = document(
        **{
            "/v1/health/live": {"get": inbound()},
            "/v1/(.*)": {"get": inbound("monetization")},
        }
    )

    assert translate(policies, read_routes(text)).routes == {
        "GET /v1/health/live": None,
        "GET /v1/": {"meters": {"x": 1}},
        "GET /v1/<path:rest>": {"meters": {"x": 1}},
    }


def test_of_the_same_rule_the_first_holds() -> None:
    text = document(
        **{
            "/a/{x}": {"get": inbound("one")},
            "/a/:x": {"get": inbound("other")},
        }
    )

    assert read_routes(text) == {"GET /a/<x>": ["one"]}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[]", "paths: expected the paths of an OpenAPI document, got none"),
        (document(**{"/a": 5}), "paths['/a']: expected an object, got 5"),
        (document(**{"/a": {"get": 5}}), "paths['/a'].get: expected an object, got 5"),
        (
            document(**{"/a": {"get": inbound(), "x-zuplo-path": {"pathMode": "re"}}}),
            None,
        ),
        (
            document(
                **{"/a": {"get": inbound("x"), "x-zuplo-path": {"pathMode": "re"}}}
            ),
            "paths['/a'].get: pathMode: expected 'open-api' or 'url-pattern', got 're'",
        ),
        (
            document(**{"/a": {"get": {"x-zuplo-route": {"policies": ["x"]}}}}),
            "paths['/a'].get.x-zuplo-route.policies: expected an object, got ['x']",
        ),
        (
            document(
                **{"/a": {"get": {"x-zuplo-route": {"policies": {"inbound": "x"}}}}}
            ),
            "paths['/a'].get.x-zuplo-route.policies.inbound: expected a list of names, "
            "got 'x'",
        ),
        (
            document(
                **{
                    "/(a?b)": {
                        "get": inbound("x"),
                        "x-zuplo-path": {"pathMode": "url-pattern"},
                    }
                }
            ),
            "paths['/(a?b)'].get: expected a path that a rule can express, "
            "got (a?b) in it",
        ),
    ],
)
def test_problems_of_routes_are_told_with_their_place(
    text: str, problem: str | None
) -> None:
    if problem is None:
        assert read_routes(text) == {}
        return
    with pytest.raises(ConfigError) as refused:
        read_routes(text)

    assert refused.value.problems == (problem,)


def test_a_path_that_no_rule_can_say_is_no_problem_where_nothing_meters() -> None:
    policies = read(other("limit"), monetization(meters={"x": 1}))
    text = document(**{"/{": {"get": inbound("limit"), "post": inbound()}})

    assert read_routes(text, policies) == {}
    with pytest.raises(ConfigError):
        read_routes(text, read(group("limit", "monetization")))
    with pytest.raises(ConfigError):
        read_routes(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["policies", "name", "type", "handler", "options", "meter", "meters",
             "export", "apiKey", "data", "paths", "get", "x-zuplo-route", "inbound"]
        )
        | st.text(max_size=3),
        inner,
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@given(JSON)
def test_any_document_is_read_or_refused_as_a_configuration(value: Any) -> None:
    with suppress(ConfigError):
        read_policies(json.dumps([value]), {})
    with suppress(ConfigError):
        read_policies(json.dumps([monetization("a", meters=value)]), {})
    with suppress(ConfigError):
        read_policies(json.dumps([openmeter("a", meter=value)]), {})
    with suppress(ConfigError):
        read_routes(json.dumps({"paths": value}))


# -- Values of variables are secrets

SECRET = "s3cr3t"


@pytest.mark.parametrize(
    ("options", "quoted"),
    [
        ({"meterOnStatusCodes": "$env(X)"}, "expected '200', '200-299' or '2xx'"),
        ({"meterOnStatusCodes": ["200", "$env(X)"]}, "['200', '$env(X)']"),
        ({"requiredEntitlements": ["$env(X)", 3]}, "['$env(X)', 3]"),
        ({"apiUrl": "$env(X)"}, "expected a URL such as https://openmeter.cloud"),
        ({"apiUrl": "ftp://$env(X)"}, "'ftp://$env(X)'"),
        ({"subjectPath": "$env(X).."}, "'$env(X)..'"),
        ({"meter": {"type": "$env(X)", "data": {}, "id": "a"}}, "$env(X)"),
        ({"meter": {"type": "a", "source": " $env(X)"}}, "$env(X)"),
    ],
)
def test_an_error_quotes_the_reference_and_not_the_value(options, quoted, monkeypatch):
    monkeypatch.setenv("X", SECRET)
    monkeypatch.setenv("OPENMETER_API_KEY", "om_secret")

    with pytest.raises(ConfigError) as refused:
        Policy.from_zuplo(json.dumps(openmeter(**options)))

    assert SECRET not in str(refused.value)
    assert quoted in str(refused.value)


def test_a_line_of_the_log_quotes_the_reference_and_not_the_value(monkeypatch, caplog):
    monkeypatch.setenv("X", "s3cr3t-name")
    monkeypatch.setenv("OPENMETER_API_KEY", "om_secret")

    policy = Policy.from_zuplo(json.dumps(openmeter(requiredEntitlements=["$env(X)"])))

    assert policy.required_entitlements == ("s3cr3t_name",)
    assert "'$env(X)'" in caplog.text
    assert "s3cr3t" not in caplog.text


# -- A policy, in whichever way it is used


def test_variables_outdo_the_file_and_options_outdo_both(monkeypatch):
    file = json.dumps(openmeter(apiUrl="http://a", eventSource="a", subjectPath=".a"))
    monkeypatch.setenv("OPENMETER_EVENT_SOURCE", "b")
    monkeypatch.setenv("OPENMETER_SUBJECT_PATH", ".b")

    policy = Policy.from_zuplo(file, subject_path=".c")

    found = (policy.api_url, policy.event_source, policy.subject_path)
    assert found == ("http://a", "b", ".c")


def test_a_variable_is_not_needed_where_its_option_is_replaced(monkeypatch):
    file = json.dumps(openmeter(apiKey="$env(KEY)", apiUrl="$env(URL)"))
    monkeypatch.setenv("OPENMETER_API_URL", "http://b")

    policy = Policy.from_zuplo(file, api_key=None)

    assert (policy.api_url, policy.api_key) == ("http://b", None)


def test_a_file_with_the_key_replaces_the_key_of_zuplo(tmp_path):
    secret = tmp_path / "key"
    secret.write_text("om_secret")

    policy = Policy.from_zuplo(
        json.dumps(openmeter(apiKey="$env(KEY)")), api_key_file=secret
    )

    assert policy.key.known == "om_secret"


def test_the_address_is_named_where_its_variable_is_missing():
    (problem,) = problems(openmeter(apiUrl="$env(URL)"))

    assert problem.endswith(
        "the variable 'URL' is not set, or is empty; set it, or replace the file's "
        "value: by OPENMETER_API_URL or api_url="
    )


def test_what_no_route_names_is_not_metered(tmp_path):
    routes = tmp_path / "routes.oas.json"
    routes.write_text(document(**{"/a": {"get": inbound("metering")}}))
    file = json.dumps([openmeter(apiUrl="http://a", meter={"type": "call"})])

    policy = Policy.from_zuplo(file, routes)

    assert [rule.text for rule, own in policy.route_policies if own] == ["GET /a"]


# -- Files without an end


@pytest.mark.parametrize("opening", ["[", '{"a":', '{"policies": [{"options": '])
@pytest.mark.parametrize("levels", [101, 100_000])
def test_json_that_is_nested_too_deep_is_a_problem_with_its_line(opening, levels):
    text = '{\n"policies":\n' + opening * levels

    for load in (read_policies, read_routes):
        with pytest.raises(ConfigError) as refused:
            load(text)
        (problem,) = refused.value.problems
        assert problem.endswith("line 3: expected at most 100 levels of nesting")


def test_brackets_in_a_text_are_no_levels():
    policy = openmeter(eventSource='["\\"[' + "[" * 1_000)

    assert read(policy)[0].options["event_source"].endswith("[[[")


def test_optional_pieces_that_make_too_many_rules_are_a_problem_with_their_place():
    many = "/:a" + "/:b?" * 10
    item = {"x-zuplo-path": {"pathMode": "url-pattern"}, "get": inbound("metering")}

    with pytest.raises(ConfigError) as refused:
        read_routes(document(**{many: item, "/v1" + "/:c?" * 100_000: item}))

    first, second = refused.value.problems
    assert first == (
        f"paths['{many}'].get: expected a path whose optional pieces make at most "
        "1,000 rules, got more"
    )
    assert second.startswith("paths['/v1/:c?/:c?")


def test_routes_that_make_too_many_rules_are_a_problem():
    item = {"x-zuplo-path": {"pathMode": "url-pattern"}, "get": inbound("metering")}
    paths = {f"/{n}" + "/:b?" * 9: item for n in range(20)}

    with pytest.raises(ConfigError) as refused:
        read_routes(document(**paths))

    assert refused.value.problems == (
        "paths: expected at most 5,000 rules for all routes, got more",
    )


def test_groups_that_contain_each_other_many_times_are_read_once():
    groups = [group(f"g{n}", f"g{n + 1}", f"h{n + 1}") for n in range(60)]
    groups += [group(f"h{n}", f"g{n + 1}", f"h{n + 1}") for n in range(1, 60)]
    last = [group("g60", "metering"), group("h60", "metering")]
    policies = read(*groups, *last, openmeter(meter={"type": "call"}))

    translation = translate(policies, {"GET /a": ["g0"]})

    assert translation.routes["GET /a"] == {"meter": {"type": "call"}}


def test_groups_that_are_nested_too_deep_are_a_problem_with_their_place():
    groups = [group(f"g{n}", f"g{n + 1}") for n in range(5_000)]
    policies = read(*groups, openmeter(meter={"type": "call"}))

    said = refused(policies, {"GET /a": ["g0"]})

    assert "GET /a: inbound[0] (g0)" in said
    assert "expected at most 100 levels of groups" in said
    assert len(said) < 2_000


@pytest.mark.parametrize("name", ["openmeter-one-meter", "monetization"])
def test_what_a_file_does_not_name_has_the_default_of_zuplo(name, monkeypatch) -> None:
    monkeypatch.setenv("OPENMETER_API_KEY", "key")

    policy = Policy.from_zuplo(FIXTURES / f"{name}.json")

    assert policy.event_source == "api-gateway"
    assert policy.subject_path == ".sub"
    assert policy.meter_on_status_codes.text == "200-299"

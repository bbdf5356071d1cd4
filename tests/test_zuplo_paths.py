"""The paths of Zuplo's routes as rules, matched by werkzeug itself."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.exceptions import HTTPException
from werkzeug.routing import Map, Rule

from openmeter_wsgi.zuplo.openapi import OPEN_API, URL_PATTERN, rules


def matches(made: list[str], path: str) -> bool:
    """Return True if one of the rules matches *path* unchanged."""
    table = Map(
        [Rule(rule, endpoint=rule) for rule in made],
        strict_slashes=True,
        merge_slashes=False,
    )
    try:
        table.bind("host").match(path)
    except HTTPException:
        return False
    return True


@pytest.mark.parametrize(
    ("path", "made"),
    [
        ("/", ["/"]),
        ("/v1/users", ["/v1/users"]),
        ("/users/{userId}/posts/{postId}", ["/users/<userId>/posts/<postId>"]),
        ("/users/get({userId})", ["/users/get(<userId>)"]),
        ("/maps/{map-id}", ["/maps/<map_id>"]),
        ("/maps/{1st}/{map id}/{map.id}", ["/maps/<v1st>/<map_id>/<map_id2>"]),
        ("/books:batch", ["/books:batch"]),
        ("/files/{rest*}", ["/files/<path:rest>"]),
        ("/users/(.*)", ["/users/", "/users/<path:rest>"]),
        ("/users/{id}/(.*)", ["/users/<id>/", "/users/<id>/<path:rest>"]),
        ("/users/:userId", ["/users/<userId>"]),
    ],
)
def test_a_path_of_openapi_becomes_rules(path: str, made: list[str]) -> None:
    assert rules(path, OPEN_API) == made


@pytest.mark.parametrize(
    ("path", "made", "hits", "misses"),
    [
        ("/files/:path*", ["/files", "/files/<path:path>"],
         ["/files", "/files/a/b"], ["/files/", "/file"]),
        ("/files/:path+", ["/files/<path:path>"], ["/files/a/b"], ["/files"]),
        ("/cars/:maker{/}?", ["/cars/<maker>", "/cars/<maker>/"],
         ["/cars/ford", "/cars/ford/"], ["/cars", "/cars/ford/t"]),
        ("/products/:productId/sizes/:size", ["/products/<productId>/sizes/<size>"],
         ["/products/pizza/sizes/small"], ["/products/pizza/sizes/"]),
        ("/users/:id?", ["/users", "/users/<id>"], ["/users", "/users/1"], ["/users/"]),
        ("/(.*)", ["/", "/<path:rest>"], ["/", "/a", "/a/b"], []),
        ("/users/*", ["/users/", "/users/<path:rest>"], ["/users/", "/users/a/b"],
         ["/users"]),
        ("/main/(a|b)", ['/main/<any("a","b"):rest>'], ["/main/a", "/main/b"],
         ["/main/c", "/main/ab"]),
        (r"/icon-(\d++).png", ["/icon-<int:rest>.png"], ["/icon-1234.png"],
         ["/icon-x.png", "/icon-.png"]),
        (r"products/:productId/icons/icon-:imageIndex(\d+).png",
         ["/products/<productId>/icons/icon-<int:imageIndex>.png"],
         ["/products/pizza/icons/icon-2.png"], ["/products/pizza/icons/icon-x.png"]),
        ("/foo/bar:path(/.*)", ["/foo/bar/", "/foo/bar/<path:path>"],
         ["/foo/bar/apple/banana"], ["/foo/bar", "/foo/barapple"]),
        ("/a/:x([^/]+)/:y(.+)", ["/a/<x>/<path:y>"], ["/a/1/2/3"], ["/a/1/"]),
        ("/:a/:a", ["/<a>/<a2>"], ["/x/y"], ["/x"]),
    ],
)  # fmt: skip
def test_a_url_pattern_becomes_rules_that_match_the_same(
    path: str, made: list[str], hits: list[str], misses: list[str]
) -> None:
    assert rules(path, URL_PATTERN) == made
    assert [hit for hit in hits if not matches(made, hit)] == []
    assert [miss for miss in misses if matches(made, miss)] == []


@pytest.mark.parametrize(
    ("path", "mode", "part"),
    [
        ("/(a?b)", URL_PATTERN, "(a?b)"),
        ("/a{b}?", URL_PATTERN, "'{'"),
        ("/a:x*", URL_PATTERN, "':x*'"),
        ("/:x(a|b)*", URL_PATTERN, "'/:x(a|b)*'"),
        (r"/a\:b", URL_PATTERN, "'\\\\'"),
        ("/<a>", OPEN_API, "'<'"),
        ("/{a", OPEN_API, "'{'"),
        ("/{}", OPEN_API, "'{'"),
    ],
)
def test_what_no_rule_can_say_is_named(path: str, mode: str, part: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"got {part} in it")):
        rules(path, mode)


SEGMENT = st.text("abz09-._~", min_size=1, max_size=4)


@given(st.lists(st.tuples(SEGMENT, st.booleans()), min_size=1, max_size=5))
def test_both_forms_of_a_path_match_it_and_nothing_longer(
    parts: list[tuple[str, bool]],
) -> None:
    openapi = "".join(f"/{{{part}}}" if var else f"/{part}" for part, var in parts)
    pattern = "".join(
        f"/:v{n}" if var else f"/{part}" for n, (part, var) in enumerate(parts)
    )
    path = "/" + "/".join(part for part, _ in parts)

    for made in (rules(openapi, OPEN_API), rules(pattern, URL_PATTERN)):
        assert matches(made, path)
        assert not matches(made, f"{path}/more")


@given(
    st.text("/a{}()*+?:.<>\\d|-_", max_size=12),
    st.sampled_from([OPEN_API, URL_PATTERN]),
)
def test_every_rule_that_is_made_is_one(path: str, mode: str) -> None:
    try:
        made = rules(path, mode)
    except ValueError:
        return
    for rule in made:
        Map([Rule(rule, endpoint="x")])

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import openmeter_wsgi.sandbox
from openmeter_wsgi.sandbox.app import is_allowed
from test_sandbox_support import event

PAGE = Path(openmeter_wsgi.sandbox.__file__).with_name("page")
OLD = "2020-01-01T00:00:00Z"
HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"' onmouseover=alert(1) x='",
    "javascript:alert(1)",
    "</td></table><h1>owned",
    "\x1b]0;owned\x07\x1b[31m",
    "\u202egnp.exe",
    "__proto__",
]


class Links(HTMLParser):
    """Parser of the addresses that a page loads, and of its inline scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inline: list[str] = []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.found += [
            attributes[name] for name in ("src", "href") if name in attributes
        ]
        self.inline += [name for name in attributes if name.startswith(("on", "style"))]
        if tag == "style" or (tag == "script" and "src" not in attributes):
            self.inline.append(tag)


def test_the_page_loads_only_files_of_its_own_and_runs_nothing_inline(api):
    answer = api.get("/")
    links = Links()
    links.feed(answer.text)

    assert answer.headers["Content-Type"].startswith("text/html")
    assert links.inline == []
    for link in links.found:
        assert link.startswith(("/sandbox/page/", "#"))
        if link.startswith("/"):
            assert api.get(link).status_code == 200


def test_the_scripts_import_only_files_of_their_own_and_write_only_text(api):
    for script in PAGE.glob("*.js"):
        source = script.read_text()
        for name in re.findall(r'from "\./(.+?)"', source):
            assert api.get(f"/sandbox/page/{name}").status_code == 200
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|https?:",
            source,
        )


def test_the_plot_library_comes_with_its_licence():
    assert "MIT" in (PAGE / "vendor/uplot/LICENSE").read_text()


@pytest.mark.parametrize("path", ["/", "/sandbox/api/overview", "/nowhere"])
def test_every_answer_is_protected(api, path):
    headers = api.get(path).headers

    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "require-trusted-types-for 'script'; trusted-types 'none'" in policy
    assert "unsafe" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "DENY"


@pytest.mark.parametrize("path", ["../app.py", "%2e%2e/app.py", "/etc/passwd", ""])
def test_files_beside_the_page_are_not_served(api, path):
    assert api.get(f"/sandbox/page/{path}").status_code == 404


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_texts_stay_texts(api, hostile):
    api.meter("calls", "COUNT", eventType=hostile)

    api.ingest(
        event(subject=hostile, type=hostile, id=hostile, data={hostile: hostile})
    )
    api.ingest(event(2, type=f"{hostile} uncounted", data={hostile: 1}))

    answer = api.get("/sandbox/api/overview")
    assert answer.headers["Content-Type"] == "application/json"
    overview = answer.json()
    assert overview["meters"][0]["groups"][0]["group"] == hostile
    assert overview["uncounted"][0]["type"] == f"{hostile} uncounted"


def test_the_overview_shows_usage_over_time_and_totals(api):
    api.meter("sum", "SUM", "$.n")
    api.ingest(
        [event(n, subject="ab"[n % 2], data={"n": n}) for n in range(10)]
        + [event(99, subject="a", data={})]
    )

    (meter,) = api.overview()["meters"]

    assert (meter["value"], meter["events"], meter["unusable"]) == (45, 11, 1)
    assert [(g["group"], g["value"], g["events"]) for g in meter["groups"]] == [
        ("b", 25, 5), ("a", 20, 6),
    ]  # fmt: skip
    curves = {c["group"]: [v for v in c["values"] if v] for c in meter["curves"]}
    assert {group: sum(values) for group, values in curves.items()} == {
        "a": 20, "b": 25,
    }  # fmt: skip


def overview(api, **views):
    parameters = {"views": json.dumps(views), "span": 300}
    return api.get("/sandbox/api/overview", params=parameters).json()["meters"]


def used(meter):
    return {group["group"]: group["value"] for group in meter["groups"]}


def test_usage_is_divided_by_a_dimension_and_for_one_subject(api):
    api.meter("sum", "SUM", "$.n", groupBy={"region": "$.at.region"})
    regions = [{"region": "eu"}, {"region": "us"}, {}, "none"]
    api.ingest(
        [event(n, subject="ab"[n % 2], data={"n": n, "at": regions[n % 4]})
         for n in range(8)]
    )  # fmt: skip

    (by_region,) = overview(api, sum={"by": "region"})
    (of_b,) = overview(api, sum={"by": "region", "subject": "b"})
    (by_subject,) = overview(api, sum={"by": "no such dimension"})
    (of_a,) = overview(api, sum={"subject": "a"})

    assert (by_region["by"], by_region["dimensions"]) == ("region", ["region"])
    assert used(by_region) == {"": 8 + 10, "us": 6, "eu": 4}
    assert [curve["group"] for curve in by_region["curves"]] == ["", "us", "eu"]
    assert (used(of_b), of_b["value"]) == ({"": 10, "us": 6}, 16)
    assert (by_subject["by"], used(by_subject)) == ("subject", {"a": 12, "b": 16})
    assert (used(of_a), of_a["value"], of_a["subject"]) == ({"a": 12}, 12, "a")


def test_usage_of_the_time_shown_stands_beside_that_of_all_time(api):
    api.meter("sum", "SUM", "$.n")
    api.ingest([event(1, data={"n": 1}), event(2, data={"n": 2}, time=OLD)])

    (meter,) = overview(api)

    (group,) = meter["groups"]
    assert (group["recent"], group["value"]) == (1, 3)


def test_usage_is_shown_as_late_as_meters_count_it(api):
    api.meter("calls", "COUNT")
    api.put("/sandbox/api/visibility", json={"visibleAfter": 60})
    api.ingest(event())

    (meter,) = overview(api)

    assert (meter["value"], meter["groups"]) == (None, [])


@pytest.mark.parametrize(
    "views", ["[]", "x", '{"a": 1}', '{"a": {"by": 1}}', '{"a": {"of": "b"}}']
)
def test_senseless_views_are_refused(api, views):
    answer = api.get("/sandbox/api/overview", params={"views": views})

    assert answer.status_code == 400
    assert "views" in answer.json()["detail"]


def test_events_that_nobody_counts_come_with_the_data_of_the_newest(api):
    api.ingest([event(1, type="image"), event(2, type="image", data={"pixels": 5})])
    api.ingest(event(3, type="openmeter_wsgi.check"))

    before = api.overview()["uncounted"]
    api.meter("images", "COUNT", eventType="image")

    assert before == [
        {"type": "image", "events": 2, "subjects": 1, "data": {"pixels": 5}}
    ]
    assert api.overview()["uncounted"] == []


def test_the_overview_counts_what_became_of_events(api):
    api.ingest([event(1), event(1), event(2, time="1970-01-01T00:00:00Z")])
    api.ingest(event(3, subject=""))

    overview = api.overview()

    assert overview["counts"] == {
        "requests": 2, "received": 3, "stored": 1, "duplicates": 1, "dropped": 1,
        "refused": 1, "failed": 0,
    }  # fmt: skip
    assert overview["refusals"][0]["count"] == 1


def test_reasons_of_refusals_are_bounded(api):
    for number in range(60):
        api.ingest(event(specversion=f"{number}" + "x" * 1000))

    refusals = api.overview()["refusals"]

    assert len(refusals) <= 51
    assert sum(refusal["count"] for refusal in refusals) == 60
    assert all(len(refusal["reason"]) <= 300 for refusal in refusals)


@pytest.mark.parametrize("span", [0, 59, 10**9, "x"])
def test_senseless_spans_are_refused(api, span):
    assert api.get("/sandbox/api/overview", params={"span": span}).status_code == 400


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "a@b"])
def test_foreign_hosts_are_refused(api, host):
    answer = api.get("/api/v1/meters", headers={"Host": host})

    assert answer.status_code == 403
    assert answer.headers["Content-Type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("host", "bound", "allowed"),
    [
        ("localhost:8888", "127.0.0.1", True),
        ("LOCALHOST", "127.0.0.1", True),
        ("app.localhost:1", "127.0.0.1", True),
        ("[::1]:8888", "127.0.0.1", True),
        ("127.8.8.8", "127.0.0.1", True),
        ("192.168.1.2", "127.0.0.1", False),
        ("sandbox", "127.0.0.1", False),
        ("192.168.1.2:8888", "0.0.0.0", True),
        ("sandbox:8888", "0.0.0.0", True),
        ("evil.example", "0.0.0.0", False),
        ("dev.example", "dev.example", True),
        ("[::1", "127.0.0.1", False),
        ("localhost/evil.example", "127.0.0.1", False),
    ],
)
def test_host_names(host, bound, allowed):
    assert is_allowed(host, bound) is allowed


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
    ids=str,
)
def test_pages_of_other_sites_cannot_write(api, headers):
    headers |= {"Content-Type": "application/cloudevents+json"}

    answer = api.post("/api/v1/events", data=json.dumps(event()), headers=headers)

    assert answer.status_code == 403
    assert api.events() == []


def test_the_page_itself_can_write(api):
    headers = {"Origin": api.url, "Sec-Fetch-Site": "same-origin"}

    answer = api.put(
        "/sandbox/api/faults", json={"ingest": {"failRate": 0.5}}, headers=headers
    )

    assert answer.json()["ingest"]["failRate"] == 0.5


def test_unknown_paths_and_methods_are_problems_without_a_detail(api):
    for answer in (api.get("/api/v1/nothing"), api.patch("/api/v1/meters")):
        problem = answer.json()
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert problem["status"] == answer.status_code
        assert "detail" not in problem

"""Real answers of OpenMeter, against those of the sandbox."""

import re
from collections import Counter
from pathlib import Path

import pytest

import replaying
from openmeter_wsgi.sandbox import Sandbox

DOCS = Path(__file__).parent.parent / "docs" / "sandbox.md"
DEEP = "Data nested deeper than about 990 levels"
KONNECT = "`POST /v3/openmeter/events`"
HISTORY = "`GET …/entitlements/{feature}/history`"
VERSION_3 = "`POST /api/v3/openmeter/entitlement-access/query`"
METERS = "`GET /api/v3/openmeter/meters`"
OTHERS = "Other calls of OpenMeter's API"
WORDS = "A feature with unknown filters"
#: All calls with a different answer, and the row of the page with the reason.
DIFFERENT = {
    "ingest.body_deep": DEEP,
    "query.count_deep": DEEP,
    "route.v3_konnect_base": KONNECT,
    # The event that was taken there is in the sums.
    "query.sum_all": KONNECT,
    "query.groupby_subject": KONNECT,
    "query.count_v3": KONNECT,
    "query.post_empty_object": KONNECT,
    "query.post_subject_empty_list": KONNECT,
    "history.v2": HISTORY,
    "v3.meters": METERS,
    "v3.access_query": VERSION_3,
    "portal.meters": OTHERS,
    "debug.metrics": OTHERS,
    "info.currencies": OTHERS,
    "feature.bad_filter": WORDS,
}


class Clock:
    now: float = replaying.START

    def __call__(self):
        return self.now

    def set(self, now):
        self.now = now


def replayed(**options):
    clock = Clock()
    with Sandbox(clock=clock, **options) as sandbox:
        found = list(replaying.replay(sandbox.url, clock.set))
    return {difference.name: difference for difference in found}


@pytest.fixture(scope="module")
def differences():
    return replayed()


def test_the_sandbox_answers_as_openmeter_did(differences):
    unexpected = [str(d) for name, d in differences.items() if name not in DIFFERENT]

    assert not unexpected, "\n".join(unexpected)
    assert set(differences) == set(DIFFERENT)


def test_what_is_answered_otherwise_says_so(differences):
    kinds = {name: found.kind for name, found in differences.items()}
    statuses = Counter(
        found.here["status"] for found in differences.values() if found.kind == "status"
    )

    # Five are not offered, one is too deep, one is Konnect's address.
    assert statuses == {501: 5, 400: 1, 202: 1}
    assert [name for name, kind in kinds.items() if kind == "wording"] == [
        "feature.bad_filter"
    ]


def test_the_recording_is_whole():
    names = [call["name"] for call in replaying.calls() if "name" in call]

    assert (len(names), len(set(names))) == (679, 679)


def test_the_documentation_lists_the_differences():
    listed = re.findall(r"^\| (.+?) \|", DOCS.read_text("utf-8"), re.MULTILINE)

    assert set(DIFFERENT.values()) <= set(listed)


def test_the_comparison_sees_a_server_that_does_not_deduplicate():
    assert "query.count_collide" in set(replayed(dedupe=False)) - set(DIFFERENT)

"""Fake OpenMeter (API version 3) with the recorded answers of a real one.

The answers are in ``fixtures/openmeter/answers-v3.jsonl``: OpenMeter v1.0.0-beta.232.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from recorded import document

if TYPE_CHECKING:
    from openmeter_server import Answer, OpenMeterServer, Request

_FILE = Path(__file__).parent / "fixtures" / "openmeter" / "answers-v3.jsonl"
BASE = "/api/v3/openmeter"
#: An id that no customer has.
NO_ID = "01ARZ3NDEKTSV4RRFFQ69G5FAV"


class Recording(NamedTuple):
    """One request that was sent to a real server, and its answer."""

    name: str
    method: str
    path: str
    sent: Any
    status: int
    content_type: str
    body: Any

    def answer(self) -> Answer:
        return document(self.body, self.status, self.content_type)


RECORDINGS = {
    recording.name.removeprefix("v3."): recording
    for recording in (
        Recording(**json.loads(line)) for line in _FILE.read_text("utf-8").splitlines()
    )
}
#: The recorded customers, by key.
CUSTOMERS = {
    customer["key"]: customer for customer in RECORDINGS["customer.list"].body["data"]
}


def with_brackets(target: str) -> str:
    """Return *target* with unquoted brackets, as in the recording."""
    return target.replace("%5B", "[").replace("%5D", "]")


def access_path(id_: str) -> str:
    """Return the path of the entitlement access of a customer."""
    return f"{BASE}/customers/{id_}/entitlement-access"


def customers_path(by: str, value: str) -> str:
    """Return the target that filters customers; *value* is already quoted."""
    return f"{BASE}/customers?filter[{by}]={value}"


class RecordedV3:
    """The rule of an `OpenMeterServer` that gives the recorded answers.

    It answers other questions as the real server does for an unknown customer.
    """

    def __init__(self, server: OpenMeterServer) -> None:
        self.customers: list[dict[str, Any]] = [*CUSTOMERS.values()]
        self.answers: dict[str, Answer] = {
            recording.path: recording.answer()
            for name, recording in RECORDINGS.items()
            if name.startswith("access.list.")
        }
        #: The request targets of all questions.
        self.asked: list[str] = []
        server.rule = self

    def count(self, begin: str) -> int:
        """Return the number of questions whose target starts with *begin*."""
        return sum(target.startswith(begin) for target in self.asked)

    def __call__(self, request: Request) -> Answer | None:
        if request.method != "GET":
            return None
        target = with_brackets(request.target)
        self.asked.append(target)
        if (answer := self.answers.get(target)) is not None:
            return answer
        url = urlsplit(target)
        if url.path == f"{BASE}/customers":
            return self._list(parse_qs(url.query))
        id_ = unquote(url.path.split("/")[5])
        return self.unknown(id_)

    def _list(self, query: dict[str, list[str]]) -> Answer:
        ((filter_, (value,)),) = query.items()
        found = [
            customer
            for customer in self.customers
            if value in _names(customer, filter_.removeprefix("filter[")[:-1])
        ]
        page = {"size": 20, "number": 1, "total": len(found)}
        return document({"data": found[:20], "meta": {"page": page}})

    @staticmethod
    def unknown(id_: str) -> Answer:
        """Return the recorded answer for an unknown customer, with its id replaced."""
        recording = RECORDINGS["access.list.unknown"]
        detail = recording.body["detail"].replace(NO_ID, id_)
        return document(
            {**recording.body, "detail": detail}, 404, recording.content_type
        )


def _names(customer: dict[str, Any], by: str) -> list[str]:
    if by == "key":
        return [customer["key"]] if "key" in customer else []
    assert by == "usage_attribution_subject_key"
    keys: list[str] = customer.get("usage_attribution", {}).get("subject_keys", [])
    return keys


def customer(
    key: str | None, *subjects: str, id_: str = "01M8J9X1FN5V7R64DFBZPF9Y4T"
) -> dict[str, Any]:
    """Return a customer for the list, in the form of the recorded ones."""
    made = {**CUSTOMERS["h-bool"], "id": id_, "key": key}
    made["usage_attribution"] = {"subject_keys": [*subjects]}
    return {
        name: value
        for name, value in made.items()
        if value not in (None, {"subject_keys": []})
    }


def access(**features: Any) -> Answer:
    """Return an access list; each feature has a bool for access or a whole entry."""
    entries = [
        value if isinstance(value, dict) else {"type": "boolean", "has_access": value}
        for value in features.values()
    ]
    return document(
        {
            "data": [
                {"feature_key": name, **entry}
                for name, entry in zip(features, entries, strict=True)
            ]
        }
    )

"""Fake OpenMeter (API versions 1 and 2) with the recorded answers of a real one.

The answers are in ``fixtures/openmeter/answers.jsonl``: OpenMeter v1.0.0-beta.232.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

from openmeter_server import Answer, OpenMeterServer

if TYPE_CHECKING:
    from openmeter_server import Request

_FILE = Path(__file__).parent / "fixtures" / "openmeter" / "answers.jsonl"


class Recording(NamedTuple):
    """One request that was sent to a real server, and its answer."""

    name: str
    path: str
    status: int
    content_type: str
    body: Any

    @property
    def customer(self) -> str:
        return unquote(self.path.split("/")[4])

    @property
    def feature(self) -> str:
        return unquote(self.path.split("/")[6])

    def answer(self) -> Answer:
        return document(self.body, self.status, self.content_type)


def document(
    body: Any, status: int = 200, content_type: str = "application/json"
) -> Answer:
    """Return an answer with *body* as JSON in the form that Go writes."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    headers = {"Content-Type": content_type}
    return Answer(status, text.encode() + b"\n", headers, takes=False)


RECORDINGS = {
    recording.name: recording
    for recording in (
        Recording(**json.loads(line)) for line in _FILE.read_text("utf-8").splitlines()
    )
}


class RecordedOpenMeter:
    """The rule of an `OpenMeterServer` that gives the recorded answers *names*.

    It answers other questions as the real server does for an unknown customer.
    """

    def __init__(self, server: OpenMeterServer, *names: str) -> None:
        self.answers: dict[str, Answer] = {}
        #: The customers that the list of customers contains.
        self.customers: list[dict[str, Any]] = []
        self.page_size = 100
        #: The request targets of all questions.
        self.asked: list[str] = []
        for name in names:
            self.play(name)
        server.rule = self

    def play(self, name: str) -> None:
        """Give the recorded answer *name* from now on."""
        recording = RECORDINGS[name]
        if recording.path.startswith("/api/v1/customers?"):
            self.customers += recording.body["items"]
        else:
            self.answers[recording.path] = recording.answer()

    def play_access(self, customer: str, *names: str) -> None:
        """Answer ``/access`` of *customer* with the recorded values *names*."""
        values = {RECORDINGS[name].feature: RECORDINGS[name].body for name in names}
        path = f"/api/v1/customers/{quote(customer, safe='')}/access"
        self.answers[path] = document({"entitlements": values})

    @staticmethod
    def value_path(customer: str, feature: str) -> str:
        """Return the path of the value of a feature."""
        return (
            f"/api/v2/customers/{quote(customer, safe='')}/entitlements/{feature}/value"
        )

    def count(self, begin: str) -> int:
        """Return the number of questions whose target starts with *begin*."""
        return sum(target.startswith(begin) for target in self.asked)

    def __call__(self, request: Request) -> Answer | None:
        if request.method != "GET":
            return None
        self.asked.append(request.target)
        if (answer := self.answers.get(request.target)) is not None:
            return answer
        url = urlsplit(request.target)
        if url.path == "/api/v1/customers":
            return self._list(parse_qs(url.query))
        return unknown_customer(unquote(url.path.split("/")[4]))

    def _list(self, query: dict[str, list[str]]) -> Answer:
        part = query["subject"][0].lower()
        page = int(query.get("page", ["1"])[0])
        size = min(int(query.get("pageSize", ["100"])[0]), self.page_size)
        found = [
            customer
            for customer in self.customers
            if any(part in key.lower() for key in _subjects(customer))
        ]
        items = found[(page - 1) * size : page * size]
        return document(
            {"pageSize": size, "page": page, "totalCount": len(found), "items": items}
        )


def _subjects(customer: dict[str, Any]) -> list[str]:
    subjects: list[str] = customer.get("usageAttribution", {}).get("subjectKeys", [])
    return subjects


def unknown_customer(key: str) -> Answer:
    """Return the recorded answer for an unknown customer, with *key* in its text."""
    recording = RECORDINGS["value2.unknown_customer"]
    detail = recording.body["detail"].replace("g-none", key)
    body = {**recording.body, "detail": detail}
    return document(body, recording.status, recording.content_type)


def customer(
    key: str | None, *subjects: str, id_: str = "01M8J9X1FN5V7R64DFBZPF9Y4T"
) -> dict[str, Any]:
    """Return a customer for the list, in the form of the recorded one."""
    (like,) = RECORDINGS["customer.list_subject"].body["items"]
    made = {**like, "id": id_, "usageAttribution": {"subjectKeys": [*subjects]}}
    del made["key"]
    return made if key is None else {**made, "key": key}

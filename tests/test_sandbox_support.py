"""Helpers for the tests of the sandbox: an API client, and events to send."""

from __future__ import annotations

import json
from typing import Any

import requests

SINGLE = "application/cloudevents+json"
BATCH = "application/cloudevents-batch+json"
EITHER = "application/json"


class Api(requests.Session):
    """A client of one sandbox, whose URLs are paths."""

    def __init__(self, url: str) -> None:
        super().__init__()
        # Neither a proxy nor a .netrc of the machine takes part.
        self.trust_env = False
        self.url = url

    def request(self, method, url, *args, **kwargs):
        kwargs.setdefault("timeout", 40)
        return super().request(method, self.url + url, *args, **kwargs)

    def ingest(self, body: Any, kind: str | None = None, path="/api/v1/events"):
        kind = kind or (BATCH if isinstance(body, list) else SINGLE)
        data = body if isinstance(body, bytes) else json.dumps(body)
        return self.post(path, data=data, headers={"Content-Type": kind})

    def meter(self, slug: str, aggregation: str, path: str | None = None, **more):
        definition = {"slug": slug, "aggregation": aggregation, "eventType": "call"}
        if path:
            definition["valueProperty"] = path
        answer = self.post("/api/v1/meters", json=definition | more)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def rows(self, slug: str, **parameters) -> list[dict[str, Any]]:
        answer = self.get(f"/api/v1/meters/{slug}/query", params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def value(self, slug: str, **parameters) -> float | None:
        rows = self.rows(slug, **parameters)
        return rows[0]["value"] if rows else None

    def events(self, **parameters) -> list[dict[str, Any]]:
        answer = self.get("/api/v1/events", params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def overview(self) -> dict[str, Any]:
        return self.get("/sandbox/api/overview").json()


def event(number: int | str = 1, /, **changes: Any) -> dict[str, Any]:
    """Return an event; a change to ... leaves the attribute out."""
    whole = {
        "id": f"event-{number}",
        "source": "test",
        "specversion": "1.0",
        "type": "call",
        "subject": "customer",
        "data": {"value": "100"},
    }
    whole |= changes
    return {name: value for name, value in whole.items() if value is not ...}

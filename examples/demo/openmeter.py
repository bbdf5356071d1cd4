"""A client of the OpenMeter server that reads the billed usage."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Self

import requests

from examples.demo.expectation import Account

if TYPE_CHECKING:
    from collections.abc import Iterable

TIMEOUT = 30.0
METERS: list[dict[str, Any]] = [
    {
        "slug": "api_requests",
        "eventType": "api-request",
        "aggregation": "COUNT",
    },
    {
        "slug": "tokens",
        "eventType": "tokens",
        "aggregation": "SUM",
        "valueProperty": "$.tokens",
        "groupBy": {"model": "$.model", "kind": "$.kind"},
    },
    {
        "slug": "credits",
        "eventType": "credits",
        "aggregation": "SUM",
        "valueProperty": "$.total",
    },
]


class OpenMeter:
    """A client of the server, independent of the middleware's client."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._session = requests.Session()
        # The server runs on this machine: use no proxy.
        self._session.trust_env = False

    def define(self, subjects: Iterable[str]) -> None:
        """Create the meters, and a customer for each of *subjects*."""
        for meter in METERS:
            self._call("POST", "/api/v1/meters", json=meter)
        for subject in subjects:
            customer = {"name": subject, "usageAttribution": {"subjectKeys": [subject]}}
            self._call("POST", "/api/v1/customers", json=customer)

    def grant(self, subject: str, feature: str, amount: float | None) -> None:
        """Grant a customer a feature, and *amount* of it (the sandbox's own API)."""
        document = {"customer": subject, "feature": feature, "amount": amount}
        self._call("POST", "/sandbox/api/grant", json=document)

    def fail(self, share: float) -> None:
        """Let *share* of ingest requests fail (the sandbox's own API)."""
        self._call("PUT", "/sandbox/api/faults", json={"ingest": {"failRate": share}})

    def usage(self) -> Counter[Account]:
        """Return the usage of each subject, tokens by model."""
        billed: Counter[Account] = Counter()
        for meter in METERS:
            slug = meter["slug"]
            groups = ["subject", *(["model"] if "groupBy" in meter else [])]
            answer = self._call(
                "GET", f"/api/v1/meters/{slug}/query", params={"groupBy": groups}
            )
            for row in answer["data"]:
                model = row["groupBy"].get("model", "")
                billed[Account(row["subject"], slug, model)] += row["value"]
        return billed

    def events(self) -> list[dict[str, Any]]:
        """Return all events, each with its validation error, if any."""
        listed: list[dict[str, Any]] = []
        page: dict[str, Any] = {"nextCursor": None}
        while "nextCursor" in page:
            params = {"limit": 100, "cursor": page["nextCursor"]}
            page = self._call("GET", "/api/v2/events", params=params)
            listed += page["items"]
        return listed

    def counts(self) -> dict[str, int]:
        """Return the sandbox's counts of requests and events (its own API)."""
        counts: dict[str, int] = self._call("GET", "/sandbox/api/overview")["counts"]
        return counts

    def _call(self, method: str, path: str, **arguments: Any) -> Any:
        response = self._session.request(
            method, self.url + path, timeout=TIMEOUT, **arguments
        )
        response.raise_for_status()
        return response.json()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

"""Computes the expected usage from the requests and responses of the clients.

It is independent of the middleware and of the application: it uses neither.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from examples.demo.load import CREDITS, Kind

if TYPE_CHECKING:
    from collections.abc import Iterable

    from examples.demo.load import Answer, Request


class Account(NamedTuple):
    """The key of a sum: subject and meter, and for tokens the model."""

    subject: str
    meter: str
    model: str = ""


@dataclass
class Expectation:
    """The expected usage and number of events."""

    usage: Counter[Account] = field(default_factory=Counter)
    #: Number of events.
    events: int = 0
    sent: Counter[Kind] = field(default_factory=Counter)
    #: Requests that got the expected answer.
    answered: Counter[Kind] = field(default_factory=Counter)
    #: Requests that became at least one event.
    metered: Counter[Kind] = field(default_factory=Counter)
    #: A sentence for each unexpected answer.
    surprises: list[str] = field(default_factory=list)


def expect(exchanges: Iterable[tuple[Request, Answer]]) -> Expectation:
    """Return the expected usage of *exchanges*."""
    expected = Expectation()
    for request, answer in exchanges:
        expected.sent[request.kind] += 1
        if surprise := _surprise(request, answer):
            expected.surprises.append(surprise)
            continue
        amounts = _amounts(request, answer)
        expected.usage.update(amounts)
        # The tokens of the prompt and of the completion are separate events.
        expected.events += sum(2 if account.model else 1 for account in amounts)
        expected.answered[request.kind] += 1
        expected.metered[request.kind] += bool(amounts)
    return expected


def _surprise(request: Request, answer: Answer) -> str | None:
    """Return a sentence if the answer is not the expected one, else None."""
    kind = request.kind
    if answer.status != kind.status:
        return f"{kind.label}: expected status {kind.status}, got {answer.status}"
    if answer.whole is (kind in (Kind.BROKEN, Kind.HANG_UP)):
        return f"{kind.label}: the answer {'ended' if answer.whole else 'broke off'}"
    if _is_stream(request) and _pages(request, answer) != request.pages:
        return f"{kind.label}: {len(answer.body)} bytes came of {request.path}"
    return None


def _amounts(request: Request, answer: Answer) -> dict[Account, int]:
    subject = request.subject
    if subject is None or not 200 <= answer.status <= 299:
        return {}
    amounts = {}
    if request.kind is not Kind.BROKEN:
        amounts[Account(subject, "api_requests")] = 1
    if request.kind is Kind.CHAT and request.body:
        model = request.body["model"]
        tokens = sum(json.loads(answer.body)["usage"].values())
        amounts[Account(subject, "tokens", model)] = tokens
        amounts[Account(subject, "credits")] = CREDITS[model]
    if _is_stream(request) and (pages := _pages(request, answer)):
        amounts[Account(subject, "credits")] = pages
    return amounts


def _is_stream(request: Request) -> bool:
    return request.kind in (Kind.STREAM, Kind.BROKEN, Kind.HANG_UP)


def _pages(request: Request, answer: Answer) -> int:
    return len(answer.body) // request.page_bytes

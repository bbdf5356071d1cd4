"""What is to be billed, from what clients sent and received.

Independent of the middleware: nothing here asks it, or the application, anything.
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
    """Where usage is added up: a subject's meter, for tokens by model."""

    subject: str
    meter: str
    model: str = ""


@dataclass
class Expectation:
    """What the requests must add up to."""

    usage: Counter[Account] = field(default_factory=Counter)
    #: How many events they become.
    events: int = 0
    sent: Counter[Kind] = field(default_factory=Counter)
    #: Requests that got the answer that they should get.
    answered: Counter[Kind] = field(default_factory=Counter)
    #: Requests that are billed something.
    metered: Counter[Kind] = field(default_factory=Counter)
    #: What other answers there were.
    surprises: list[str] = field(default_factory=list)


def expect(exchanges: Iterable[tuple[Request, Answer]]) -> Expectation:
    """Return what *exchanges* must add up to."""
    expected = Expectation()
    for request, answer in exchanges:
        expected.sent[request.kind] += 1
        if surprise := _surprise(request, answer):
            expected.surprises.append(surprise)
            continue
        amounts = _amounts(request, answer)
        expected.usage.update(amounts)
        # Prompt and completion are an event each.
        expected.events += sum(2 if account.model else 1 for account in amounts)
        expected.answered[request.kind] += 1
        expected.metered[request.kind] += bool(amounts)
    return expected


def _surprise(request: Request, answer: Answer) -> str | None:
    """Say what is wrong with an answer, by itself."""
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

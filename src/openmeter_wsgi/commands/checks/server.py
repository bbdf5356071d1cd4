"""The server: does it answer, take the key and the events, and know what time it is?"""

from __future__ import annotations

import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from openmeter_wsgi.commands.asking import NoAnswer
from openmeter_wsgi.commands.checks.findings import failure, ok, unknown, warning
from openmeter_wsgi.errors import DeliveryError, Rejected, Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openmeter_wsgi.commands.checks.findings import Finding, Situation
    from openmeter_wsgi.policy import Policy

_SERVER, _KEY, _ANSWER, _CLOCK = "server", "key", "answer", "clock"
#: Further apart than this many seconds, usage may be billed in another period.
MAX_CLOCK_DIFFERENCE = 60.0
_ACCEPTED = range(200, 300)


def look_at_server(situation: Situation) -> Iterator[Finding]:
    """Send a marked event, as the middleware sends its events."""
    policy = situation.policy
    try:
        policy.key.current()
    except ValueError as error:
        yield failure(_KEY, str(error), "give a key in api_key or api_key_file")
        return
    began = time.monotonic()
    try:
        situation.sent = situation.send()
    except DeliveryError as error:
        yield from _explain(error, policy)
        return
    took = situation.sent.at - began
    yield ok(_SERVER, f"{policy.api_url} answered within {took:.2f} s")
    yield ok(
        _KEY,
        "sent, and not refused"
        if policy.key.known
        else "none is sent, and none needed",
    )
    yield ok(_ANSWER, "it takes events")


def _explain(error: DeliveryError, policy: Policy) -> Iterator[Finding]:
    """Say what a refusal means, from the outside in: server, key, answer."""
    status = error.status
    if status is None:
        yield failure(
            _SERVER,
            f"{policy.api_url} does not answer: {error.reason}",
            "set api_url to the address of the server, and let this machine reach it",
        )
        return
    if isinstance(error, Unavailable):
        yield failure(
            _SERVER,
            f"{policy.api_url} answers {status}: {error.reason}",
            "it cannot take events now: look into the server's own log",
        )
        return
    yield ok(_SERVER, f"{policy.api_url} answers")
    if status in {401, 403}:
        yield failure(
            _KEY, f"refused with {status}: {error.reason}", _key_remedy(policy)
        )
        return
    yield failure(_ANSWER, *_answer(error, status, policy))


def _key_remedy(policy: Policy) -> str:
    if not policy.key.known:
        return "give a key in api_key or OPENMETER_API_KEY"
    return "give a key of this server that may ingest events"


def _answer(error: DeliveryError, status: int, policy: Policy) -> tuple[str, str]:
    """Return what an answer means that speaks of the address or the event."""
    said = f"{status}: {error.reason}"
    if isinstance(error, Rejected):
        return said, "something between here and OpenMeter changes events: look there"
    if status in _ACCEPTED:
        return said, (
            "set api_url to the address of the API; this is one of a page, a login or "
            "a proxy"
        )
    if 300 <= status < 400:
        return said, (
            "set api_url to where the API is itself: https instead of http, or another "
            "host"
        )
    return said, (
        f"nothing takes events there: set api_url to the server's address alone, and "
        f"api_flavor (now {policy.api_flavor!r}) to the API it speaks"
    )


def look_at_clock(situation: Situation) -> Iterator[Finding]:
    """Compare the clock of this machine with the server's."""
    try:
        before = time.time()
        said = situation.listing.date()
        ours = (before + time.time()) / 2
    except NoAnswer as error:
        yield unknown(_CLOCK, str(error))
        return
    try:
        theirs = parsedate_to_datetime(said or "").timestamp()
    except ValueError:
        yield unknown(_CLOCK, f"the server does not say what time it is: {said!r}")
        return
    difference = ours - theirs
    if abs(difference) <= MAX_CLOCK_DIFFERENCE:
        yield ok(_CLOCK, "this machine and the server agree to the minute")
        return
    ahead = "ahead of" if difference > 0 else "behind"
    yield warning(
        _CLOCK,
        f"this machine is {abs(difference):.0f} s {ahead} the server; its clock is "
        "what events are billed by",
        "let NTP set the clock of this machine",
    )

"""The server: does it answer, take the key and the events, and know what time it is?"""

from __future__ import annotations

import ipaddress
import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from openmeter_wsgi.commands.asking import NoAnswer
from openmeter_wsgi.commands.checks.findings import failure, ok, unknown, warning
from openmeter_wsgi.commands.checks.refusals import ANSWER, KEY, SERVER, explain
from openmeter_wsgi.errors import DeliveryError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openmeter_wsgi.commands.checks.findings import Finding, Situation
    from openmeter_wsgi.policy import Policy

_CLOCK = "clock"
#: Further apart than this many seconds, usage may be billed in another period.
MAX_CLOCK_DIFFERENCE = 60.0


def look_at_server(situation: Situation) -> Iterator[Finding]:
    """Send a marked event, as the middleware sends its events."""
    policy = situation.policy
    try:
        policy.key.current()
    except ValueError as error:
        yield failure(KEY, str(error), "give a key in api_key or api_key_file")
        return
    began = time.monotonic()
    try:
        situation.sent = situation.send()
    except DeliveryError as error:
        situation.answers = error.status is not None
        yield from explain(error, policy)
        return
    situation.answers = True
    took = situation.sent.at - began
    yield ok(SERVER, f"{policy.api_url} answered within {took:.2f} s")
    yield _accepted(policy)
    yield ok(ANSWER, "it takes events")


def _accepted(policy: Policy) -> Finding:
    if not policy.key.known:
        return ok(KEY, "none is sent, and none needed")
    parts = urlsplit(policy.api_url)
    if parts.scheme == "http" and not _is_this_machine(parts.hostname or ""):
        return warning(
            KEY,
            f"accepted, and sent unencrypted to {parts.hostname}: who is between can "
            "read it",
            f"set api_url to 'https://{parts.netloc}'",
        )
    return ok(KEY, "sent, and not refused")


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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

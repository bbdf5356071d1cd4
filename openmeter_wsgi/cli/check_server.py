"""Checks of the server: reachable, key accepted, clock, events stored once."""

from __future__ import annotations

import ipaddress
import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from openmeter_wsgi.cli.api_client import NoAnswer, error_text, is_untrusted
from openmeter_wsgi.cli.findings import MARK, failure, ok, unanswered, unknown, warning
from openmeter_wsgi.connection import Connection
from openmeter_wsgi.errors import ConfigError, DeliveryError, Rejected, Unavailable
from openmeter_wsgi.options import ApiKey, is_konnect
from openmeter_wsgi.spool import server_answers
from openmeter_wsgi.spool.server_directories import (
    prepare_server_directory,
    server_of_policy,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openmeter_wsgi.cli.findings import Finding, Sent, Situation
    from openmeter_wsgi.policy import Policy


SERVER, KEY, ANSWER = "server", "key", "answer"
_ACCEPTED = range(200, 300)
_REDIRECTS = range(300, 400)
#: How the keys of Kong Konnect begin.
_KONNECT_KEYS = ("kpat_", "spat_")
#: Seconds that a second look at the address takes at most.
_PATIENCE = 5.0


def explain(error: DeliveryError, policy: Policy) -> Iterator[Finding]:
    """Explain a refusal, from the outside in: server, key, answer."""
    status = error.status
    if status is None:
        yield _no_answer(error, policy)
        return
    if isinstance(error, Unavailable):
        yield failure(
            SERVER,
            f"{policy.api_url} answers {status}: {error.reason}",
            "it cannot take events now: look into the server's own log",
        )
        return
    yield ok(SERVER, f"{policy.api_url} answers")
    if status in {401, 403}:
        yield failure(
            KEY, f"refused with {status}: {error.reason}", _key_remedy(policy)
        )
        return
    yield failure(ANSWER, *_answer(error, status, policy))


def _no_answer(error: DeliveryError, policy: Policy) -> Finding:
    url = policy.api_url
    said = error_text(error)
    if (other := _other_scheme(url)) and _speaks(other, policy.request_timeout):
        scheme = urlsplit(url).scheme
        return failure(
            SERVER,
            f"{url} is spoken to in {scheme}, and answers {urlsplit(other).scheme} "
            f"alone ({said})",
            f"set api_url to {other!r}",
        )
    return failure(SERVER, f"{url} does not answer: {said}", _reach(error, policy))


def _reach(error: DeliveryError, policy: Policy) -> str:
    """Return the remedy for a server that cannot be reached."""
    if is_untrusted(error):
        return (
            "let this machine trust the certificate: REQUESTS_CA_BUNDLE names a file "
            "with that of its authority"
        )
    host = urlsplit(policy.api_url).hostname
    if "host is known" in error_text(error):
        return f"set api_url to the address of the server: is {host!r} misspelt?"
    return "set api_url to the address of the server, and let this machine reach it"


def _other_scheme(url: str) -> str | None:
    scheme, *rest = urlsplit(url)
    return urlunsplit(({"http": "https", "https": "http"}[scheme], *rest))


def _speaks(url: str, timeout: float) -> bool:
    """True if *url* answers in its scheme. The key is not sent."""
    keyless = ApiKey.from_options(None, None)
    connection = Connection(key=keyless, timeout=min(timeout, _PATIENCE))
    try:
        connection.request("GET", url)
    except DeliveryError as error:
        return is_untrusted(error)
    finally:
        connection.close()
    return True


def _key_remedy(policy: Policy) -> str:
    key = policy.key.known
    if not key:
        return "give a key in api_key or OPENMETER_API_KEY"
    if key.startswith(_KONNECT_KEYS) and not is_konnect(policy.api_url):
        return (
            "this is a key of Kong Konnect: set api_flavor to 'v3' and api_url to "
            "your region, such as https://eu.api.konghq.com"
        )
    return "give a key of this server that may ingest events"


def _answer(error: DeliveryError, status: int, policy: Policy) -> tuple[str, str]:
    """Explain an answer about the address or the event: finding and remedy."""
    said = f"{status}: {error.reason}"
    url = policy.api_url
    if urlsplit(url).scheme == "http" and status in {*_REDIRECTS, 400}:
        secure = _other_scheme(url) or url
        if _speaks(secure, policy.request_timeout):
            return f"{said}; the server wants https", f"set api_url to {secure!r}"
    if isinstance(error, Rejected):
        return said, "something between here and OpenMeter changes events: look there"
    if status in _ACCEPTED:
        return said, (
            "set api_url to the address of the API; this is one of a page, a login or "
            "a proxy"
        )
    if status in _REDIRECTS:
        return said, (
            "set api_url to where the API is itself: https instead of http, or another "
            "host"
        )
    return f"{said}, nothing takes events there", _address(policy)


def _address(policy: Policy) -> str:
    parts = urlsplit(policy.api_url)
    if parts.path.strip("/"):
        alone = f"{parts.scheme}://{parts.netloc}"
        return f"set api_url to {alone!r}: the path of the API is added"
    return (
        f"set api_url to the server's address alone, and api_flavor (now "
        f"{policy.api_flavor!r}) to the API it speaks"
    )


_CLOCK = "clock"
#: Further apart than this many seconds, usage may be billed in another period.
MAX_CLOCK_DIFFERENCE = 60.0


def check_ingest(situation: Situation) -> Iterator[Finding]:
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
        situation.server_answers = error.status is not None
        yield from explain(error, policy)
        return
    situation.server_answers = True
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


def check_clock(situation: Situation) -> Iterator[Finding]:
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


_EVENT = "event"
#: An event is listed some seconds after it was taken; waited for is so long.
EVENT_PATIENCE = 30.0
#: Seconds between two looks.
POLL_INTERVAL = 0.5


def check_event(situation: Situation) -> Iterator[Finding]:
    """Find the marked event in OpenMeter's list, and read its validation errors."""
    assert situation.sent is not None  # noqa: S101 - the table says so
    try:
        entries = listed(situation, situation.sent.id, EVENT_PATIENCE)
    except NoAnswer as error:
        yield unanswered(_EVENT, error, "list events")
        return
    if not entries:
        yield warning(
            _EVENT,
            f"taken, and not listed within {EVENT_PATIENCE:.0f} s",
            "see whether the server's sink worker runs, which stores what was taken",
        )
        return
    yield from _explain(entries[0])


def listed(situation: Situation, event_id: str, patience: float) -> list[Any]:
    """Return how an event is listed as soon as it is, [] if that takes too long.

    :raises NoAnswer: if the server lists nothing.
    """
    source = situation.policy.event_source
    deadline = time.monotonic() + patience
    while not (entries := situation.listing.entries(event_id, source)):
        if time.monotonic() > deadline:
            break
        situation.wait(POLL_INTERVAL, "Waiting for OpenMeter to list an event")
    return entries


def _explain(entry: dict[str, Any]) -> Iterator[Finding]:
    """Report the validation errors, but for the expected: no meter, no customer."""
    said = str(entry.get("validationError") or "")
    others = [line for line in said.splitlines() if not _is_expected(line)]
    if not others:
        said = f"test event {MARK}: stored, and deliberately counted by no meter"
        yield ok(_EVENT, said)
        return
    yield warning(
        _EVENT,
        f"OpenMeter says of it: {'; '.join(others)}",
        f"delete the meter that counts the event type {MARK}, or mend what it says",
    )


def _is_expected(line: str) -> bool:
    return "no meter found" in line or "customer" in line


_DEDUPLICATION = "deduplication"
#: The two are so many seconds apart: within one flush of its sink, 2 s as shipped,
#: OpenMeter drops a repetition even where deduplication is off.
PAUSE = 5.0
#: So long after a later event is listed, the repetition has had its time, too.
GRACE = 2.5


def check_deduplication(situation: Situation) -> Iterator[Finding]:
    """Send the marked event again, and see whether it is stored again."""
    sent = situation.sent
    assert sent is not None  # noqa: S101 - the table says so
    try:
        times = _times_stored(situation, sent)
    except (NoAnswer, DeliveryError) as error:
        yield unknown(_DEDUPLICATION, str(error))
        return
    if not times:
        yield unknown(_DEDUPLICATION, "OpenMeter does not list what was sent to it")
        return
    if times > 1:
        yield failure(
            _DEDUPLICATION,
            "an event that was sent twice is stored twice: what is sent again "
            "because its answer was lost is billed twice, and so is a request that is "
            "repeated under its idempotency key, and a ticket that is settled again",
            server_answers.VERDICT_REMEDY,
        )
    else:
        yield ok(
            _DEDUPLICATION,
            f"of an event sent twice, {PAUSE:g} s apart, one is stored",
            server_answers.IN_THE_SINK,
        )
    yield from _keep(situation, deduplicates=times == 1)


def _times_stored(situation: Situation, sent: Sent) -> int:
    """Repeat the event, and return how often it is listed then; 0: not even once.

    :raises NoAnswer: if the server lists nothing.
    :raises DeliveryError: if it takes no more events.
    """
    left = sent.at + PAUSE - time.monotonic()
    situation.wait(max(left, 0.0), "Waiting before an event is repeated")
    situation.client.ingest([sent.encoded])
    # Listed after the repetition, whether that one is or not.
    after = situation.send()
    if not listed(situation, after.id, EVENT_PATIENCE):
        return 0
    source = situation.policy.event_source
    deadline = time.monotonic() + GRACE
    while (times := len(situation.listing.entries(sent.id, source))) <= 1:
        if (left := deadline - time.monotonic()) <= 0:
            break
        pause = min(left, POLL_INTERVAL)
        situation.wait(pause, "Waiting whether a repeated event is stored")
    return times


def _keep(situation: Situation, *, deduplicates: bool) -> Iterator[Finding]:
    """Leave the verdict to the sender of the spool, which says it at its start."""
    if situation.spool is None:
        return
    policy = situation.policy
    try:
        directory = prepare_server_directory(
            situation.spool.parent, server_of_policy(policy)
        )
        server_answers.save_verdict(
            directory, policy.api_url, deduplicates=deduplicates
        )
    except (ConfigError, OSError) as error:
        yield unknown("deduplication verdict", f"cannot be kept: {error}")

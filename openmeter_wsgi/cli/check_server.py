"""Checks of the server: address, key, clock, test event and deduplication.

`check_ingest` sends a test event. `check_event` finds it in OpenMeter's list, and
`check_deduplication` sends it once more and counts the stored events.
"""

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
from openmeter_wsgi.spool import stored_answers
from openmeter_wsgi.spool.server_directories import (
    prepare_server_directory,
    server_of_policy,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openmeter_wsgi.cli.findings import Finding, Sent, Situation
    from openmeter_wsgi.policy import Policy


#: Names of the findings.
SERVER, KEY, ANSWER = "server", "key", "answer"
_SUCCESS = range(200, 300)
_REDIRECTS = range(300, 400)
#: Prefixes of the keys of Kong Konnect.
_KONNECT_KEYS = ("kpat_", "spat_")
#: Maximum number of seconds to try the other scheme of the address.
_SCHEME_TIMEOUT = 5.0


def explain(error: DeliveryError, policy: Policy) -> Iterator[Finding]:
    """Explain a failed request: yield findings of the server, the key, the answer."""
    status = error.status
    if status is None:
        yield _no_answer(error, policy)
        return
    if isinstance(error, Unavailable):
        yield failure(
            SERVER,
            f"{policy.api_url} answers {status}: {error.reason}",
            "it cannot take events now: see the log of the server",
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
    reason = error_text(error)
    other = _with_other_scheme(url)
    if _answers(other, policy.request_timeout):
        scheme, right_scheme = urlsplit(url).scheme, urlsplit(other).scheme
        return failure(
            SERVER,
            f"{url} does not answer over {scheme}, only over {right_scheme} ({reason})",
            f"set api_url to {other!r}",
        )
    remedy = _unreachable_remedy(error, policy)
    return failure(SERVER, f"{url} does not answer: {reason}", remedy)


def _unreachable_remedy(error: DeliveryError, policy: Policy) -> str:
    if is_untrusted(error):
        return (
            "let this machine trust the certificate: set REQUESTS_CA_BUNDLE to a file "
            "with the certificate of its authority"
        )
    host = urlsplit(policy.api_url).hostname
    if "host is known" in error_text(error):
        return f"set api_url to the address of the server: is {host!r} misspelt?"
    return "set api_url to the address of the server, and let this machine reach it"


def _with_other_scheme(url: str) -> str:
    scheme, *rest = urlsplit(url)
    return urlunsplit(({"http": "https", "https": "http"}[scheme], *rest))


def _answers(url: str, timeout: float) -> bool:
    """Return True if *url* answers in its scheme. The key is not sent."""
    keyless = ApiKey.from_options(None, None)
    connection = Connection(key=keyless, timeout=min(timeout, _SCHEME_TIMEOUT))
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
    """Return the finding and the remedy for an answer other than an acceptance."""
    answer = f"{status}: {error.reason}"
    url = policy.api_url
    if urlsplit(url).scheme == "http" and status in {*_REDIRECTS, 400}:
        secure = _with_other_scheme(url)
        if _answers(secure, policy.request_timeout):
            return f"{answer}; the server requires https", f"set api_url to {secure!r}"
    if isinstance(error, Rejected):
        return answer, "check the proxies on the way to OpenMeter: one changes events"
    if status in _SUCCESS:
        return answer, (
            "set api_url to the address of the API; this is the address of a page, a "
            "login or a proxy"
        )
    if status in _REDIRECTS:
        return answer, (
            "set api_url to the address of the API itself: https instead of http, or "
            "another host"
        )
    return f"{answer}, nothing takes events there", _address_remedy(policy)


def _address_remedy(policy: Policy) -> str:
    parts = urlsplit(policy.api_url)
    if parts.path.strip("/"):
        without_path = f"{parts.scheme}://{parts.netloc}"
        return f"set api_url to {without_path!r}: the path of the API is added"
    return (
        "set api_url to the address of the server, and api_flavor (now "
        f"{policy.api_flavor!r}) to the version of its API"
    )


_CLOCK = "clock"
#: Maximum difference in seconds; with a larger one usage may get into another period.
MAX_CLOCK_DIFFERENCE = 60.0


def check_ingest(situation: Situation) -> Iterator[Finding]:
    """Send a test event, as the middleware sends its events."""
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
    yield _check_key(policy)
    yield ok(ANSWER, "it takes events")


def _check_key(policy: Policy) -> Finding:
    """Return the finding of a key that the server has not refused."""
    if not policy.key.known:
        return ok(KEY, "none is sent, and none is needed")
    parts = urlsplit(policy.api_url)
    if parts.scheme == "http" and not _is_this_machine(parts.hostname or ""):
        return warning(
            KEY,
            f"accepted, and sent unencrypted to {parts.hostname}: others can read "
            "it on the way",
            f"set api_url to 'https://{parts.netloc}'",
        )
    return ok(KEY, "sent, and not refused")


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_clock(situation: Situation) -> Iterator[Finding]:
    """Compare the clock of this machine with the clock of the server."""
    try:
        before = time.time()
        date = situation.listing.date()
        ours = (before + time.time()) / 2
    except NoAnswer as error:
        yield unknown(_CLOCK, str(error))
        return
    try:
        theirs = parsedate_to_datetime(date or "").timestamp()
    except ValueError:
        yield unknown(_CLOCK, f"the server does not tell its time: {date!r}")
        return
    difference = ours - theirs
    if abs(difference) <= MAX_CLOCK_DIFFERENCE:
        yield ok(_CLOCK, "this machine and the server agree to the minute")
        return
    ahead = "ahead of" if difference > 0 else "behind"
    yield warning(
        _CLOCK,
        f"this machine is {abs(difference):.0f} s {ahead} the server; events are "
        "billed by the clock of this machine",
        "let NTP set the clock of this machine",
    )


_EVENT = "event"
#: Maximum number of seconds until OpenMeter lists an event that it has taken.
EVENT_PATIENCE = 30.0
#: Seconds between two requests for the list.
POLL_INTERVAL = 0.5


def check_event(situation: Situation) -> Iterator[Finding]:
    """Find the test event in OpenMeter's list, and report its validation errors."""
    assert situation.sent is not None  # noqa: S101 - by `needs_event`
    try:
        entries = listed(situation, situation.sent.id, EVENT_PATIENCE)
    except NoAnswer as error:
        yield unanswered(_EVENT, error, "list events")
        return
    if not entries:
        yield warning(
            _EVENT,
            f"taken, but not listed within {EVENT_PATIENCE:.0f} s",
            "check that the server's sink worker runs, which stores events",
        )
        return
    yield from _validation(entries[0])


def listed(situation: Situation, event_id: str, patience: float) -> list[Any]:
    """Wait for an event in OpenMeter's list, and return its entries.

    :param patience: maximum number of seconds; then the result is empty.
    :raises NoAnswer: if the server does not list events.
    """
    source = situation.policy.event_source
    deadline = time.monotonic() + patience
    while not (entries := situation.listing.entries(event_id, source)):
        if time.monotonic() > deadline:
            break
        situation.wait(POLL_INTERVAL, "Waiting for OpenMeter to list an event")
    return entries


def _validation(entry: dict[str, Any]) -> Iterator[Finding]:
    """Report the validation errors, except those of a missing meter and customer."""
    errors = str(entry.get("validationError") or "").splitlines()
    unexpected = [error for error in errors if not _is_expected(error)]
    if not unexpected:
        yield ok(
            _EVENT, f"test event {MARK}: stored, and deliberately counted by no meter"
        )
        return
    yield warning(
        _EVENT,
        f"OpenMeter reports of the test event: {'; '.join(unexpected)}",
        f"delete the meter that counts the event type {MARK}, or solve this problem",
    )


def _is_expected(error: str) -> bool:
    return "no meter found" in error or "customer" in error


_DEDUPLICATION = "deduplication"
#: Seconds between an event and its repetition. Within one flush of its sink, by default
#: 2 s, OpenMeter drops a repetition even with deduplication off.
PAUSE = 5.0
#: Seconds to wait for the repetition after a later event is listed.
GRACE = 2.5


def check_deduplication(situation: Situation) -> Iterator[Finding]:
    """Send the test event again, and check that it is stored once."""
    sent = situation.sent
    assert sent is not None  # noqa: S101 - by `needs_event`
    try:
        times = _times_stored(situation, sent)
    except (NoAnswer, DeliveryError) as error:
        yield unknown(_DEDUPLICATION, str(error))
        return
    if not times:
        yield unknown(_DEDUPLICATION, "OpenMeter does not list the events sent to it")
        return
    if times > 1:
        yield failure(
            _DEDUPLICATION,
            "an event that was sent twice is stored twice: an event that is sent again "
            "because its answer was lost is billed twice, and so is a request that is "
            "repeated under its idempotency key, and a ticket that is settled again",
            stored_answers.VERDICT_REMEDY,
        )
    else:
        yield ok(
            _DEDUPLICATION,
            f"an event sent twice, {PAUSE:g} s apart, is stored once",
            stored_answers.IN_THE_SINK,
        )
    yield from _save_verdict(situation, deduplicates=times == 1)


def _times_stored(situation: Situation, sent: Sent) -> int:
    """Repeat the event, and return the number of its entries in OpenMeter's list.

    :raises NoAnswer: if the server does not list events.
    :raises DeliveryError: if it takes no more events.
    """
    left = sent.at + PAUSE - time.monotonic()
    situation.wait(max(left, 0.0), "Waiting before an event is sent again")
    situation.client.ingest([sent.encoded])
    # When a later event is listed, the repetition is stored or will be within GRACE.
    later = situation.send()
    if not listed(situation, later.id, EVENT_PATIENCE):
        return 0
    source = situation.policy.event_source
    deadline = time.monotonic() + GRACE
    while (times := len(situation.listing.entries(sent.id, source))) <= 1:
        if (left := deadline - time.monotonic()) <= 0:
            break
        pause = min(left, POLL_INTERVAL)
        situation.wait(pause, "Waiting for the repeated event")
    return times


def _save_verdict(situation: Situation, *, deduplicates: bool) -> Iterator[Finding]:
    """Save the verdict in the spool, whose sender logs it when it starts."""
    if situation.spool is None:
        return
    policy = situation.policy
    try:
        directory = prepare_server_directory(
            situation.spool.parent, server_of_policy(policy)
        )
        stored_answers.save_verdict(
            directory, policy.api_url, deduplicates=deduplicates
        )
    except (ConfigError, OSError) as error:
        yield unknown("deduplication verdict", f"cannot be saved: {error}")

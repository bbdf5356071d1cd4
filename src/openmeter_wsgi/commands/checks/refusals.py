"""What it means that the server did not take an event, and what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from openmeter_wsgi.api_key import ApiKey, is_konnect
from openmeter_wsgi.commands.checks.findings import failure, ok
from openmeter_wsgi.commands.reasons import is_untrusted, short_reason
from openmeter_wsgi.connection import Connection
from openmeter_wsgi.errors import DeliveryError, Rejected, Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openmeter_wsgi.commands.checks.findings import Finding
    from openmeter_wsgi.policy import Policy

SERVER, KEY, ANSWER = "server", "key", "answer"
_ACCEPTED = range(200, 300)
_REDIRECTS = range(300, 400)
#: How the keys of Kong Konnect begin.
_KONNECT_KEYS = ("kpat_", "spat_")
#: Seconds that a second look at the address takes at most.
_PATIENCE = 5.0


def explain(error: DeliveryError, policy: Policy) -> Iterator[Finding]:
    """Say what a refusal means, from the outside in: server, key, answer."""
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
    said = short_reason(error)
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
    """Return what to do about a server that cannot be reached."""
    if is_untrusted(error):
        return (
            "let this machine trust the certificate: REQUESTS_CA_BUNDLE names a file "
            "with that of its authority"
        )
    host = urlsplit(policy.api_url).hostname
    if "host is known" in short_reason(error):
        return f"set api_url to the address of the server: is {host!r} misspelt?"
    return "set api_url to the address of the server, and let this machine reach it"


def _other_scheme(url: str) -> str | None:
    scheme, *rest = urlsplit(url)
    return urlunsplit(({"http": "https", "https": "http"}[scheme], *rest))


def _speaks(url: str, timeout: float) -> bool:
    """Say whether *url* answers in its scheme. The key stays here."""
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
    """Return what an answer means that speaks of the address or the event."""
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

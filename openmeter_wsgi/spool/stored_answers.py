"""Answers of OpenMeter, stored in the spool for every process and command.

The last answer explains why events wait. The verdict tells if the server deduplicates,
that is, if it drops an event that arrives twice. ``openmeter-wsgi check`` finds out by
sending an event twice, which delivery never does, and stores the verdict.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import msgspec

from openmeter_wsgi import log
from openmeter_wsgi.spool.files import read_document, write_document

if TYPE_CHECKING:
    from pathlib import Path

logger: Final = log.get_logger(__name__)

LAST_ANSWER_NAME = "last_answer.json"
VERDICT_NAME = "deduplication.json"
#: The domain of OpenMeter Cloud, which always deduplicates.
_CLOUD = "openmeter.cloud"
VERDICT_REMEDY = (
    "switch on sink.dedupe in the server's configuration (driver redis), or an attempt "
    "without an answer may be billed twice"
)
#: A hint for servers that deduplicate: a client cannot tell the two options apart.
IN_THE_SINK = (
    "on a server of your own, sink.dedupe must be on and dedupe.enabled off: with "
    "dedupe.enabled, a batch that got a 5xx is answered 204 when it is sent again, and "
    "is never counted"
)


class LastAnswer(msgspec.Struct, frozen=True):
    """An attempt that failed. The times are in seconds since 1970."""

    answer: str
    time: float
    next_attempt: float


def save_answer(directory: Path, answer: str, *, next_in: float) -> None:
    """Store an *answer* of this moment; it replaces an earlier answer.

    :raises OSError: if the directory cannot take it.
    """
    now = time.time()
    write_document(directory / LAST_ANSWER_NAME, LastAnswer(answer, now, now + next_in))


def forget_answer(directory: Path) -> None:
    """Delete the last answer: an attempt has succeeded."""
    with contextlib.suppress(OSError):
        (directory / LAST_ANSWER_NAME).unlink()


def load_answer(directory: Path) -> LastAnswer | None:
    """Return the last answer, None if the last attempt has succeeded."""
    return read_document(directory / LAST_ANSWER_NAME, LastAnswer)


class Verdict(msgspec.Struct, frozen=True):
    """The result of a check if a server deduplicates."""

    api_url: str
    deduplicates: bool
    #: The time of the check (RFC 3339).
    time: str


def save_verdict(directory: Path, api_url: str, *, deduplicates: bool) -> None:
    """Store a verdict of this moment; it replaces an earlier verdict.

    :raises OSError: if the directory cannot take it.
    """
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    write_document(directory / VERDICT_NAME, Verdict(api_url, deduplicates, now))


def load_verdict(directory: Path, api_url: str) -> Verdict | None:
    """Return the verdict on the server at *api_url*, None without one."""
    verdict = read_document(directory / VERDICT_NAME, Verdict)
    return verdict if verdict is not None and verdict.api_url == api_url else None


def log_verdict(directory: Path, api_url: str) -> None:
    """Log the verdict on the server at *api_url*."""
    verdict = load_verdict(directory, api_url)
    host = urlsplit(api_url).hostname or ""
    if verdict is not None and verdict.deduplicates:
        logger.info("OpenMeter at %s deduplicates, checked %s", api_url, verdict.time)
    elif verdict is not None:
        logger.warning(
            "OpenMeter at %s does not deduplicate, checked %s: %s",
            api_url, verdict.time, VERDICT_REMEDY,
        )  # fmt: skip
    elif host == _CLOUD or host.endswith(f".{_CLOUD}"):
        logger.info("OpenMeter Cloud at %s deduplicates", api_url)
    else:
        logger.warning(
            "it is not known if OpenMeter at %s deduplicates: run 'openmeter-wsgi "
            "check'; until then an attempt without an answer may be billed twice",
            api_url,
        )

"""Whether OpenMeter drops a repeated event: what is known of it, kept in the spool.

It can only be found out by sending an event twice, which delivery must not do by
itself. ``openmeter-wsgi check`` does it and leaves its verdict here.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import msgspec

from openmeter_wsgi import log
from openmeter_wsgi.spool.files import open_file

if TYPE_CHECKING:
    from pathlib import Path

logger = log.get_logger(__name__)

VERDICT_NAME = "deduplication.json"
#: OpenMeter Cloud: there it is always switched on.
_CLOUD = "openmeter.cloud"
_MAX_BYTES = 10_000
VERDICT_REMEDY = (
    "switch on sink.dedupe in the server's configuration (driver redis), or an attempt "
    "without an answer may be billed twice"
)
#: From outside the two look the same.
IN_THE_SINK = (
    "on a server of your own see that sink.dedupe does it and dedupe.enabled is off: "
    "with the latter a batch that was answered 5xx is answered 204 when it is sent "
    "again, and is never counted"
)


class Verdict(msgspec.Struct, frozen=True):
    """What a check has found."""

    api_url: str
    deduplicates: bool
    #: When, in RFC 3339.
    time: str


def save(directory: Path, api_url: str, *, deduplicates: bool) -> None:
    """Keep a verdict of this moment in place of an earlier one.

    :raises OSError: if the directory cannot take it.
    """
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    unfinished = directory / f"{VERDICT_NAME}.new"
    with contextlib.suppress(FileNotFoundError):
        unfinished.unlink()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(unfinished, flags, 0o600), "wb") as file:
        file.write(msgspec.json.encode(Verdict(api_url, deduplicates, now)) + b"\n")
    unfinished.rename(directory / VERDICT_NAME)


def load_verdict(directory: Path, api_url: str) -> Verdict | None:
    """Return what is known of the server at *api_url*, None if that is nothing."""
    try:
        with open(open_file(directory / VERDICT_NAME), "rb") as file:
            verdict = msgspec.json.decode(file.read(_MAX_BYTES), type=Verdict)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return verdict if verdict.api_url == api_url else None


def say(directory: Path, api_url: str) -> None:
    """Write one line into the log: does the server deduplicate?"""
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
            "whether OpenMeter at %s deduplicates is not known: run 'openmeter-wsgi "
            "check'; until then an attempt without an answer may be billed twice",
            api_url,
        )

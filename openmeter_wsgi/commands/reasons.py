"""Why there was no answer, in the few words that matter of a long chain of errors."""

from __future__ import annotations

import socket
import ssl
from typing import TYPE_CHECKING

import requests
import urllib3

if TYPE_CHECKING:
    from collections.abc import Iterator


def short_reason(error: BaseException) -> str:
    """Return what is at the bottom of *error*, else what it says itself."""
    chain = list(_chain(error))
    for said in map(_said, reversed(chain)):
        if said is not None:
            return said
    return str(error) or type(error).__name__


def is_untrusted(error: BaseException) -> bool:
    """Say whether the server spoke TLS, with a certificate that is not trusted."""
    return any(isinstance(each, ssl.SSLCertVerificationError) for each in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield *error* and what it came from, the outermost first, each once."""
    waiting = [error]
    seen: set[int] = set()
    while waiting:
        each = waiting.pop(0)
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        inner = (*each.args, getattr(each, "reason", None), each.__cause__)
        waiting += [one for one in inner if isinstance(one, BaseException)]


def _said(error: BaseException) -> str | None:
    """Return what one link says, None where it only wraps another one."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"no TLS connection ({error.reason or error})"
    if isinstance(error, socket.gaierror):
        return "no such host is known"
    if isinstance(
        error, TimeoutError | urllib3.exceptions.TimeoutError | requests.Timeout
    ):
        return "no answer in time"
    if isinstance(error, ConnectionError) and not error.strerror:
        return "the connection was closed without an answer"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[:1].lower() + error.strerror[1:]
    return None

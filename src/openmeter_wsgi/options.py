"""How each option is read: the form it is expected in, and what is wrong with it.

Every reader returns the checked value, and reads its own result again unchanged.
It raises ValueError with what was expected and what was given, whichever of type
and value is wrong; the policy adds the name of the option.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from openmeter_wsgi.api_key import checked_key
from openmeter_wsgi.source import source_problem
from openmeter_wsgi.usage import read_usage
from openmeter_wsgi.wire import text_problem

_SECRET_HEADERS = {
    "authorization", "proxy-authorization", "cookie", "set-cookie", "x-api-key",
}  # fmt: skip


def key(value: Any) -> Any:
    """Read a key: text that can be sent in a header, a callable, or None."""
    return value if value is None or callable(value) else checked_key(value)


def url(value: Any) -> str:
    """Return a base URL without a trailing slash."""
    if not isinstance(value, str):
        raise ValueError(f"expected a URL, got {value!r}")
    parts = urlsplit(value.strip())
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError(
            f"expected a URL such as https://openmeter.cloud, got {value!r}"
        )
    if parts.username is not None or parts.password is not None:
        raise ValueError("expected a URL without a user or password: use api_key")
    if parts.query or parts.fragment:
        raise ValueError(f"expected a URL without ? and #, got {value!r}")
    _ = parts.port  # raises for one that is no port
    if parts.path.rstrip("/").endswith("/events"):
        raise ValueError(
            f"expected the server's address alone, its path is added, got {value!r}"
        )
    return value.strip().rstrip("/")


def optional_url(value: Any) -> str | None:
    """Return a base URL, or None."""
    return None if value is None else url(value)


def redis_url(value: Any) -> str | None:
    """Read the address of a Redis. It may hold a password, so it is never shown."""
    schemes = ("redis://", "rediss://", "unix://")
    if value is None or (isinstance(value, str) and value.startswith(schemes)):
        return value
    raise ValueError(f"expected a URL that begins with one of {', '.join(schemes)}")


def function(value: Any) -> Any:
    """Read a callable, or None."""
    if value is None or callable(value):
        return value
    raise ValueError(f"expected a callable, got {value!r}")


def source(value: Any) -> str:
    """Read the source of events."""
    if problem := source_problem(value):
        raise ValueError(problem)
    return str(value)


def text(value: Any) -> str:
    """Read text that is not empty."""
    if problem := text_problem(value):
        raise ValueError(problem)
    return str(value)


def subject(value: Any) -> Any:
    """Return a callable as it is, or 'header:Name' checked."""
    if value is None or callable(value):
        return value
    kind, _, name = value.partition(":") if isinstance(value, str) else ("", "", "")
    name = name.strip()
    if kind != "header" or not name.replace("-", "").isalnum() or not name.isascii():
        raise ValueError(
            f"expected a callable on the environ or 'header:Name', got {value!r}"
        )
    if name.lower() in _SECRET_HEADERS:
        raise ValueError(
            f"expected a header that holds no secret, got {name!r}: the subject is "
            "stored, shown and logged"
        )
    return f"header:{name}"


def subject_path(value: Any) -> str:
    """Read a path through the user."""
    if isinstance(value, str) and all(value.removeprefix(".").split(".")):
        return value
    raise ValueError(f"expected a path such as '.sub' or '.data.id', got {value!r}")


def meter(value: Any) -> Any:
    """Read one document or several; numbers by type have their own option."""
    if value is None:
        return None
    usage = read_usage(value)
    if usage.numbers or not usage.documents:
        raise ValueError(
            "expected {'type': …, 'data': {…}} or a list of them, got "
            f"{value!r}; numbers by type go to meters"
        )
    for meter in usage.documents:
        if meter.id or meter.time:
            raise ValueError(
                f"meter {meter.type!r}: an id or time that is the same for every "
                "request would be billed once"
            )
    return value


def meters(value: Any) -> Any:
    """Read numbers by type."""
    if value is None:
        return None
    if not isinstance(value, Mapping) or isinstance(value.get("type"), str):
        raise ValueError(f"expected a mapping of type to number, got {value!r}")
    if not value:
        raise ValueError("expected at least one type and number, got {}; leave it out")
    read_usage(value)
    return value


def typed(value: Any, hint: Any) -> Any:
    """Read a value whose type says it all."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    try:
        converted = msgspec.convert(value, hint)
    except msgspec.ValidationError as error:
        expected = _expected(str(error), hint)
        raise ValueError(f"{expected}, got {value!r}") from None
    if isinstance(converted, float) and not math.isfinite(converted):
        raise ValueError(f"expected a finite number, got {value!r}")
    return converted


def _expected(message: str, hint: Any) -> str:
    if choices := getattr(hint, "__args__", None) if _is_literal(hint) else None:
        return "expected one of " + ", ".join(map(repr, choices))
    return "e" + message.split(", got")[0].removeprefix("E")


def _is_literal(hint: Any) -> bool:
    return getattr(hint, "__origin__", None) is Literal


def unknown(name: str, names: Sequence[str]) -> str:
    """Say that *name* is no option, and which of *names* was probably meant."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"unknown option {name!r}" + (
        f" (did you mean {close[0]!r}?)" if close else ""
    )

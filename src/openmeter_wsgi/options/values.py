"""How each option is read: the form it is expected in, and what is wrong with it.

Every reader returns the checked value, and reads its own result again unchanged.
It raises ValueError with what was expected and what was given, whichever of type
and value is wrong; the policy adds the name of the option.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

import msgspec

from openmeter_wsgi.api_key import checked_key
from openmeter_wsgi.measure_texts import read_measure
from openmeter_wsgi.measured_meters import split
from openmeter_wsgi.measures import Measure
from openmeter_wsgi.route_rules import RouteRule
from openmeter_wsgi.source import source_problem
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
    if parts.path.rstrip("/").endswith(("/events", "/v3/openmeter")):
        raise ValueError(
            f"expected the server's address alone, its path is added, got {value!r}"
        )
    return value.strip().rstrip("/")


def api_flavor(value: Any) -> str:
    """Read the version of OpenMeter's API."""
    if value == "konnect":
        raise ValueError(
            "expected 'v1' or 'v3', got 'konnect': write 'v3', and api_url "
            "'https://<region>.api.konghq.com', by which Kong Konnect is recognised"
        )
    return str(typed(value, Literal["v1", "v3"]))


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
    documents = [value] if isinstance(value, Mapping) else list(value)
    if not documents or not all(map(_is_document, documents)):
        raise ValueError(
            "expected {'type': …, 'data': {…}} or a list of them, got "
            f"{value!r}; numbers by type go to meters"
        )
    for document in documents:
        if document.get("id") or document.get("time"):
            raise ValueError(
                f"meter {document['type']!r}: an id or time that is the same for every "
                "request would be billed once"
            )
    split(documents, None)
    return value


def _is_document(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("type"), str)


def meters(value: Any) -> Any:
    """Read numbers by type."""
    if value is None:
        return None
    if not isinstance(value, Mapping) or isinstance(value.get("type"), str):
        raise ValueError(f"expected a mapping of type to number, got {value!r}")
    if not value:
        raise ValueError("expected at least one type and number, got {}; leave it out")
    split(None, value)
    return value


def routes(value: Any) -> Any:
    """Read rules and the options of each; None or False: not metered."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ValueError(f"expected options by rule, got {value!r}")
    for rule, own in value.items():
        RouteRule(rule)
        if own is not None and own is not False and not isinstance(own, Mapping):
            raise ValueError(f"{rule!r}: expected options or None, got {own!r}")
    return value


def unmatched(value: Any) -> Any:
    """Read what governs a request that no rule names."""
    if value in {None, False, "none"}:
        return None
    if value == "policy":
        return value
    raise ValueError(f"expected 'policy' or None, got {value!r}")


def meter_when(value: Any) -> Any:
    """Read a predicate on the exchange: a callable, a measure, or its text."""
    if isinstance(value, str):
        value = read_measure(value)
    if value is None or isinstance(value, Measure) or callable(value):
        return value
    raise ValueError(
        "expected a callable on the exchange or a measure such as "
        f"'$response.succeeded', got {value!r}"
    )


def audit(value: Any) -> Any:
    """Read a callable, or the path of a file."""
    if value is None or callable(value):
        return value
    if isinstance(value, str | os.PathLike) and os.fspath(value):
        return os.fspath(value)
    raise ValueError(f"expected a callable or the path of a file, got {value!r}")


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
    if choices := _choices(hint):
        return "expected one of " + ", ".join(map(repr, choices))
    return "e" + message.split(", got")[0].removeprefix("E")


def _choices(hint: Any) -> list[Any]:
    """Return the values that a Literal allows, or one of Literals and None."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    parts = get_args(hint)
    if not any(get_origin(part) is Literal for part in parts):
        return []
    return [
        choice
        for part in parts
        for choice in ([None] if part is type(None) else _choices(part))
    ]


def unknown(name: str, names: Sequence[str]) -> str:
    """Say that *name* is no option, and which of *names* was probably meant."""
    import difflib  # here, as few make a mistake

    close = difflib.get_close_matches(name.lower(), names, n=1)
    return f"unknown option {name!r}" + (
        f" (did you mean {close[0]!r}?)" if close else ""
    )

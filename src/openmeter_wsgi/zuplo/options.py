"""Zuplo's options, each with the option of ours that says the same.

Sources: Zuplo's pages on ``openmeter-inbound`` and ``monetization-inbound``, and its
monetization policy reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from openmeter_wsgi.errors import MeterValueError
from openmeter_wsgi.options.entitlement_values import feature_like, feature_problem
from openmeter_wsgi.status_codes import StatusCodes
from openmeter_wsgi.usage import read_usage


class Option(NamedTuple):
    """What an option of Zuplo's becomes."""

    #: The name of ours; None where there is nothing to say here.
    name: str | None
    #: Returns the value as ours has it, None if it says nothing.
    read: Callable[[Any], Any]
    #: Why it has no meaning here.
    why: str = ""


def read_text(value: Any) -> str:
    """Read text that is not empty. It may be a key, so no message contains it."""
    if not isinstance(value, str):
        raise ValueError(f"expected text, got {type(value).__name__}")
    if not value.strip():
        raise ValueError("expected text that is not empty")
    return value


def read_names(value: Any) -> list[str] | None:
    """Read a list of names."""
    if not isinstance(value, list) or not all(
        isinstance(name, str) and name for name in value
    ):
        raise ValueError(f"expected a list of names, got {value!r}")
    return list(dict.fromkeys(value)) or None


def read_features(value: Any) -> list[str] | None:
    """Read a list of features, each by the key that OpenMeter takes for it."""
    names = read_names(value) or []
    return list(dict.fromkeys(map(feature_key, names))) or None


def feature_key(name: str) -> str:
    """Return *name*, or the key like it that OpenMeter takes."""
    if (problem := feature_problem(name)) is None:
        return name
    if (like := feature_like(name)) is None:
        raise ValueError(problem)
    return like


def read_status_codes(value: Any) -> Any:
    """Check status codes and leave them as they were written."""
    StatusCodes(value)
    return value


def read_seconds(value: Any) -> float:
    """Read a duration."""
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"expected a number of seconds above 0, got {value!r}")
    return value


def read_meters(value: Any) -> dict[str, Any] | None:
    """Read numbers by meter."""
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a mapping of meter to number, got {value!r}")
    for name, number in value.items():
        if isinstance(number, str):
            raise ValueError(f"meter {name!r}: expected a number, got {number!r}")
        read_usage({name: number})
    return dict(value) or None


def read_meter(value: Any) -> dict[str, Any] | list[dict[str, Any]] | None:
    """Read one document or a list of them."""
    if isinstance(value, list):
        return [_read_document(document) for document in value] or None
    return _read_document(value)


def _read_document(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("type"), str):
        raise MeterValueError(f"expected {{'type': …, 'data': {{…}}}}, got {entry!r}")
    document = dict(entry)
    if "value" in document and "data" not in document:
        # Zuplo's own example has it there; what OpenMeter can count is in data.
        document["data"] = {"value": document.pop("value")}
    read_usage(document)
    for key in ("id", "time"):
        if document.get(key) is not None:
            raise MeterValueError(
                f"meter {entry['type']!r}: the same {key} for every request would "
                "be billed once"
            )
    return {key: _as_text(value) for key, value in document.items()}


def _as_text(value: Any) -> Any:
    """Return *value* with texts that would name a measure here marked as texts."""
    if isinstance(value, Mapping):
        return {key: _as_text(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_as_text(each) for each in value]
    return f"${value}" if isinstance(value, str) and value.startswith("$") else value


def _unread(value: Any) -> Any:
    return value


def _nothing(why: str) -> Option:
    return Option(None, _unread, why)


_AUTHENTICATION = "the application authenticates, and leaves the user with set_user()"
_PLANS = "plans and payments are not asked for; see required_entitlements"
_BOTH = {
    "meterOnStatusCodes": Option("meter_on_status_codes", read_status_codes),
    "requiredEntitlements": Option("required_entitlements", read_features),
}
_OPENMETER = {
    "apiUrl": Option("api_url", read_text),
    "apiKey": Option("api_key", read_text),
    "meter": Option("meter", read_meter),
    "eventSource": Option("event_source", read_text),
    "subjectPath": Option("subject_path", read_text),
    **_BOTH,
}
_MONETIZATION = {
    "meters": Option("meters", read_meters),
    "cacheTtlSeconds": Option("allow_ttl", read_seconds),
    "authHeader": _nothing(_AUTHENTICATION),
    "authScheme": _nothing(_AUTHENTICATION),
    # The first version of the policy had these.
    "bucketId": _nothing("a bucket is Zuplo's own store of customers"),
    "allowRequestsWithoutSubscription": _nothing(_PLANS),
    "allowedSubscriptionStatuses": _nothing(_PLANS),
    "allowRequestsOverQuota": _nothing(_PLANS),
    **_BOTH,
}
#: The options that each kind of policy has.
OPTIONS: dict[str, dict[str, Option]] = {
    "openmeter-inbound": _OPENMETER,
    "monetization-inbound": _MONETIZATION,
}
#: What Zuplo's documentation gives as the default of these options.
DEFAULTS: dict[str, Any] = {
    "meter_on_status_codes": "200-299",
    "event_source": "api-gateway",
    "subject_path": ".sub",
}

"""How the options on entitlements are read; see :mod:`.values`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from openmeter_wsgi.errors import MeterValueError
from openmeter_wsgi.usage import read_usage
from openmeter_wsgi.wire import text_problem

#: The key of a feature, where it is created and where it is asked for.
_FEATURE = re.compile(r"[a-z0-9]+(?:_[a-z0-9]+)*", re.ASCII)
_MAX_FEATURE = 64
#: The id of an entitlement, which version 2 takes in place of a key.
_ULID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Za-hjkmnp-tv-z]{25}", re.ASCII)


class CountedMeter(NamedTuple):
    """The meter that a feature's balance counts, and where its number is."""

    type: str
    #: The property of ``data``, None for ``value_property``. An event without it
    #: counts as 1, as OpenMeter's COUNT does.
    property: str | None = None


def features(value: Any) -> tuple[str, ...]:
    """Read the keys of features, each once."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ValueError(f"expected a list of feature keys, got {value!r}")
    keys = tuple(dict.fromkeys(value))
    for key in keys:
        if problem := feature_problem(key):
            raise ValueError(problem)
    return keys


def feature_problem(key: Any) -> str | None:
    """Return the reason why OpenMeter can have no feature *key*, and a key it takes."""
    if problem := text_problem(key):
        return problem
    if not unaddressable([key]) or is_ulid(key):
        return None
    proposed = feature_like(key)
    hint = f"; write {proposed!r} here and in OpenMeter" if proposed else ""
    return (
        f"OpenMeter takes no feature key like {key!r} (expected a-z and 0-9, words "
        f"joined by one _, 1 to {_MAX_FEATURE} characters){hint}"
    )


def feature_like(key: str) -> str | None:
    """Return the key like *key* that OpenMeter takes, None if there is none."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower()
    words = re.findall(r"[a-z0-9]+", snake, re.ASCII)
    return "_".join(words)[:_MAX_FEATURE].rstrip("_") or None


def is_ulid(key: str) -> bool:
    """Return True if *key* has the form of an id."""
    return _ULID.fullmatch(key) is not None


def unaddressable(keys: Iterable[str]) -> list[str]:
    """Return those of *keys* that are not the key of a feature."""
    return [
        key for key in keys if not _FEATURE.fullmatch(key) or len(key) > _MAX_FEATURE
    ]


def customer(value: Any) -> Any:
    """Read what maps a subject to the key of its customer."""
    if value is None or callable(value) or isinstance(value, Mapping):
        return value
    raise ValueError(
        f"expected a callable on the subject or a mapping of subjects, got {value!r}"
    )


def counted_meters(value: Any) -> dict[str, CountedMeter]:
    """Read the meters that features count: by feature, or a list of equal keys."""
    if isinstance(value, Mapping):
        return {_feature(key): _counted(key, meter) for key, meter in value.items()}
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ValueError(f"expected a list of feature keys, got {value!r}")
    keys = list(value)
    for key in keys:
        if problem := feature_problem(key):
            like = None if text_problem(key) else feature_like(key)
            mapping = f", with its meter: { ({like: key})!r}" if like else ""
            raise ValueError(problem + mapping)
    return {key: CountedMeter(key) for key in keys}


def _feature(key: Any) -> str:
    if problem := feature_problem(key):
        raise ValueError(problem)
    return str(key)


def _counted(feature: str, meter: Any) -> CountedMeter:
    for text in meter if isinstance(meter, CountedMeter) else ():
        if text is not None and (problem := text_problem(text)):
            raise ValueError(problem)
    if isinstance(meter, CountedMeter):
        return meter
    if isinstance(meter, str) and meter:
        return CountedMeter(meter)
    if isinstance(meter, Mapping) and {"type"} <= meter.keys() <= {"type", "property"}:
        return _counted(feature, CountedMeter(**meter))
    raise ValueError(
        f"{feature!r}: expected a meter type or {{'type': …, 'property': …}}, got "
        f"{meter!r}"
    )


def reserved(value: Any) -> Any:
    """Read what a request reserves of features: amounts, or what says them."""
    if value is None or callable(value):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(
            f"expected amounts by feature or a callable on the environ, got {value!r}"
        )
    return amounts(value)


def amounts(value: Mapping[str, Any]) -> dict[str, float]:
    """Return amounts by feature, each finite and not negative.

    :raises ValueError: naming the one that is not.
    """
    try:
        numbers = read_usage(dict(value)).numbers if value else {}
    except MeterValueError as error:
        raise ValueError(str(error).replace("meter", "feature", 1)) from None
    return {feature: float(number) for feature, number in numbers.items()}

"""Commands for the shell that create the meters and features that are missing."""

from __future__ import annotations

import json
import re
import shlex
from typing import TYPE_CHECKING, Any

from openmeter_wsgi.measures import Measure
from openmeter_wsgi.options import v3_url

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from openmeter_wsgi.cli.api_client import Document
    from openmeter_wsgi.policy import Policy


#: A name that a path holds without quotes.
_IS_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
#: The measures that give a text, beside those of a kind.
_IS_TEXT = re.compile(r"\$llm(:\w+)?\.(model|provider)")


def data_of_measure(measure: Measure) -> dict[str, Any] | None:
    """Return the data that *measure* gives as a whole, None if that is not known.

    It stands for each number, and the number that a meter adds up comes first.
    """
    if measure.is_split:
        return {"tokens": measure, "type": "input", "model": "a", "provider": "b"}
    if not re.fullmatch(r"\$llm(:\w+)?", measure.text):
        return None
    from openmeter_wsgi.bodies.llm_shapes import FIELDS  # few policies need it

    return dict.fromkeys(("total_tokens", *FIELDS), measure) | {"model": "a"}


def meter_creation(
    event_type: str, data: Any, taken: Collection[str], policy: Policy
) -> str | None:
    """Return the command that creates the meter of a type under a slug not *taken*.

    None if nothing is known of the data: a meter that counts events may be wrong.
    """
    if data is None:
        return None
    slug = _free_slug(event_type, taken)
    path, group_by = _properties(data)
    how = "SUM" if path else "COUNT"
    if policy.api_flavor == "v3":
        document = {
            "key": slug, "name": slug, "event_type": event_type,
            "aggregation": how.lower(), "value_property": path, "dimensions": group_by,
        }  # fmt: skip
    else:
        document = {
            "slug": slug, "eventType": event_type, "aggregation": how,
            "valueProperty": path, "groupBy": group_by,
        }  # fmt: skip
    known = policy.key.known is not None
    variable = "OPENMETER_API_KEY" if known else None
    return _post("meters", document, policy.api_url, variable, policy)


def feature_creation(
    feature: str,
    counted_type: str | None,
    meters: list[Document],
    policy: Policy,
    *,
    is_told: bool,
) -> str | None:
    """Return the command that creates *feature*, of the meter that measures it.

    That meter counts *counted_type*. None if it is missing, unless the command that
    creates it *is_told*, and in version 3: there a feature names its meter by the id.
    """
    fitting = [one for one in meters if _measures(one, feature, counted_type)]
    document: dict[str, Any] = {"key": feature, "name": feature}
    is_v3 = policy.api_flavor == "v3"
    if counted_type is not None and not fitting and (is_v3 or not is_told):
        return None
    if is_v3:
        document["meter"] = {"id": fitting[0]["id"]} if fitting else None
    elif fitting:
        document["meterSlug"] = fitting[0].get("slug")
    elif counted_type is not None:
        # As the command for the meter calls it.
        taken = {str(one.get("slug")) for one in meters}
        document["meterSlug"] = _free_slug(counted_type, taken)
    variable = None
    if policy.entitlements_key.known is not None:
        own = policy.entitlements_api_key is not None
        variable = "OPENMETER_ENTITLEMENTS_API_KEY" if own else "OPENMETER_API_KEY"
    url = policy.entitlements_url or policy.api_url
    return _post("features", document, url, variable, policy)


def _measures(meter: Document, feature: str, counted_type: str | None) -> bool:
    """Return True if *feature* can be one of *meter*."""
    if meter.get("aggregation") in {"AVG", "MIN", "MAX"}:
        return False  # OpenMeter has no features of them
    if counted_type is None:
        return bool(meter.get("slug") == feature)
    return bool(meter.get("eventType") == counted_type)


def _post(
    what: str, document: dict[str, Any], url: str, variable: str | None, policy: Policy
) -> str:
    base = v3_url(url) if policy.api_flavor == "v3" else f"{url}/api/v1"
    text = json.dumps({key: value for key, value in document.items() if value})
    # In double quotes, for the shell to put in the key.
    key = f' -H "Authorization: Bearer ${variable}"' if variable else ""
    return (
        f"curl --fail-with-body {shlex.quote(f'{base}/{what}')}{key} "
        f"-H 'Content-Type: application/json' -d {shlex.quote(text)}"
    )


def _free_slug(event_type: str, taken: Collection[str]) -> str:
    """Return a slug like *event_type* that no meter has."""
    slug = re.sub(r"[^a-z0-9]+", "_", event_type.lower()).strip("_") or "meter"
    n, free = 1, slug
    while free in taken:
        n += 1
        free = f"{slug}_{n}"
    return free


def _properties(data: Any) -> tuple[str | None, dict[str, str]]:
    """Return the path of the number to add up, and those of the texts.

    That is the first number that is measured, or else the first one of all.
    """
    leaves = list(_leaves(data))
    measured = [path for path, value in leaves if _is_amount(value)]
    numbers = [path for path, value in leaves if type(value) in {int, float}]
    path = next(iter([*measured, *numbers]), None)
    members = data.items() if isinstance(data, dict) else ()
    texts = [key for key, value in members if _is_text(value)]
    return path, {key: f"$.{key}" for key in texts if _IS_NAME.fullmatch(key)}


def _leaves(data: Any, path: str = "$") -> Iterator[tuple[str, Any]]:
    if not isinstance(data, dict):
        yield path, data
        return
    for key, value in data.items():
        step = f".{key}" if _IS_NAME.fullmatch(key) else f"['{key}']"
        yield from _leaves(value, path + step)


def _is_amount(value: Any) -> bool:
    return isinstance(value, Measure) and not _is_text(value)


def _is_text(value: Any) -> bool:
    """Return True for a text, also one that is measured, such as a route."""
    if isinstance(value, Measure):
        return not value.is_quantity or bool(_IS_TEXT.fullmatch(value.text))
    return isinstance(value, str)

"""Shell commands that create missing meters and features."""

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


#: A property that a JSON path holds without quotes.
_IS_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
#: Measures of language models whose value is text.
_IS_TEXT = re.compile(r"\$llm(:\w+)?\.(model|provider)")


def data_of_measure(measure: Measure) -> dict[str, Any] | None:
    """Return the data that *measure* alone makes, None if it is not known.

    In it, *measure* stands for each number. The number to add up comes first.
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
    """Return the command that creates a meter of a type, under a slug not *taken*.

    Return None if *data* is not known: a meter that counts events may be wrong.
    """
    if data is None:
        return None
    slug = _free_slug(event_type, taken)
    path, group_by = _properties(data)
    aggregation = "SUM" if path else "COUNT"
    if policy.api_flavor == "v3":
        document = {
            "key": slug, "name": slug, "event_type": event_type,
            "aggregation": aggregation.lower(), "value_property": path,
            "dimensions": group_by,
        }  # fmt: skip
    else:
        document = {
            "slug": slug, "eventType": event_type, "aggregation": aggregation,
            "valueProperty": path, "groupBy": group_by,
        }  # fmt: skip
    has_key = policy.key.known is not None
    variable = "OPENMETER_API_KEY" if has_key else None
    return _post("meters", document, policy.api_url, variable, policy)


def feature_creation(
    feature: str,
    counted_type: str | None,
    meters: list[Document],
    policy: Policy,
    *,
    is_meter_created: bool,
) -> str | None:
    """Return the command that creates *feature*, measured by its meter.

    :param counted_type: the type of events that the meter counts.
    :param is_meter_created: True if a command for the missing meter is shown as well.
        Otherwise, and in version 3, where a feature refers to its meter by an id,
        there is no command without the meter.
    """
    fitting = [meter for meter in meters if _may_measure(meter, feature, counted_type)]
    document: dict[str, Any] = {"key": feature, "name": feature}
    is_v3 = policy.api_flavor == "v3"
    if counted_type is not None and not fitting and (is_v3 or not is_meter_created):
        return None
    if is_v3:
        document["meter"] = {"id": fitting[0]["id"]} if fitting else None
    elif fitting:
        document["meterSlug"] = fitting[0].get("slug")
    elif counted_type is not None:
        # The slug in the command that creates the meter.
        taken = {str(meter.get("slug")) for meter in meters}
        document["meterSlug"] = _free_slug(counted_type, taken)
    variable = None
    if policy.entitlements_key.known is not None:
        has_own_key = policy.entitlements_api_key is not None
        variable = (
            "OPENMETER_ENTITLEMENTS_API_KEY" if has_own_key else "OPENMETER_API_KEY"
        )
    url = policy.entitlements_url or policy.api_url
    return _post("features", document, url, variable, policy)


def _may_measure(meter: Document, feature: str, counted_type: str | None) -> bool:
    """Return True if *meter* may measure *feature*."""
    if meter.get("aggregation") in {"AVG", "MIN", "MAX"}:
        return False  # OpenMeter refuses features of such meters
    if counted_type is None:
        return bool(meter.get("slug") == feature)
    return bool(meter.get("eventType") == counted_type)


def _post(
    path: str,
    document: dict[str, Any],
    url: str,
    variable: str | None,
    policy: Policy,
) -> str:
    base = v3_url(url) if policy.api_flavor == "v3" else f"{url}/api/v1"
    text = json.dumps({key: value for key, value in document.items() if value})
    # In double quotes, so that the shell inserts the key.
    key = f' -H "Authorization: Bearer ${variable}"' if variable else ""
    return (
        f"curl --fail-with-body {shlex.quote(f'{base}/{path}')}{key} "
        f"-H 'Content-Type: application/json' -d {shlex.quote(text)}"
    )


def _free_slug(event_type: str, taken: Collection[str]) -> str:
    """Return a slug similar to *event_type* that is not *taken*."""
    slug = re.sub(r"[^a-z0-9]+", "_", event_type.lower()).strip("_") or "meter"
    n, free = 1, slug
    while free in taken:
        n += 1
        free = f"{slug}_{n}"
    return free


def _properties(data: Any) -> tuple[str | None, dict[str, str]]:
    """Return the path of the number to add up, and the paths of the texts.

    The number is the first one that is measured, or else the first one.
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
    """Return True if *value* is a text or a measured text, such as a route."""
    if isinstance(value, Measure):
        return not value.is_quantity or bool(_IS_TEXT.fullmatch(value.text))
    return isinstance(value, str)

"""The entries of a ``policies.json``, in every form that Zuplo's pages show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.zuplo.documents import did_you_mean, inside

COMPOSITE = "composite-inbound"
#: What Zuplo runs. ``policyType`` is only what its editor goes by.
_EXPORTS = {
    "OpenMeterInboundPolicy": "openmeter-inbound",
    "MonetizationInboundPolicy": "monetization-inbound",
    "CompositeInboundPolicy": COMPOSITE,
}
_SUCCESSORS = {"openmeter-metering-inbound": "openmeter-inbound"}
_KEYS = ("name", "policyType", "type", "handler", "options")


class Entry(NamedTuple):
    """A policy as it stands in the file, its options unread."""

    place: str
    name: str | None
    kind: str
    options_place: str
    options: Mapping[str, Any]
    #: Its other keys.
    unknown: list[str]


def read_entries(document: Any, problems: list[str]) -> list[Entry]:
    """Return the entries of a whole file, of a list, or the one that stands alone.

    :raises ConfigError: if it is none of them. Its values are not shown: the key
        may be among them.
    """
    within = ""
    if isinstance(document, Mapping):
        if "policies" not in document:
            return [_read_entry("", _alone(document), problems)]
        within, document = "policies", document["policies"]
    if not isinstance(document, list):
        raise ConfigError([f"{within or 'the document'}: expected a list of policies"])
    objects = [isinstance(each, Mapping) for each in document]
    if not all(objects):
        raise ConfigError([f"{within}[{objects.index(False)}]: expected an object"])
    return [
        _read_entry(f"{within}[{n}]", each, problems) for n, each in enumerate(document)
    ]


def _alone(document: Mapping[str, Any]) -> Mapping[str, Any]:
    if "export" in document and "handler" not in document:
        # Some of Zuplo's pages show the handler alone.
        return {"handler": document}
    if not document.keys() & set(_KEYS[1:]):
        raise ConfigError(
            [f"expected a policy or a list of them, got the keys {list(document)}"]
        )
    return document


def _read_entry(place: str, document: Mapping[str, Any], problems: list[str]) -> Entry:
    name = document.get("name")
    if name is not None and (not isinstance(name, str) or not name):
        problems.append(f"{inside(place, 'name')}: expected a name, got {name!r}")
        name = None
    kind = _kind(place, document, problems)
    options_place, options = _options(place, document, problems)
    unknown = [key for key in document if key not in _KEYS]
    return Entry(place, name, kind, options_place, options, unknown)


def _kind(place: str, document: Mapping[str, Any], problems: list[str]) -> str:
    """Return what Zuplo would run: by its export, or else by its type."""
    said = _text(document.get("policyType", document.get("type")))
    handler = document.get("handler")
    if isinstance(handler, str):
        # "$import(@zuplo/runtime).OpenMeterInboundPolicy"
        export: str | None = handler.rpartition(").")[2]
    else:
        export = _text(handler.get("export")) if isinstance(handler, Mapping) else None
    runs = _EXPORTS.get(export) if export else None
    if export and said in _EXPORTS.values() and runs != said:
        problems.append(
            f"{inside(place, 'handler')}: expected the export of a policy of the type "
            f"{said!r}, got {export!r}{did_you_mean(export, _EXPORTS)}"
        )
    kind = runs or said or export
    if kind is None or kind in _SUCCESSORS:
        wanted = repr(_SUCCESSORS[kind]) if kind else "the type of a policy"
        problems.append(
            f"{inside(place, 'policyType')}: expected {wanted}, got {kind!r}"
        )
    return kind or ""


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _options(
    place: str, document: Mapping[str, Any], problems: list[str]
) -> tuple[str, Mapping[str, Any]]:
    """Return the options and their place: in the handler, or beside it."""
    beside, handler = inside(place, "options"), document.get("handler")
    if not isinstance(handler, Mapping) or "options" not in handler:
        where, options = beside, document.get("options")
    elif "options" in document:
        problems.append(f"{beside}: expected options once, got the handler's too")
        return beside, {}
    else:
        where = inside(inside(place, "handler"), "options")
        options = handler["options"]
    if options is None or isinstance(options, Mapping):
        return where, options or {}
    problems.append(f"{where}: expected an object")
    return where, {}

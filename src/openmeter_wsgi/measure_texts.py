"""Measures as they are written in TOML and JSON.

========================  ==========================================================
``$request.method``       method
``$request.route``        the template of the address
``$request.bytes``        bytes of the request's body
``$request.header.NAME``  a header of the request
``$response.status``      status code
``$response.bytes``       bytes of the response's body
``$response.duration``    seconds
``$response.header.NAME`` a header of the response
``$response.json.PATH``   what a JSONPath finds: ``$response.json.usage.total_tokens``
``$response.records``     JSON lines
``$response.succeeded``   parts of a multi-status response; also ``.failed``
``$llm``                  all that a language model used, in place of ``data``
``$llm.FIELD``            one figure of it: ``$llm.total_tokens``
``$llm:PROVIDER``         the same from reports of one shape: ``$llm:openai``
``$llm:PROVIDER.FIELD``   one figure of them: ``$llm:openai.total_tokens``
========================  ==========================================================

``?? VALUE`` behind one of these is its default, as JSON: ``$response.header.X-N ?? 0``.
Text that begins with a dollar sign and means nothing else is written with two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from openmeter_wsgi import measures

if TYPE_CHECKING:
    from collections.abc import Callable

    from openmeter_wsgi.measures import Measure

_PLAIN: dict[str, Callable[[], Measure]] = {
    "$request.method": measures.method,
    "$request.route": measures.route,
    "$request.bytes": measures.bytes_received,
    "$response.status": measures.status,
    "$response.bytes": measures.bytes_sent,
    "$response.duration": measures.duration,
    "$response.records": measures.records,
    "$response.succeeded": lambda: measures.multi_status("succeeded"),
    "$response.failed": lambda: measures.multi_status("failed"),
    "$llm": measures.llm_usage,
}
_WITH_NAME: dict[str, Callable[[str], Measure]] = {
    "$request.header.": measures.request_header,
    "$response.header.": measures.response_header,
    "$llm.": measures.llm_usage,
    "$llm:": lambda rest: _llm_usage_of(*rest.split(".", 1)),
}
_JSON = "$response.json"


def read_measure(text: str) -> Measure | str:
    """Return the measure that *text* names, or the text that it is.

    :raises ValueError: if it begins with a dollar sign and names no measure.
    """
    if not text.startswith("$"):
        return text
    if text.startswith("$$"):
        return text[1:]
    name, separator, default = text.partition(" ?? ")
    measure = _named(name.strip())
    if not separator:
        return measure
    try:
        return measure.default(msgspec.json.decode(default))
    except msgspec.DecodeError:
        raise ValueError(f"{text!r}: expected JSON behind '??'") from None


def _named(name: str) -> Measure:
    if make := _PLAIN.get(name):
        return make()
    if name.startswith(_JSON) and name[len(_JSON) :][:1] in {".", "["}:
        return measures.response_json("$" + name.removeprefix(_JSON))
    for prefix, make_named in _WITH_NAME.items():
        if (rest := name.removeprefix(prefix)) != name and rest:
            return make_named(rest)
    known = ", ".join([*_PLAIN, *(f"{prefix}NAME" for prefix in _WITH_NAME)])
    raise ValueError(
        f"{name!r} is no measure; expected one of {known}, {_JSON}.PATH "
        "(or two dollar signs for text that begins with one)"
    )


def _llm_usage_of(provider: str, field: str | None = None) -> Measure:
    return measures.llm_usage(field, provider=provider)  # type: ignore[arg-type]

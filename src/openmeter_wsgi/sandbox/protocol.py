"""OpenMeter's side of HTTP: bodies, parameters, schemas, and its error bodies."""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException

if TYPE_CHECKING:
    from collections.abc import Callable

    from werkzeug.datastructures import MultiDict

    Arguments = MultiDict[str, str]


def parse_time(moment: str) -> int:
    """Return RFC 3339 *moment* in whole seconds since 1970."""
    if not re.search(r"(Z|[+-]\d\d:\d\d)$", moment):
        raise ValueError(moment)
    if moment.startswith("0000-"):
        # A year that Go knows and Python does not; it is dropped for its age anyway.
        return -1
    return int(datetime.fromisoformat(moment).timestamp() // 1)


def rfc3339(moment: float) -> str:
    """Return Unix *moment* in the form OpenMeter writes."""
    text = datetime.fromtimestamp(moment, UTC).isoformat(timespec="auto")
    return text.replace("+00:00", "Z")


logger = logging.getLogger(__name__)
#: OpenMeter's ids are ``<host>/<random>-<number>``.
_RUN = f"sandbox/{secrets.token_urlsafe(7)}"

_numbers = itertools.count(1)


class Problem(Exception):
    """A request that is answered with an error.

    :param detail: None where OpenMeter leaves it out: 404, 405 and every 500.
    :param flaw: what the schema says against the body. Such answers of the v1 API
        have no ``instance``, those of v3 name the field.
    :param reason: what the page shows where *detail* says too little.
    :param position: the place of the event that is to blame in its batch, from 1.
    :param retry_after: seconds for the header of that name.
    """

    def __init__(
        self,
        status: int,
        detail: str | None = None,
        *,
        flaw: Flaw | None = None,
        reason: str | None = None,
        position: int | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(detail or HTTPStatus(status).phrase)
        self.status = status
        self.detail = detail
        self.flaw = flaw
        self.reason = reason or str(self)
        self.position = position
        self.retry_after = retry_after

    def v1(self) -> dict[str, Any]:
        """Return the body as the v1 and v2 APIs write it."""
        body: dict[str, Any] = {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
        }
        if self.detail is not None:
            body["detail"] = self.detail
        if self.flaw is None:
            body["instance"] = _instance()
        return body

    def v3(self) -> dict[str, Any]:
        """Return the body as the v3 API writes it."""
        title = HTTPStatus(self.status).phrase
        slug = title.lower().replace(" ", "-")
        body: dict[str, Any] = {
            "type": f"https://kongapi.info/konnect/{slug}",
            "status": self.status,
            "title": title,
            "instance": _instance(),
        }
        if self.detail is not None:
            body["detail"] = self.detail
        if self.flaw is not None:
            field = self.flaw.pointer.strip("/").replace("/", ".")
            rule, reason = self.flaw.rule, self.flaw.reason
            body["detail"] = f"{title}: {field} [{rule}]: {reason}"
            body["invalid_parameters"] = [
                {"field": field, "rule": rule, "reason": reason, "source": ""}
            ]
        return body


def _instance() -> str:
    return f"urn:request:{_RUN}-{next(_numbers):06d}"


def answer(problem: Problem) -> Response:
    """Return *problem* in the dialect of the path that was asked."""
    v3 = request.path.startswith(("/api/v3/", "/v3/"))
    body = problem.v3() if v3 else problem.v1()
    response = Response(
        json.dumps(body), problem.status, content_type="application/problem+json"
    )
    if problem.retry_after is not None:
        response.headers["Retry-After"] = str(math.ceil(problem.retry_after))
    return response


def install(app: Flask) -> None:
    """Answer every error of *app* with a problem."""

    @app.errorhandler(Problem)
    def refused(problem: Problem) -> Response:
        return answer(problem)

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Response:
        return answer(Problem(error.code or 500))

    @app.errorhandler(Exception)
    def fault(error: Exception) -> Response:
        logger.error("the sandbox failed at %r", request.path, exc_info=error)
        return answer(Problem(500))


Document = dict[str, Any]
Schema = dict[str, Any]
#: The zone is optional here although RFC 3339 requires it; the next layer does too.
DATE_TIME = (
    r"^[0-9]{4}-(0[1-9]|10|11|12)-(0[1-9]|[12][0-9]|3[01])"
    r"T([0-1][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]+)?"
    r"(Z|(\+|-)[0-9]{2}:[0-9]{2})?$"
)
KEY = "^[a-z0-9]+(?:_[a-z0-9]+)*$"


@dataclass(frozen=True, slots=True)
class Flaw:
    """The first thing in a document that its schema does not allow."""

    pointer: str
    rule: str
    reason: str

    def __str__(self) -> str:
        return (
            f'Error at "{self.pointer}": {self.reason}' if self.pointer else self.reason
        )


def check(schema: Schema, value: Any, pointer: str = "") -> Flaw | None:
    """Return the first flaw of *value*, or None."""
    if value is None:
        if schema.get("nullable"):
            return None
        return Flaw(pointer, "nullable", "Value is not nullable")
    if (allowed := schema.get("enum")) and value not in allowed:
        reason = f"value is not one of the allowed values {_compact(allowed)}"
        return Flaw(pointer, "enum", reason)
    if "type" not in schema:
        return None
    return _TYPES[schema["type"]](schema, value, pointer)


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _string(schema: Schema, value: Any, pointer: str) -> Flaw | None:
    if not isinstance(value, str):
        return Flaw(pointer, "type", "value must be a string")
    if len(value) < (least := schema.get("minLength", 0)):
        return Flaw(pointer, "min_length", f"minimum string length is {least}")
    if len(value) > (most := schema.get("maxLength", len(value))):
        return Flaw(pointer, "max_length", f"maximum string length is {most}")
    if (pattern := schema.get("pattern")) and not matches(pattern, value):
        reason = f'string doesn\'t match the regular expression "{pattern}"'
        return Flaw(pointer, "pattern", reason)
    if schema.get("format") == "date-time" and not matches(DATE_TIME, value):
        reason = (
            'string doesn\'t match the format "date-time": '
            f'string doesn\'t match pattern "{DATE_TIME}"'
        )
        return Flaw(pointer, "format", reason)
    return None


def matches(pattern: str, value: str) -> bool:
    """Return whether *value* holds Go's *pattern*."""
    # Go's `$` is the end of the text, Python's would forgive a newline before it.
    return re.search(pattern.removesuffix("$") + r"\Z", value, re.ASCII) is not None


def _object(schema: Schema, value: Any, pointer: str) -> Flaw | None:
    if not isinstance(value, dict):
        return Flaw(pointer, "type", "value must be an object")
    properties: dict[str, Schema] = schema.get("properties", {})
    additional: Schema | bool = schema.get("additionalProperties", True)
    for name in sorted(value):
        part = properties.get(name, additional)
        if part is False:
            reason = f'property "{name}" is unsupported'
            return Flaw(pointer, "properties", reason)
        if part is not True and (flaw := check(part, value[name], f"{pointer}/{name}")):
            return flaw
    for name in schema.get("required", ()):
        if name not in value:
            reason = f'property "{name}" is missing'
            return Flaw(f"{pointer}/{name}", "required", reason)
    return None


def _array(schema: Schema, value: Any, pointer: str) -> Flaw | None:
    if not isinstance(value, list):
        return Flaw(pointer, "type", "value must be an array")
    for index, item in enumerate(value):
        if flaw := check(schema["items"], item, f"{pointer}/{index}"):
            return flaw
    return None


def _number(schema: Schema, value: Any, pointer: str) -> Flaw | None:
    whole = schema["type"] == "integer"
    # A document's whole numbers are ints, whatever way they were written.
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        kind = "an integer" if whole else "a number"
        return Flaw(pointer, "type", f"value must be {kind}")
    if value < (least := schema.get("minimum", value)):
        return Flaw(pointer, "minimum", f"number must be at least {least}")
    if value > (most := schema.get("maximum", value)):
        return Flaw(pointer, "maximum", f"number must be at most {most}")
    return None


def _boolean(_: Schema, value: Any, pointer: str) -> Flaw | None:
    if isinstance(value, bool):
        return None
    return Flaw(pointer, "type", "value must be a boolean")


_TYPES: dict[str, Callable[[Schema, Any, str], Flaw | None]] = {
    "string": _string,
    "object": _object,
    "array": _array,
    "number": _number,
    "integer": _number,
    "boolean": _boolean,
}
PREFIX = "request body has an error: "


def require(body: bytes) -> None:
    """Refuse an empty *body*."""
    if not body:
        raise Problem(400, f"{PREFIX}value is required but missing")


def parse(body: bytes) -> Any:
    """Return the JSON document in *body*.

    Numbers are float64, as everything passes through one in OpenMeter: integers
    beyond 2^53 lose their last digits.
    """
    require(body)
    # Go reads broken UTF-8, and escapes of half a character, as U+FFFD.
    text = body.decode("utf-8", "replace")
    try:
        return json.loads(
            text, parse_int=number, parse_float=number, parse_constant=_constant
        )
    except (ValueError, RecursionError) as error:
        detail = f"{PREFIX}failed to decode request body: {_reason(text, error)}"
        raise Problem(400, detail) from None


def number(digits: str) -> int | float:
    """Return the float64 nearest to *digits*, as an int where it is a whole one."""
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"cannot unmarshal number {digits} into a float64")
    # Go writes whole float64s without a point, up to this exponent.
    return int(value) if value.is_integer() and abs(value) < 1e21 else value


def _constant(name: str) -> float:
    raise ValueError(f"invalid character {name[0]!r} looking for beginning of value")


def _reason(text: str, error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "exceeded max depth"
    first = text.lstrip(" \t\r\n")[:1]
    if first and first not in '{["-0123456789tfn':
        return f"invalid character {first!r} looking for beginning of value"
    return str(error)


def well_formed(text: str) -> str:
    """Return *text* with halves of surrogate pairs replaced, as Go replaces them."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read(body: bytes, schema: Schema, name: str) -> dict[str, Any]:
    """Return the object in *body*, checked against the schema called *name*."""
    document: dict[str, Any] = parse(body)
    if flaw := check(schema, document):
        text = f"{PREFIX}doesn't match schema #/components/schemas/{name}: {flaw}"
        raise Problem(400, text, flaw=flaw)
    return document


def refuse(name: str, reason: str) -> Problem:
    """Return the problem of a parameter."""
    return Problem(400, f'parameter "{name}" in query has an error: {reason}')


def integer(
    arguments: Arguments, name: str, default: int, least: int, most: int
) -> int:
    """Return the number *name* from *least* to *most*."""
    text = arguments.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"-?[0-9]{1,18}", text, re.ASCII):
        raise refuse(name, f"value {text}: an invalid integer: invalid syntax")
    value = int(text)
    if value < least:
        raise refuse(name, f"number must be at least {least}")
    if value > most:
        raise refuse(name, f"number must be at most {most}")
    return value


def moment(text: str | None, name: str) -> int | None:
    """Return RFC 3339 *text* in Unix seconds."""
    if text is None:
        return None
    wrong = refuse(name, 'string doesn\'t match the format "date-time"')
    if not matches(DATE_TIME, text):
        raise wrong
    try:
        return parse_time(text)
    except ValueError:
        raise wrong from None


def parse_moment(text: str) -> int:
    """Return a time in a document, which has passed the schema, in Unix seconds."""
    try:
        return parse_time(text)
    except ValueError:
        detail = f'parsing time "{text}": not in RFC3339 format'
        raise Problem(400, f"request body has an error: {detail}") from None


def page(arguments: Arguments) -> tuple[int, int]:
    """Return the number of the page, from 1, and how many items are on one."""
    number = integer(arguments, "page", 1, 1, 10**9)
    return number, integer(arguments, "pageSize", 100, 1, 1000)


def paged(items: list[Document], arguments: Arguments) -> Document:
    """Return the page of *items* that is asked for, as the API wraps it."""
    number, size = page(arguments)
    return {
        "totalCount": len(items),
        "page": number,
        "pageSize": size,
        "items": items[(number - 1) * size : number * size],
    }

"""The HTTP layer of the sandbox: request bodies, parameters, schemas and errors.

The texts of errors are those of OpenMeter and of kin-openapi, the validator that checks
requests before OpenMeter handles them. So a client gets the same errors from both.

In docstrings, "answer 400" means: raise a `Problem`, from which `answer` makes the
response.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
import secrets
from dataclasses import KW_ONLY, dataclass
from datetime import UTC, datetime
from decimal import Decimal
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException
from werkzeug.http import parse_options_header

if TYPE_CHECKING:
    from collections.abc import Callable

    from werkzeug.datastructures import MultiDict

    Arguments = MultiDict[str, str]

logger: Final = logging.getLogger(__name__)

#: The start of the ids of requests; OpenMeter's are ``<host>/<random>-<number>``.
_RUN = f"sandbox/{secrets.token_urlsafe(7)}"
_numbers = itertools.count(1)
#: The details of version 3 for errors without a detail in version 1.
_DETAILS_V3 = {
    404: "The requested entity was not found",
    405: "The requested method is not allowed",
}
#: The range of Python's datetime, the years 1 to 9999, in Unix seconds.
_OLDEST, _NEWEST = -62_135_596_800, 253_402_300_799


@dataclass(eq=False)
class Problem(ValueError):
    """An error response. Callers of `Sandbox` get it as a ValueError."""

    status: int
    #: The text of the error. OpenMeter has none for unknown routes and for 500.
    detail: str | None = None
    _: KW_ONLY
    #: True if the validator found the error. Then the response of version 1 has no
    #: ``instance``, and that of version 3 names the field.
    invalid: bool = False
    #: The violation of the schema, if this is the error.
    flaw: Flaw | None = None
    #: True if version 3 omits the detail.
    terse: bool = False
    extensions: Document | None = None
    #: A longer text for the page, if the detail is not enough.
    reason: str = ""
    #: The position of the event in its batch that caused the error, from 1.
    position: int | None = None
    #: Seconds for the header ``Retry-After``.
    retry_after: float | None = None

    def __post_init__(self) -> None:
        self.reason = self.reason or self.detail or HTTPStatus(self.status).phrase

    def __str__(self) -> str:
        return self.reason

    def v1(self) -> Document:
        """Return the body of the response in the v1 and v2 APIs."""
        body: Document = {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
        }
        if self.detail is not None:
            body["detail"] = self.detail
        if not self.invalid:
            body["instance"] = _instance()
        if self.extensions is not None:
            body["extensions"] = self.extensions
        return body

    def v3(self) -> Document:
        """Return the body of the response in the v3 API."""
        title = HTTPStatus(self.status).phrase
        detail, parameters = self.detail, None
        if self.invalid:
            detail, parameters = self._parameters(title)
        elif self.terse:
            detail = title
        elif detail is None and self.status in _DETAILS_V3:
            detail = _DETAILS_V3[self.status]
        else:
            return self.v1()
        slug = title.lower().replace(" ", "-")
        body: Document = {
            "type": f"https://kongapi.info/konnect/{slug}",
            "status": self.status,
            "title": title,
            "instance": _instance(),
            "detail": detail,
        }
        return body | ({"invalid_parameters": parameters} if parameters else {})

    def _parameters(self, title: str) -> tuple[str, list[Document]]:
        if self.flaw is None:
            parameter = {"field": "", "reason": self.detail, "source": ""}
            return f"{title}: : {self.detail}", [parameter]
        field = self.flaw.pointer.strip("/").replace("/", ".")
        rule, reason = self.flaw.rule, self.flaw.reason
        parameter = {"field": field, "rule": rule, "reason": reason, "source": ""}
        return f"{title}: {field} [{rule}]: {reason}", [parameter]


def invalid(detail: str, flaw: Flaw | None = None) -> Problem:
    """Return the problem for a request that the validator refuses."""
    return Problem(400, detail, invalid=True, flaw=flaw)


def _instance() -> str:
    return f"urn:request:{_RUN}-{next(_numbers):06d}"


def answer(problem: Problem) -> Response:
    """Return the response for *problem*, in the format of the API's version."""
    v3 = request.path.startswith(("/api/v3/", "/v3/"))
    body = problem.v3() if v3 else problem.v1()
    response = Response(
        json.dumps(body), problem.status, content_type="application/problem+json"
    )
    if problem.retry_after is not None:
        response.headers["Retry-After"] = str(math.ceil(problem.retry_after))
    return response


def install(app: Flask) -> None:
    """Make *app* answer each exception in OpenMeter's format of errors."""

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
DATE_TIME = (
    r"^[0-9]{4}-(0[1-9]|10|11|12)-(0[1-9]|[12][0-9]|3[01])"
    r"T([0-1][0-9]|2[0-3]):[0-5][0-9]:([0-5][0-9]|60)(\.[0-9]+)?"
    r"(Z|(\+|-)[0-9]{2}:[0-9]{2})$"
)
KEY = "^[a-z0-9]+(?:_[a-z0-9]+)*$"
ULID = "^[0-7][0-9A-HJKMNP-TV-Za-hjkmnp-tv-z]{25}$"
TIME: Schema = {"type": "string", "format": "date-time"}
TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
#: An object with texts as values.
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
METADATA: Schema = TEXTS | {"nullable": True}


def text(most: int | None = None, **more: Any) -> Schema:
    """Return the schema of a text with 1 to *most* characters."""
    limit = {} if most is None else {"maxLength": most}
    return TEXT | {"minLength": 1} | limit | more


def shape(required: str, /, **properties: Schema) -> Schema:
    """Return the schema of an object with *properties*; *required* lists names."""
    return {
        "type": "object",
        "required": required.split(),
        "properties": properties,
    }


def list_of(items: Schema) -> Schema:
    """Return the schema of an array."""
    return {"type": "array", "items": items}


SLUG: Schema = text(64, pattern=KEY)


@dataclass(frozen=True, slots=True)
class Flaw:
    """The first violation of a schema in a document."""

    #: The JSON pointer of the value.
    pointer: str
    #: The keyword of the schema that is violated.
    rule: str
    reason: str

    def nested(self) -> str:
        """Return the text of a flaw in a schema to which another schema refers."""
        steps = [f'Error at "/{step}"' for step in self.pointer.split("/")[1:]]
        return ": ".join([": doesn't match schema due to: ".join(steps), self.reason])

    def __str__(self) -> str:
        return (
            f'Error at "{self.pointer}": {self.reason}' if self.pointer else self.reason
        )


def check(schema: Schema, value: Any, pointer: str = "") -> Flaw | None:
    """Return the first flaw of *value*, or None if it fits *schema*."""
    if value is None:
        if schema.get("nullable"):
            return None
        return Flaw(pointer, "nullable", "Value is not nullable")
    if (allowed := schema.get("enum")) and value not in allowed:
        listed = json.dumps(allowed, separators=(",", ":"))
        return Flaw(pointer, "enum", f"value is not one of the allowed values {listed}")
    if "type" not in schema:
        return None
    return _TYPES[schema["type"]](schema, value, pointer)


def _string(schema: Schema, value: Any, pointer: str) -> Flaw | None:
    if not isinstance(value, str):
        return Flaw(pointer, "type", "value must be a string")
    if len(value) < (least := schema.get("minLength", 0)):
        return Flaw(pointer, "min_length", f"minimum string length is {least}")
    if len(value) > (most := schema.get("maxLength", len(value))):
        return Flaw(pointer, "max_length", f"maximum string length is {most}")
    if (pattern := schema.get("pattern")) and not matches(pattern, value):
        reason = f'string doesn\'t match the regular expression "{pattern}"'
        return Flaw(pointer, "pattern", schema.get("otherwise", reason))
    if schema.get("format") == "date-time" and not matches(DATE_TIME, value):
        reason = (
            'string doesn\'t match the format "date-time": '
            f'string doesn\'t match pattern "{DATE_TIME}"'
        )
        return Flaw(pointer, "format", reason)
    return None


def matches(pattern: str, value: str) -> bool:
    """Return True if *value* matches Go's *pattern*."""
    # Go's `$` matches only at the end; Python's also before a newline at the end.
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
    # `parse` makes ints of all whole numbers, in any spelling.
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
JSON = "application/json"
#: Go's texts for the errors of Python's JSON decoder; %s is the character.
_SYNTAX = {
    "Expecting value": "invalid character %s looking for beginning of value",
    "Expecting property name enclosed in double quotes": (
        "invalid character %s looking for beginning of object key string"
    ),
    "Expecting ':' delimiter": "invalid character %s after object key",
    "Expecting ',' delimiter": "invalid character %s after object key:value pair",
    "Invalid control character at": "invalid character %s in string literal",
}


def body_of(*kinds: str) -> bytes:
    """Return the body of the request; answer 400 if it has no type in *kinds*."""
    body = request.get_data()
    if not body:
        raise invalid(f"{PREFIX}value is required but missing")
    given = request.headers.get("Content-Type", "").strip()
    bare = parse_options_header(given)[0] if ";" in given else given
    if bare not in kinds:
        raise invalid(f'{PREFIX}header Content-Type has unexpected value "{given}"')
    return body


def parse(body: bytes) -> Any:
    """Return the first JSON document in *body*; like Go, ignore text after it.

    OpenMeter converts all numbers to float64, so integers above 2^53 are rounded.
    """
    # Go reads invalid UTF-8, and escapes of single surrogates, as U+FFFD.
    text = body.decode("utf-8", "replace")
    start = len(text) - len(text.lstrip(" \t\r\n"))
    try:
        document = _DECODER.raw_decode(text, start)[0]
        if "\\ud" not in text.lower():
            return document
        return json.loads(well_formed(json.dumps(document, ensure_ascii=False)))
    except (ValueError, RecursionError) as error:
        detail = f"{PREFIX}failed to decode request body: {_reason(text, error)}"
        raise invalid(detail) from None


def number(digits: str) -> int | float:
    """Return *digits* as a float64, or as an int if that is a whole number."""
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(
            f"json: cannot unmarshal number {digits} into Go value of type float64"
        )
    return tidy(value)


def tidy(value: float) -> float:
    """Return *value* as Go writes it: whole numbers below 1e21 become ints.

    An int above 2^53 has the shortest digits of the float64, followed by zeros.
    """
    whole = float(value).is_integer() and abs(value) < 1e21
    return int(Decimal(repr(float(value)))) if whole else value


def _constant(name: str) -> float:
    first = name.lstrip("-")[0]
    raise ValueError(f"invalid character {first!r} looking for beginning of value")


_DECODER = json.JSONDecoder(
    parse_int=number, parse_float=number, parse_constant=_constant
)


def _reason(text: str, error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "invalid character '[' exceeded max depth"
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    rest = text[error.pos :].lstrip(" \t\r\n")
    if not rest or error.msg.startswith("Unterminated"):
        return "unexpected EOF" if text.strip(" \t\r\n") else "EOF"
    # Go names the byte. U+FFFD stands for a byte that is no UTF-8.
    first = request.get_data()[:1] if rest[0] == "\ufffd" else rest[0].encode()[:1]
    sentence = _SYNTAX.get(error.msg, "invalid character %s in string escape code")
    return sentence % repr(first.decode("latin-1"))


def well_formed(text: str) -> str:
    """Return *text* with U+FFFD for each single surrogate, like Go."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read(schema: Schema, name: str | None = None) -> Document:
    """Return the object in the body of the request, checked against *schema*.

    :param name: the name of the schema in errors; None if they do not name it.
    """
    document: Document = parse(body_of(JSON))
    if flaw := check(schema, document):
        text = f"{PREFIX}doesn't match schema #/components/schemas/{name}: {flaw}"
        # The error does not name a schema to which another schema refers.
        bare = name is None or flaw.rule == "enum"
        raise invalid(flaw.nested() if bare else text, flaw)
    known = schema.get("properties", {})
    return {name: part for name, part in document.items() if name in known}


def path_parameter(name: str, value: str, pattern: str) -> str:
    """Return *value* if it matches *pattern* and has 1 to 64 characters."""
    schema = {"type": "string", "minLength": 1, "maxLength": 64, "pattern": pattern}
    if flaw := check(schema, value):
        raise invalid(f'parameter "{name}" in path has an error: {flaw.reason}')
    return value


def refuse(name: str, reason: str) -> Problem:
    """Return the problem for an invalid parameter of the query string."""
    return invalid(f'parameter "{name}" in query has an error: {reason}')


def _format_error(name: str, reason: str) -> Problem:
    detail = f"invalid param format {name}: Invalid format for parameter {name}"
    return Problem(400, f"{detail}: {reason}")


def integer(
    arguments: Arguments, name: str, default: int, least: int, most: int
) -> int:
    """Return the parameter *name*, an integer from *least* to *most*."""
    text = arguments.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"-?[0-9]{1,18}", text, re.ASCII):
        reason = f'strconv.ParseInt: parsing "{text}": invalid syntax'
        raise _format_error(name, f"error binding string parameter: {reason}")
    value = int(text)
    if value < least:
        raise refuse(name, f"number must be at least {least}")
    if value > most:
        raise refuse(name, f"number must be at most {most}")
    return value


def moment(text: str | None, name: str) -> int | None:
    """Convert *text*, in RFC 3339 or a date, to Unix seconds."""
    if text is None:
        return None
    try:
        if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text, re.ASCII):
            return parse_time(f"{text}T00:00:00Z")
        if matches(DATE_TIME, text):
            return parse_time(text)
    except ValueError:
        pass
    reason = f"error parsing '{text}' as RFC3339 or 2006-01-02 time: parsing time"
    reason += f' "{text}" as "2006-01-02": cannot parse "{text}" as "2006"'
    raise _format_error(name, reason)


def parse_moment(text: str) -> int:
    """Convert a time in a document that fits the schema to Unix seconds."""
    try:
        return parse_time(text)
    except ValueError:
        detail = f'parsing time "{text}": not in RFC3339 format'
        raise Problem(400, f"{PREFIX}{detail}") from None


def parse_time(moment: str) -> int:
    """Convert *moment*, in RFC 3339, to whole Unix seconds."""
    if not re.search(r"(Z|[+-]\d\d:\d\d)$", moment):
        raise ValueError(moment)
    if moment.startswith("0000-"):
        # Python has no year 0. The event is dropped anyway because of its age.
        return -1
    return int(datetime.fromisoformat(moment).timestamp() // 1)


def rfc3339(moment: float) -> str:
    """Return Unix *moment* as OpenMeter writes it."""
    known = min(max(moment, _OLDEST), _NEWEST)
    return datetime.fromtimestamp(known, UTC).isoformat().replace("+00:00", "Z")


def go_time(moment: float) -> str:
    """Return Unix *moment* as Go's ``time.Time.String`` writes it."""
    return rfc3339(moment).replace("T", " ").replace("Z", " +0000 UTC")


def page(arguments: Arguments) -> tuple[int, int]:
    """Return the number of the requested page, from 1, and its maximum of items."""
    number = integer(arguments, "page", 1, 1, 10**9)
    return number, integer(arguments, "pageSize", 100, 1, 1000)


def paged(items: list[Document]) -> Document:
    """Return the requested page of *items* in the form of the API."""
    number, size = page(request.args)
    return {
        "totalCount": len(items),
        "page": number,
        "pageSize": size,
        "items": items[(number - 1) * size : number * size],
    }

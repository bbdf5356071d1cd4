"""Measures: values of a meter that are known only after the response has ended.

A policy has a measure in place of a number or a text::

    meter={"type": "transfer", "data": {"bytes": bytes_sent(), "route": route()}}
    meters={"tokens": llm_usage("total_tokens")}

When a response is settled, :func:`evaluate` replaces each measure by its value. A meter
with a measure that has no value makes no event, and the statistics count the missing
event. ``.default(0)`` sets a value to use instead. No value is ever estimated.

In a file, a measure is written as text:

========================  ==========================================================
``$request.method``       method
``$request.route``        the template of the path
``$request.bytes``        bytes of the request's body
``$request.header.NAME``  a header of the request
``$response.status``      status code
``$response.bytes``       bytes of the response's body
``$response.duration``    seconds
``$response.header.NAME`` a header of the response
``$response.json.PATH``   number at a JSONPath: ``$response.json.usage.total_tokens``
``$response.records``     number of JSON lines
``$response.succeeded``   parts of a multi-status response; also ``.failed``
``$llm``                  all usage of a language model, in place of the whole ``data``
``$llm.FIELD``            one figure of that usage: ``$llm.total_tokens``
``$llm:SHAPE``            the same, only from reports of this shape: ``$llm:openai``
``$llm:SHAPE.FIELD``      one figure of these: ``$llm:openai.total_tokens``
``$llm:SHAPE/type:NAME``  one event for each type of token; NAME: the billing company
========================  ==========================================================

``?? VALUE`` after a measure is its default, as JSON: ``$response.header.X-N ?? 0``.
Other text that begins with a dollar sign is written with two dollar signs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, get_args

import msgspec

from openmeter_wsgi import log
from openmeter_wsgi.bodies.base import Unknown
from openmeter_wsgi.errors import MeterValueError
from openmeter_wsgi.events import VALUE_PROPERTY, CheckedUsage, Number, read_usage
from openmeter_wsgi.exchange import Body, Exchange, reader_of
from openmeter_wsgi.request import raise_after_settling
from openmeter_wsgi.values import text_problem

if TYPE_CHECKING:
    from collections.abc import Callable

    from openmeter_wsgi.bodies.llm_shapes import Provider

logger: Final = log.get_logger(__name__)


_NO_DEFAULT: Any = object()
_COMPUTED = "computed("
#: The separator between the shape of a report and the company that bills the tokens.
_BY_TYPE = "/type:"
#: The quoted names in a JSONPath.
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""")
#: Maximum number of digits before the decimal point. No float has more.
_MAX_DIGITS = 310
#: A number in the syntax of HTTP and JSON. Python's `float` and `Decimal` also accept
#: ``1_000``, Arabic digits and all kinds of white space.
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


class Measure:
    """A value that is computed from an :class:`Exchange`. Immutable and thread-safe."""

    __slots__ = ("_default", "_find", "bodies", "is_quantity", "is_split", "text")

    def __init__(
        self,
        text: str,
        find: Callable[[Exchange], object],
        *,
        bodies: Iterable[Body] = (),
        is_quantity: bool = True,
        is_split: bool = False,
        default: object = _NO_DEFAULT,
    ) -> None:
        #: The measure as it is written in a file.
        self.text: str = text
        #: The readers of the response's body that the measure needs.
        self.bodies: frozenset[Body] = frozenset(bodies)
        for body in self.bodies:
            reader_of(body)  # imports the reader now, not at the first response
        #: True if the value is an amount, not a property such as the method. Meters
        #: with an amount are billed even if the response was interrupted.
        self.is_quantity: bool = is_quantity
        #: True if the value is a list with the data of several events. Then the measure
        #: must stand in place of the whole ``data``.
        self.is_split: bool = is_split
        self._find = find
        self._default = default

    def default(self, value: object) -> Measure:
        """Return the same measure with *value* as its value if it has no other."""
        return Measure(
            self.text,
            self._find,
            bodies=self.bodies,
            is_quantity=self.is_quantity,
            is_split=self.is_split,
            default=value,
        )

    @property
    def content(self) -> tuple[object, ...]:
        """The text, the default and the user's function, to compare measures by."""
        function = self._find if self.text.startswith(_COMPUTED) else None
        return self.text, self._default, function

    def value(self, exchange: Exchange) -> object:
        """Return the value, or an :class:`Unknown` with the reason."""
        try:
            value = self._find(exchange)
        except BaseException as error:  # noqa: BLE001 - may be code of the user
            logger.error("%s: raised %r; the measure has no value", self, error)
            value = Unknown("failed")
            if not isinstance(error, Exception):
                raise_after_settling(exchange.environ, error)
        if value is None:
            value = Unknown("none")
        if isinstance(value, Unknown) and self._default is not _NO_DEFAULT:
            return self._default
        return value

    def __repr__(self) -> str:
        if self._default is _NO_DEFAULT:
            return self.text
        return f"{self.text} ?? {self._default!r}"


def bytes_sent() -> Measure:
    """The number of bytes of the response's body that the server took."""
    return Measure("$response.bytes", lambda exchange: exchange.bytes_sent)


def bytes_received() -> Measure:
    """The number of bytes of the request's body."""
    return Measure("$request.bytes", lambda exchange: exchange.bytes_received)


def duration() -> Measure:
    """The seconds from the arrival of the request to the end of the response."""
    return Measure("$response.duration", lambda exchange: exchange.duration)


def status() -> Measure:
    """The status code, a number."""
    return _property("$response.status", lambda exchange: exchange.status)


def method() -> Measure:
    """The method of the request."""
    return _property("$request.method", lambda exchange: exchange.method)


def route() -> Measure:
    """The template of the path, as the framework defines it: ``/users/<id>``."""
    return _property("$request.route", lambda exchange: exchange.route)


def request_header(name: str) -> Measure:
    """A header of the request. Clients choose it, so no price should depend on it."""
    return _property(f"$request.header.{name}", lambda e: e.request_header(name))


def response_header(name: str) -> Measure:
    """A header of the response."""
    return Measure(f"$response.header.{name}", lambda e: e.response_header(name))


def response_json(path: str) -> Measure:
    """The number at a JSONPath (RFC 9535) in the body; several numbers are added up.

    The ``$`` at the beginning may be left out: ``usage.total``.

    :raises ConfigError: if *path* is no JSONPath, or python-jsonpath is not installed.
    """
    from openmeter_wsgi.bodies.json import NumberPath  # see `reader_of`

    if not path.startswith("$"):
        path = f"${path}" if path.startswith("[") else f"$.{path}"
    numbers = NumberPath(path)
    if ".." in _QUOTED.sub("", path):
        logger.warning(
            "response_json %r: '..' also matches values that a customer sends and the "
            "response echoes, so that customers can change their bill; write the whole "
            "path",
            path,
        )

    def find(exchange: Exchange) -> object:
        document = exchange.body("json")
        if isinstance(document, Unknown):
            return document
        return numbers.find_number(document.value)

    return Measure(f"$response.json{path.removeprefix('$')}", find, bodies=["json"])


def records() -> Measure:
    """The number of records in a body of JSON lines."""
    return Measure("$response.records", lambda e: e.records, bodies=["records"])


def multi_status(part: str = "succeeded") -> Measure:
    """The number of parts of a multi-status response that succeeded, or failed."""
    from openmeter_wsgi.bodies.multi_status import MultiStatus  # see `reader_of`

    if part not in MultiStatus.__struct_fields__:
        raise ValueError(f"expected 'succeeded' or 'failed', got {part!r}")

    def find(exchange: Exchange) -> object:
        parts = exchange.multi_status
        return parts if isinstance(parts, Unknown) else getattr(parts, part)

    return Measure(f"$response.{part}", find, bodies=["multi_status"])


def llm_usage(
    field: str | None = None,
    *,
    provider: str | None = None,
    split: Literal["type"] | None = None,
    shape: Provider | None = None,
) -> Measure:
    """The usage of a language model: one field of :class:`LLMUsage`, or all fields.

    Without *field* the measure stands in place of the whole ``data`` and gives the
    figures that were reported.

    *provider* has two meanings:

    - Without *split* it is the shape of the report: ``"openai"``, ``"anthropic"``,
      ``"gemini"``, ``"cohere"``, ``"ollama"`` or ``"bedrock"``. Reports of other shapes
      are ignored. Groq, Azure and many others use the shape ``"openai"``. Set it
      whenever the body may contain text of the caller.
    - With ``split="type"`` it is the company that bills you, such as ``"groq"``, and
      *shape* is the shape of the report. The default of *shape* is *provider* if that
      is a shape, else ``"openai"``.

    ``split="type"`` makes one event for each type of token, with ``tokens``, ``type``
    (``input``, ``output``, ``cache_read``, ``cache_write``, ``reasoning``),
    ``provider`` and ``model``, by which OpenMeter finds a price. Each token has one
    type.

    :raises ValueError: if an argument is not one of the above.
    """
    from openmeter_wsgi.bodies.llm_shapes import FIELDS, PROVIDERS  # see `reader_of`

    if field is not None and field not in FIELDS:
        raise ValueError(f"expected one of {', '.join(FIELDS)}, got {field!r}")
    if split is not None:
        default = provider if provider in PROVIDERS else "openai"
        return _tokens_by_type(split, field, provider, shape or default)
    if shape is not None:
        raise ValueError(
            "shape: expected only with split='type'; without split, provider= is the "
            "shape of the report"
        )
    body = _body_of("provider", provider)

    def find(exchange: Exchange) -> object:
        usage: Any = exchange.llm_usage(provider)  # type: ignore[arg-type]
        if isinstance(usage, Unknown):
            return usage
        if field is None:
            figures = {name: getattr(usage, name) for name in FIELDS}
            return {name: value for name, value in figures.items() if value is not None}
        value = getattr(usage, field)
        return Unknown("not_reported") if value is None else value

    text = f"${body}" if field is None else f"${body}.{field}"
    return Measure(text, find, bodies=[body])


def _tokens_by_type(
    split: str, field: str | None, provider: str | None, shape: str | None
) -> Measure:
    from openmeter_wsgi.bodies.llm_shapes import priced_data  # see `reader_of`

    if split != "type" or field is not None:
        raise ValueError(
            f"split: expected 'type', without a field, got {split!r} and {field!r}"
        )
    if provider is None or text_problem(provider):
        raise ValueError(
            "provider: expected the company that bills the tokens, such as 'openai', "
            f"'azure' or 'groq', got {provider!r}"
        )
    body = _body_of("shape", shape)

    def find(exchange: Exchange) -> object:
        usage = exchange.llm_usage(shape)  # type: ignore[arg-type]
        if isinstance(usage, Unknown):
            return usage
        return priced_data(usage, provider) or Unknown("not_reported")

    return Measure(f"${body}{_BY_TYPE}{provider}", find, bodies=[body], is_split=True)


def _body_of(name: str, shape: str | None) -> Body:
    """Return the reader for *shape*; *name* is the argument named in the exception."""
    from openmeter_wsgi.bodies.llm_shapes import PROVIDERS  # see `reader_of`

    if shape is not None and shape not in PROVIDERS:
        names = ", ".join(map(repr, PROVIDERS))
        problem = f"{name}: expected one of {names}, got {shape!r}"
        if name == "provider":
            problem += (
                "; this is the shape of the report: Groq, Azure and others have the "
                "shape 'openai', so write provider='openai' ($llm:openai in a file); "
                "only with split='type' is it the company that bills the tokens "
                f"($llm:openai{_BY_TYPE}{shape} in a file)"
            )
        raise ValueError(problem)
    return f"llm:{shape}" if shape else "llm"  # type: ignore[return-value]


def computed(function: Callable[[Exchange], object], *bodies: Body) -> Measure:
    """The result of *function*, called with the exchange. None means no value.

    *bodies* are the readers that the function needs: ``"json"``, ``"records"``,
    ``"multi_status"``, ``"llm"``, or ``"llm:openai"`` for one shape. Only the readers
    named here read the response's body.
    """
    for body in bodies:
        if body not in get_args(Body):
            names = ", ".join(map(repr, get_args(Body)))
            raise ValueError(f"expected one of {names}, got {body!r}")
    name = getattr(function, "__name__", repr(function))
    return Measure(f"{_COMPUTED}{name})", function, bodies=bodies)


def _property(text: str, find: Callable[[Exchange], object]) -> Measure:
    return Measure(text, find, is_quantity=False)


def _int_if_whole(number: Decimal) -> int | Decimal:
    """Return a whole number as an int, unless it is larger than any float.

    A client may send ``1e999999``, whose conversion to an int takes minutes.
    """
    if number.adjusted() > _MAX_DIGITS or number != number.to_integral_value():
        return number
    return int(number)


def as_number(value: object) -> int | float | Decimal | Unknown:
    """Return *value* as a number; text is parsed."""
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        text = value.strip(" \t")  # HTTP allows blanks around the value of a header
        try:
            number = Decimal(text) if _NUMBER.fullmatch(text) else None
        except InvalidOperation:  # an exponent with dozens of digits
            number = None
        if number is not None:
            return _int_if_whole(number)
    return Unknown("not_a_number")


_WITHOUT_NAME: dict[str, Callable[[], Measure]] = {
    "$request.method": method,
    "$request.route": route,
    "$request.bytes": bytes_received,
    "$response.status": status,
    "$response.bytes": bytes_sent,
    "$response.duration": duration,
    "$response.records": records,
    "$response.succeeded": lambda: multi_status("succeeded"),
    "$response.failed": lambda: multi_status("failed"),
    "$llm": llm_usage,
}
_WITH_NAME: dict[str, Callable[[str], Measure]] = {
    "$request.header.": request_header,
    "$response.header.": response_header,
    "$llm.": llm_usage,
    "$llm:": lambda rest: _llm_usage_of(*rest.split(".", 1)),
}
_JSON = "$response.json"


def read_measure(text: str) -> Measure | str:
    """Return the measure that *text* names, else the text, with ``$$`` as ``$``.

    :raises ValueError: if *text* begins with one dollar sign and names no measure.
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
        raise ValueError(f"{text!r}: expected JSON after '??'") from None


def _named(name: str) -> Measure:
    if make := _WITHOUT_NAME.get(name):
        return make()
    if name.startswith(_JSON) and name[len(_JSON) :][:1] in {".", "["}:
        return response_json("$" + name.removeprefix(_JSON))
    if name.startswith("$llm") and _BY_TYPE in name:
        return _by_type(*name.removeprefix("$llm").split(_BY_TYPE, 1))
    for prefix, make_named in _WITH_NAME.items():
        if (rest := name.removeprefix(prefix)) != name and rest:
            return make_named(rest)
    names = [*_WITH_NAME, f"$llm{_BY_TYPE}"]
    known = ", ".join([*_WITHOUT_NAME, *(f"{prefix}NAME" for prefix in names)])
    raise ValueError(
        f"{name!r} is no measure; expected one of {known}, {_JSON}.PATH "
        "(or two dollar signs for text that begins with one)"
    )


def _llm_usage_of(shape: str, field: str | None = None) -> Measure:
    return llm_usage(field, provider=shape)


def _by_type(suffix: str, provider: str) -> Measure:
    shape: Any = suffix.removeprefix(":") or None
    return llm_usage(split="type", provider=provider, shape=shape)


#: The number put in place of a measure while the rest of a document is checked.
_ANY_NUMBER = 1


class _NoValue(Exception):
    """A measure of a meter has no value."""

    def __init__(self, measure: Measure, reason: str) -> None:
        self.measure = measure
        self.reason = reason
        super().__init__(reason)


class MeasuredMeter(NamedTuple):
    """A meter whose number or data contains measures."""

    type: str
    #: A document (of `meter`) that contains measures, or a measure (of `meters`).
    content: Any
    measures: tuple[Measure, ...]

    @property
    def is_quantity(self) -> bool:
        """True if any of its measures is an amount."""
        return any(measure.is_quantity for measure in self.measures)

    def data(self) -> Any:
        """Return its data with the measures in it; a measure if that gives all data."""
        if isinstance(self.content, Measure):
            return {VALUE_PROPERTY: self.content}
        return self.content.get("data", {})


class Evaluated(NamedTuple):
    """The results of measured meters."""

    usage: CheckedUsage
    #: For each meter without a result: its type, the measure without a value, and the
    #: reason.
    missing: list[tuple[str, Measure, str]]


def split(meter: Any, meters: Any) -> tuple[CheckedUsage, tuple[MeasuredMeter, ...]]:
    """Split the meters of a policy into those without and those with measures.

    *meter* and *meters* are the options of a policy, as given or as text from a file.

    :raises ValueError: with the problem, if the meters are not valid.
    """
    documents: list[Mapping[str, Any]] = []
    numbers: dict[str, Any] = {}
    measured: list[MeasuredMeter] = []
    given = [meter] if isinstance(meter, Mapping) else list(meter or ())
    for document in given:
        read = _with_measures(document)
        if measures := tuple(_measures_in(read)):
            _check(read)
            _check_places(read["data"], measures)
            measured.append(MeasuredMeter(read["type"], read, measures))
        else:
            documents.append(read)
    for name, value in (meters or {}).items():
        number = read_measure(value) if isinstance(value, str) else value
        if isinstance(number, Measure):
            read_usage({name: _ANY_NUMBER})
            _check_places(None, (number,))
            measured.append(MeasuredMeter(name, number, (number,)))
        else:
            numbers[name] = number
    plain = read_usage(documents).documents if documents else ()
    counted = read_usage(numbers).numbers if numbers else {}
    return CheckedUsage(counted, plain), (*measured,)


def evaluate(meters: Iterable[MeasuredMeter], exchange: Exchange) -> Evaluated:
    """Return the results of *meters* for *exchange*. Never raises."""
    numbers: dict[str, Number] = {}
    documents: list[Mapping[str, Any]] = []
    missing: list[tuple[str, Measure, str]] = []
    for meter in meters:
        try:
            value = _filled(meter.content, exchange)
            if isinstance(meter.content, Measure):
                numbers |= read_usage({meter.type: _number(meter, value)}).numbers
            else:
                filled = _documents(value)
                read_usage(filled)
                documents += filled
        except _NoValue as absence:
            missing.append((meter.type, absence.measure, absence.reason))
        except MeterValueError as error:
            logger.error("meter %r: no event is sent: %s", meter.type, error)
            missing.append((meter.type, meter.measures[0], "invalid"))
    plain = read_usage(documents).documents if documents else ()
    return Evaluated(CheckedUsage(numbers, plain), missing)


def _documents(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return one document for each element of ``data``, if ``data`` is a list."""
    data = document.get("data")
    return (
        [{**document, "data": d} for d in data]
        if isinstance(data, list)
        else [document]
    )


def _number(meter: MeasuredMeter, value: object) -> Any:
    number = as_number(value)
    if isinstance(number, Unknown):
        raise _NoValue(meter.content, number.reason)
    return number


def _with_measures(value: Any) -> Any:
    """Return *value* with each text that names a measure replaced by the measure."""
    if isinstance(value, str):
        return read_measure(value)
    if isinstance(value, Mapping):
        return {key: _with_measures(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_with_measures(each) for each in value]
    return value


def _measures_in(value: Any) -> Iterable[Measure]:
    if isinstance(value, Measure):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _measures_in(each)
    elif isinstance(value, list):
        for each in value:
            yield from _measures_in(each)


def _check(document: Mapping[str, Any]) -> None:
    """Check a document with a number in place of each measure."""
    data = document.get("data")
    stand_in = {"any": _ANY_NUMBER} if isinstance(data, Measure) else _replaced(data)
    rest = {key: value for key, value in document.items() if key != "data"}
    if found := next(iter(_measures_in(rest)), None):
        raise ValueError(f"expected measures only in data, got {found!r} outside it")
    read_usage({**rest, "data": stand_in})


def _check_places(data: Any, measures: Iterable[Measure]) -> None:
    """Check that a measure with the data of several events is the whole *data*."""
    for measure in measures:
        if measure.is_split and measure is not data:
            raise ValueError(
                f"{measure!r}: expected in place of the whole data of a document: "
                "{'type': …, 'data': llm_usage(split='type', …)}"
            )


def _replaced(value: Any) -> Any:
    """Return *value* with each measure replaced by a number."""
    if isinstance(value, Measure):
        return _ANY_NUMBER
    if isinstance(value, Mapping):
        return {key: _replaced(each) for key, each in value.items()}
    return [_replaced(each) for each in value] if isinstance(value, list) else value


def _filled(value: Any, exchange: Exchange) -> Any:
    """Return *value* with each measure replaced by its value.

    :raises _NoValue: if a measure has no value.
    """
    if isinstance(value, Measure):
        found = value.value(exchange)
        if isinstance(found, Unknown):
            raise _NoValue(value, found.reason)
        return found
    if isinstance(value, Mapping):
        return {key: _filled(each, exchange) for key, each in value.items()}
    return (
        [_filled(each, exchange) for each in value]
        if isinstance(value, list)
        else value
    )

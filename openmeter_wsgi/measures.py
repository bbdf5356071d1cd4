"""Measures: values of a meter that are known only when the response has ended.

A policy names them where a number or a text would stand::

    meter={"type": "transfer", "data": {"bytes": bytes_sent(), "route": route()}}
    meters={"tokens": llm_usage("total_tokens")}

A measure that has no value gives no event, which is counted; ``.default(0)`` gives it
one. It is never guessed.

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
``$llm:SHAPE/type:NAME``  one event for each type of token, of the provider NAME
========================  ==========================================================

``?? VALUE`` behind one of these is its default, as JSON: ``$response.header.X-N ?? 0``.
Text that begins with a dollar sign and means nothing else is written with two.
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


_NONE: Any = object()
_COMPUTED = "computed("
#: Stands between the shape of a report and the provider that bills its tokens.
_BY_TYPE = "/type:"
#: The names in a JSONPath that are quoted.
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""")
#: More digits has no number that OpenMeter could read.
_MAX_DIGITS = 310
#: A number as HTTP and JSON write it. Python's own grammar also takes ``1_000``, Arabic
#: digits and every kind of blank.
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


class Measure:
    """A value that an :class:`Exchange` has, or lacks. Immutable; any thread."""

    __slots__ = ("_default", "_find", "bodies", "is_quantity", "is_split", "text")

    def __init__(
        self,
        text: str,
        find: Callable[[Exchange], object],
        *,
        bodies: Iterable[Body] = (),
        is_quantity: bool = True,
        is_split: bool = False,
        default: object = _NONE,
    ) -> None:
        #: How it is written in a file.
        self.text: str = text
        #: The readers of the response's body that it needs.
        self.bodies: frozenset[Body] = frozenset(bodies)
        for body in self.bodies:
            reader_of(body)  # imports it now, and not with the first response
        #: Whether it says how much, rather than of what kind: a quantity is billed
        #: also of a response that broke off.
        self.is_quantity: bool = is_quantity
        #: Whether it gives the data of several events, so that it stands for all data.
        self.is_split: bool = is_split
        self._find = find
        self._default = default

    def default(self, value: object) -> Measure:
        """Return the same measure, with a value for where it has none."""
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
        """The parts by which measures are equal: text, default, the user's function."""
        own = self._find if self.text.startswith(_COMPUTED) else None
        return self.text, self._default, own

    def value(self, exchange: Exchange) -> object:
        """Return the value, or an :class:`Unknown` that says why there is none."""
        try:
            found = self._find(exchange)
        except BaseException as error:  # noqa: BLE001 - the user's own code may be in it
            logger.error("%s: raised %r; it has no value", self, error)
            found = Unknown("failed")
            if not isinstance(error, Exception):
                raise_after_settling(exchange.environ, error)
        if found is None:
            found = Unknown("none")
        if isinstance(found, Unknown) and self._default is not _NONE:
            return self._default
        return found

    def __repr__(self) -> str:
        if self._default is _NONE:
            return self.text
        return f"{self.text} ?? {self._default!r}"


def bytes_sent() -> Measure:
    """Bytes of the response's body that the client took."""
    return Measure("$response.bytes", lambda exchange: exchange.bytes_sent)


def bytes_received() -> Measure:
    """Bytes of the request's body."""
    return Measure("$request.bytes", lambda exchange: exchange.bytes_received)


def duration() -> Measure:
    """Seconds from the request's arrival to the end of its response."""
    return Measure("$response.duration", lambda exchange: exchange.duration)


def status() -> Measure:
    """The status code, a number."""
    return _kind("$response.status", lambda exchange: exchange.status)


def method() -> Measure:
    """The method of the request."""
    return _kind("$request.method", lambda exchange: exchange.method)


def route() -> Measure:
    """The template of the address, as the framework has it: ``/users/<id>``."""
    return _kind("$request.route", lambda exchange: exchange.route)


def request_header(name: str) -> Measure:
    """A header of the request. Clients set it, so do not let it decide the price."""
    return _kind(f"$request.header.{name}", lambda e: e.request_header(name))


def response_header(name: str) -> Measure:
    """A header of the response."""
    return Measure(f"$response.header.{name}", lambda e: e.response_header(name))


def response_json(path: str) -> Measure:
    """The number that a JSONPath (RFC 9535) finds in the body; several are added up.

    :raises ConfigError: if it is no JSONPath, or python-jsonpath is not installed.
    """
    from openmeter_wsgi.bodies.json import NumberPath  # see `reader_of`

    numbers = NumberPath(path)
    if ".." in _QUOTED.sub("", path):
        logger.warning(
            "response_json %r: '..' also finds what a customer sends and the response "
            "echoes, so customers change what they are billed; name the whole path",
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
    """The usage of a language model: one field of :class:`LLMUsage`, or all of them.

    Without a field it stands for the whole ``data``, with the figures that were
    reported and no others. With a *provider* it reads reports of that shape alone.
    State it wherever the body holds anything of the caller's.

    ``split="type"`` sends one event for each type of token, with ``tokens``, ``type``
    (``input``, ``output``, ``cache_read``, ``cache_write``, ``reasoning``),
    ``provider`` and ``model``, by which OpenMeter finds a price. Each token is in one
    of them. There *provider* is the company that bills you, such as ``"groq"``, and
    *shape* the form of its reports: by default its own, or else OpenAI's.
    """
    from openmeter_wsgi.bodies.llm_shapes import FIELDS, PROVIDERS  # see `reader_of`

    if field is not None and field not in FIELDS:
        raise ValueError(f"expected one of {', '.join(FIELDS)}, got {field!r}")
    if split is not None:
        default = provider if provider in PROVIDERS else "openai"
        return _tokens_by_type(split, field, provider, shape or default)
    if shape is not None:
        raise ValueError("shape: expected it with split='type' alone; write provider=")
    body = _body_of("provider", provider)

    def find(exchange: Exchange) -> object:
        usage: Any = exchange.llm_usage(provider)  # type: ignore[arg-type]
        if isinstance(usage, Unknown):
            return usage
        if field is None:
            found = {name: getattr(usage, name) for name in FIELDS}
            return {name: value for name, value in found.items() if value is not None}
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
    """Return the body that holds reports of *shape*; *name* says what may be wrong."""
    from openmeter_wsgi.bodies.llm_shapes import PROVIDERS  # see `reader_of`

    if shape is not None and shape not in PROVIDERS:
        names = ", ".join(map(repr, PROVIDERS))
        raise ValueError(f"{name}: expected one of {names}, got {shape!r}")
    return f"llm:{shape}" if shape else "llm"  # type: ignore[return-value]


def computed(function: Callable[[Exchange], object], *bodies: Body) -> Measure:
    """The result of *function*, called with the exchange; None for no value.

    *bodies* names what it looks at of the response's body: ``"json"``, ``"llm"`` or
    ``"llm:openai"`` and the like, ``"records"``, ``"multi_status"``. Nothing of it is
    read unless it is named.
    """
    for body in bodies:
        if body not in get_args(Body):
            names = ", ".join(map(repr, get_args(Body)))
            raise ValueError(f"expected one of {names}, got {body!r}")
    name = getattr(function, "__name__", repr(function))
    return Measure(f"{_COMPUTED}{name})", function, bodies=bodies)


def _kind(text: str, find: Callable[[Exchange], object]) -> Measure:
    return Measure(text, find, is_quantity=False)


def _plain(number: Decimal) -> int | Decimal:
    """Return a whole number as one, unless it is larger than a float can be.

    A client may send ``1e999999``, which as an integer takes minutes.
    """
    if number.adjusted() > _MAX_DIGITS or number != number.to_integral_value():
        return number
    return int(number)


def as_number(value: object) -> int | float | Decimal | Unknown:
    """Return *value* as a number; text as the number that it says."""
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        text = value.strip(" \t")  # what HTTP allows around the value of a header
        try:
            number = Decimal(text) if _NUMBER.fullmatch(text) else None
        except InvalidOperation:  # of an exponent with dozens of digits
            number = None
        if number is not None:
            return _plain(number)
    return Unknown("not_a_number")


_PLAIN: dict[str, Callable[[], Measure]] = {
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
        return response_json("$" + name.removeprefix(_JSON))
    if name.startswith("$llm") and _BY_TYPE in name:
        return _by_type(*name.removeprefix("$llm").split(_BY_TYPE, 1))
    for prefix, make_named in _WITH_NAME.items():
        if (rest := name.removeprefix(prefix)) != name and rest:
            return make_named(rest)
    names = [*_WITH_NAME, f"$llm{_BY_TYPE}"]
    known = ", ".join([*_PLAIN, *(f"{prefix}NAME" for prefix in names)])
    raise ValueError(
        f"{name!r} is no measure; expected one of {known}, {_JSON}.PATH "
        "(or two dollar signs for text that begins with one)"
    )


def _llm_usage_of(provider: str, field: str | None = None) -> Measure:
    return llm_usage(field, provider=provider)


def _by_type(shape: str, provider: str) -> Measure:
    form: Any = shape.removeprefix(":") or None
    return llm_usage(split="type", provider=provider, shape=form)


#: Stands for a measure where the rest of a document is checked.
_ANY_NUMBER = 1


class _NoValue(Exception):
    def __init__(self, measure: Measure, reason: str) -> None:
        self.measure = measure
        self.reason = reason
        super().__init__(reason)


class MeasuredMeter(NamedTuple):
    """A meter whose number, or whose data, is known only in the end."""

    type: str
    #: A document, or a measure alone for a number by type.
    content: Any
    measures: tuple[Measure, ...]

    @property
    def is_quantity(self) -> bool:
        """True if it measures an amount, and not only a kind."""
        return any(measure.is_quantity for measure in self.measures)

    def data(self) -> Any:
        """Return its data, with the measures in it; one measure if it gives it all."""
        if isinstance(self.content, Measure):
            return {VALUE_PROPERTY: self.content}
        return self.content.get("data", {})


class Evaluated(NamedTuple):
    """The results of measured meters."""

    usage: CheckedUsage
    #: The measures that had no value, and why, by the type of their meter.
    missing: list[tuple[str, Measure, str]]


def split(meter: Any, meters: Any) -> tuple[CheckedUsage, tuple[MeasuredMeter, ...]]:
    """Split the meters of a policy into the known ones and the measured ones.

    :raises ValueError: naming what is wrong. It may be called again with the same.
    """
    documents: list[Mapping[str, Any]] = []
    numbers: dict[str, Any] = {}
    measured: list[MeasuredMeter] = []
    given = [meter] if isinstance(meter, Mapping) else list(meter or ())
    for document in given:
        read = _with_measures(document)
        if found := tuple(_measures_in(read)):
            _check(read)
            _check_places(read["data"], found)
            measured.append(MeasuredMeter(read["type"], read, found))
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
    """Return the results of *meters* at the end of *exchange*. Never raises."""
    numbers: dict[str, Number] = {}
    documents: list[Mapping[str, Any]] = []
    missing: list[tuple[str, Measure, str]] = []
    for meter in meters:
        try:
            value = _filled(meter.content, exchange)
            if isinstance(meter.content, Measure):
                numbers |= read_usage({meter.type: _number(meter, value)}).numbers
            else:
                made = _documents(value)
                read_usage(made)
                documents += made
        except _NoValue as none:
            missing.append((meter.type, none.measure, none.reason))
        except MeterValueError as error:
            logger.error("meter %r: not sent: %s", meter.type, error)
            missing.append((meter.type, meter.measures[0], "invalid"))
    plain = read_usage(documents).documents if documents else ()
    return Evaluated(CheckedUsage(numbers, plain), missing)


def _documents(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return one document for each element of its data, if that is a list."""
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
    """Return *value* with texts that name measures replaced by them."""
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
    """Check a document, except for its measures."""
    data = document.get("data")
    stand_in = {"any": _ANY_NUMBER} if isinstance(data, Measure) else _replaced(data)
    rest = {key: value for key, value in document.items() if key != "data"}
    if found := next(iter(_measures_in(rest)), None):
        raise ValueError(f"expected measures in data alone, got {found!r} outside it")
    read_usage({**rest, "data": stand_in})


def _check_places(data: Any, measures: Iterable[Measure]) -> None:
    """Check that a measure of several events stands for all data of a document."""
    for measure in measures:
        if measure.is_split and measure is not data:
            raise ValueError(
                f"{measure!r}: expected in place of the whole data of a document, as "
                "{'type': …, 'data': llm_usage(split='type', …)}"
            )


def _replaced(value: Any) -> Any:
    if isinstance(value, Measure):
        return _ANY_NUMBER
    if isinstance(value, Mapping):
        return {key: _replaced(each) for key, each in value.items()}
    return [_replaced(each) for each in value] if isinstance(value, list) else value


def _filled(value: Any, exchange: Exchange) -> Any:
    """Return *value* with every measure replaced by its value."""
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

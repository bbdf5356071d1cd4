"""Checks and encodes the values of an event: data, numbers, text, sources, times.

OpenMeter reads numbers in ``data`` into 64-bit floats, and takes text for numbers; so a
number that no float can hold is sent as text. NaN and infinity are not JSON: they would
be sent as null, and the meter would count nothing.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import ROUND_HALF_EVEN, Context, Decimal
from math import floor, inf
from string import ascii_letters, digits, hexdigits
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import msgspec

from openmeter_wsgi.errors import MeterValueError, safe_repr

if TYPE_CHECKING:
    from collections.abc import Callable


#: The largest integer up to which a 64-bit float holds every integer.
MAX_EXACT_INTEGER = 2**53
#: OpenMeter writes each event into a Kafka message, which may not be larger.
MAX_MESSAGE_BYTES = 1_000_000
#: The part of it for headers, frame and the names of fields.
_FRAME_BYTES = 512
#: A message is at most so many times as long as its event: a `<` in the data takes
#: seven bytes there.
MAX_GROWTH = 8
#: A subject of so many characters does not make an event too large.
SHORT_SUBJECT = 1_000
#: A number that travels as text has no more digits.
MAX_DIGITS = 60
#: The decimal places of a float that is added to a Decimal.
_FLOAT_PLACES = 40

#: The context in which Decimals are added. That of the application may round, or raise
#: errors. Any two floats have an exact sum here.
_CONTEXT = Context(
    prec=1_000, rounding=ROUND_HALF_EVEN, Emin=-99_999, Emax=99_999,
    capitals=1, clamp=0, flags=[], traps=[],
)  # fmt: skip


def encode_data(data: object, what: str) -> bytes:
    """Encode the ``data`` of an event, without the keys whose value is None.

    OpenMeter refuses a null at this level, and takes it deeper.

    :raises MeterValueError: if it is no JSON object, or OpenMeter could not read it.
    """
    if not isinstance(data, Mapping):
        raise MeterValueError(f"{what}: expected a JSON object, got {safe_repr(data)}")
    try:
        exact: Any = _exact(data, what)
        encoded = msgspec.json.encode(
            {key: value for key, value in exact.items() if value is not None}
        )
    except (TypeError, UnicodeEncodeError, RecursionError) as error:
        raise MeterValueError(f"{what}: {error}") from None
    if len(encoded) * MAX_GROWTH > MAX_MESSAGE_BYTES:
        size = _data_bytes(encoded) + _FRAME_BYTES
        if size > MAX_MESSAGE_BYTES:
            raise MeterValueError(f"{what}: {too_large(size)}")
    return encoded


def encode_number(number: float | Decimal) -> bytes:
    """Encode a finite number of at most 60 digits so that it arrives exact."""
    return msgspec.json.encode(_exact_number(number))


def add_exactly(left: Decimal, right: Decimal) -> Decimal:
    """Return the sum of two Decimals, whatever the application's context is."""
    return _CONTEXT.add(left, right)


def as_decimal(number: float | Decimal) -> Decimal:
    """Return a finite number as a Decimal; a float as its shortest text.

    A float is rounded to 40 places: with the residue of a rounding a sum would have
    too many digits to be sent.
    """
    if isinstance(number, Decimal):
        return number
    exact = Decimal(str(number))
    if exact.adjusted() < -_FLOAT_PLACES:
        return Decimal(0)
    if int(exact.as_tuple().exponent) < -_FLOAT_PLACES:
        return _CONTEXT.quantize(exact, Decimal((0, (1,), -_FLOAT_PLACES)))
    return exact


def digits_problem(number: float | Decimal) -> str | None:
    """Return an error if a finite number has too many digits to be sent, else None."""
    if isinstance(number, Decimal):
        # Not counted in the text: that of 1E-999999999 would fill the memory.
        _, digits, exponent = number.as_tuple()
        places = int(exponent)
        written = max(len(digits) + places, 1) + max(-places, 0)
    elif isinstance(number, float) or abs(number) <= MAX_EXACT_INTEGER:
        return None
    else:
        written = len(str(abs(number)))
    if written <= MAX_DIGITS:
        return None
    return f"expected a number of at most {MAX_DIGITS} digits, got {written} digits"


def text_problem(value: object) -> str | None:
    """Return an error if *value* cannot be a type, id or subject, else None."""
    if not isinstance(value, str) or not value:
        return f"expected text that is not empty, got {safe_repr(value)}"
    if "\0" in value:
        # OpenMeter would take it, and then fail to list its events.
        return f"expected text without NUL, got {safe_repr(value)}"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"expected text that can be encoded, got {safe_repr(value)}"
    return None


def is_finite(number: float | Decimal) -> bool:
    """Return True if a 64-bit float can hold *number*; OpenMeter uses such floats."""
    try:
        return math.isfinite(float(number))
    except (OverflowError, ValueError):  # a huge integer, a signalling NaN
        return False


def written_number(number: int | Decimal) -> str:
    """Return *number* with all its digits and without an exponent."""
    return f"{number:f}" if isinstance(number, Decimal) else str(int(number))


def _exact_number(number: float | Decimal) -> int | float | str:
    if isinstance(number, float):
        return float(number)
    if isinstance(number, int) and abs(number) <= MAX_EXACT_INTEGER:
        return int(number)
    return written_number(number)


def _exact(value: object, path: str) -> object:
    """Return *value* as JSON types in which every number arrives exact."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float | Decimal):
        if not is_finite(value):
            raise MeterValueError(
                f"{path}: expected a finite number, got {safe_repr(value)}"
            )
        if problem := digits_problem(value):
            raise MeterValueError(f"{path}: {problem}")
        return _exact_number(value)
    if isinstance(value, Mapping):
        return {_key(k, path): _exact(v, f"{path}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_exact(item, f"{path}[{n}]") for n, item in enumerate(value)]
    return _exact(_to_json_types(value, path), path)


def _key(key: object, path: str) -> str:
    if not isinstance(key, str):
        raise MeterValueError(f"{path}: expected text as keys, got {safe_repr(key)}")
    return key


def _to_json_types(value: object, path: str) -> object:
    """Return a date, UUID, set, dataclass or Struct as JSON types."""
    try:
        return msgspec.to_builtins(value)
    except TypeError:
        raise MeterValueError(
            f"{path}: expected a JSON value, got {type(value).__name__}"
        ) from None


# -- The size of a Kafka message


class _Event(msgspec.Struct):
    """The attributes that OpenMeter puts into its message."""

    id: str
    source: str
    type: str
    subject: str
    data: msgspec.Raw = msgspec.Raw(b"")


def message_bytes(event: bytes) -> int:
    """Return the size of the Kafka message that OpenMeter makes of an event.

    Its ``data`` is a JSON text within the JSON of the message, and both are written as
    Go does it. The key of the message repeats source and id.
    """
    read = msgspec.json.decode(event, type=_Event)
    texts = (read.id, read.source, read.type, read.subject)
    key = len(read.source.encode()) + len(read.id.encode())
    size = sum(_text_bytes(msgspec.json.encode(text)) for text in texts)
    return size + key + _data_bytes(bytes(read.data)) + _FRAME_BYTES


def too_large(size: int) -> str:
    """Return the error of a message that is too large."""
    return (
        f"expected at most {MAX_MESSAGE_BYTES} bytes in the message that OpenMeter "
        f"makes of it (<, > and & take seven there, a quotation mark two), got {size}"
    )


def _text_bytes(text: bytes) -> int:
    """Return the length of a JSON text as Go writes it, with <, > and & escaped."""
    escaped = sum(map(text.count, (b"<", b">", b"&")))
    return len(text) + 5 * escaped + 3 * _separators(text)


def _data_bytes(data: bytes) -> int:
    """Return the length of a JSON document as Go writes it within a JSON text."""
    size = _text_bytes(data)
    # Each escape by Go gains a backslash, as does each quotation mark and backslash.
    again = sum(map(data.count, (b'"', b"\\", b"<", b">", b"&")))
    return size + again + _separators(data) + _number_growth(data)


def _separators(text: bytes) -> int:
    """Return the number of U+2028 and U+2029."""
    return text.count(b"\xe2\x80\xa8") + text.count(b"\xe2\x80\xa9")


def _number_growth(data: bytes) -> int:
    """Return the bytes that Go adds by its notation of the floats of a document."""
    # The first alternative skips texts.
    found = re.findall(rb'"(?:[^"\\]|\\.)*"|(-?\d+(?:\.\d+(?:e-?\d+)?|e-?\d+))', data)
    return sum(len(_as_go_writes(number)) - len(number) for number in found if number)


def _as_go_writes(number: bytes) -> str:
    value = float(number)
    if value == 0 or 1e-6 <= abs(value) < 1e21:
        text = f"{Decimal(repr(value)):f}"
        return text.removesuffix(".0")
    return repr(value).removesuffix(".0").replace("e-0", "e-")


# Sets, not a regular expression: that takes a millisecond to compile, at every import.
_IN_SCHEME = frozenset(ascii_letters + digits + "+.-")
_CHARACTERS = _IN_SCHEME | frozenset("_~:/?#[]@!$&'()*,;=%")
_HEX = frozenset(hexdigits)
#: What ends the first segment of a path.
_ENDS = frozenset("/?#")


def source_problem(source: object) -> str | None:
    """Return an error if OpenMeter's parser refuses *source*, else None."""
    if not isinstance(source, str) or not _has_valid_characters(source):
        return f"expected a URI reference such as 'my-api', got {safe_repr(source)}"
    before, colon, _ = source.partition(":")
    if colon and _ENDS.isdisjoint(before) and not _is_scheme(before):
        return (
            "expected a URI reference, whose first part has no colon unless it is a "
            f"scheme, got {safe_repr(source)}"
        )
    try:
        _ = urlsplit(source).port
    except ValueError as error:
        return f"expected a URI reference, got {safe_repr(source)}: {error}"
    return None


def _has_valid_characters(source: str) -> bool:
    escapes = source.split("%")[1:]
    return (
        source != ""
        and _CHARACTERS.issuperset(source)
        and all(len(each) >= 2 and _HEX.issuperset(each[:2]) for each in escapes)
    )


def _is_scheme(text: str) -> bool:
    return text[:1].isalpha() and _IN_SCHEME.issuperset(text)


_HUNDREDTHS = tuple(f".{n:02}Z" for n in range(100))


class Clock:
    """The present time as text, to the hundredth of a second. Any thread.

    The text is kept until its hundredth is over, by the monotonic clock: formatting a
    time costs more than comparing two.
    """

    __slots__ = ("_second", "monotonic", "now", "text", "until")

    def __init__(self) -> None:
        #: Seconds since 1970.
        self.now: Callable[[], float] = time.time
        self.monotonic: Callable[[], float] = time.monotonic
        #: The text of this moment, until `monotonic` says that it is not.
        self.text: str = ""
        self.until: float = 0.0
        self._second: tuple[int, str] = (0, "1970-01-01T00:00:00")

    def renew(self) -> str:
        """Format this moment, to the hundredth of a second."""
        now = self.now()
        hundredths = floor(now * 100.0)
        whole = hundredths // 100
        second, text = self._second
        if whole != second:
            text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole))
            self._second = (whole, text)
        text += _HUNDREDTHS[hundredths % 100]
        # In this order: a thread that sees the new `until` must see the new text.
        self.text = text
        self.until = self.monotonic() + (hundredths + 1) / 100.0 - now
        return text


clock: Final = Clock()


def set_clock(now: Callable[[], float]) -> Callable[[], float]:
    """Read the time from *now* (seconds since 1970); return the clock before it."""
    before, clock.now = clock.now, now
    # Another clock may run at another speed, so no text is kept.
    clock.monotonic = time.monotonic if now is time.time else lambda: inf
    clock.until = 0.0
    return before


def timestamp() -> str:
    """Return the present moment, to the hundredth of a second.

    OpenMeter keeps whole seconds; we need the rest for the age of an event.
    """
    return clock.text if clock.monotonic() < clock.until else clock.renew()


#: The length of a timestamp without the fraction of a second and the Z.
WHOLE_SECONDS = len("2026-01-02T03:04:05")


def is_later(left: str, right: str) -> bool:
    """Return True if *left* is in a later second than *right*, both in UTC."""
    return left[:WHOLE_SECONDS] > right[:WHOLE_SECONDS]


class _Timed(msgspec.Struct):
    time: datetime


def moment_of(event: bytes) -> float | None:
    """Return the time of an encoded event in seconds since 1970, or None."""
    try:
        return msgspec.json.decode(event, type=_Timed).time.timestamp()
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def age_of(event: bytes) -> float:
    """Return the age of an encoded event in seconds, 0 if that is unknown."""
    moment = moment_of(event)
    return 0.0 if moment is None else max(time.time() - moment, 0.0)


def read_time(value: object, what: str) -> str:
    """Return the point in time *value* as text.

    :raises MeterValueError: if it is no RFC 3339 text and no datetime, names no
        time zone, or lies before 1970: OpenMeter drops such an event silently.
    """
    moment = value
    if isinstance(value, str):
        try:
            moment = msgspec.convert(value, datetime)
        except msgspec.ValidationError:
            moment = None
    if not isinstance(moment, datetime) or moment.tzinfo is None:
        raise MeterValueError(
            f"{what}: expected RFC 3339 text or a datetime with a time zone, "
            f"got {safe_repr(value)}"
        )
    if moment.timestamp() < 1:
        raise MeterValueError(
            f"{what}: expected a time after 1970, got {safe_repr(value)}"
        )
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")

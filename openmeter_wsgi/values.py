"""Checks and encodes the values of an event: data, numbers, text, sources, times.

OpenMeter parses JSON numbers in ``data`` as 64-bit floats, but also accepts numbers as
text. So a number that a float cannot represent exactly is sent as text. NaN and
infinity are rejected: JSON has neither, and null in their place would count nothing.
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


#: Largest n such that a 64-bit float represents all integers from 0 to n.
MAX_EXACT_INTEGER = 2**53
#: Maximum number of bytes of the Kafka message that OpenMeter makes of an event.
MAX_MESSAGE_BYTES = 1_000_000
#: Number of bytes in the message for headers, frame and field names.
_FRAME_BYTES = 512
#: Maximum ratio of message size to event size: a ``<`` in the data takes seven bytes.
MAX_GROWTH = 8
#: Maximum number of characters of a subject that cannot make an event too large.
SHORT_SUBJECT = 1_000
#: Maximum number of digits of a number that is sent as text.
MAX_DIGITS = 60
#: Number of decimal places of a float that is added to a Decimal.
_FLOAT_PLACES = 40

#: Context for adding Decimals. It is precise enough for the sum of any two floats. The
#: context of the application may round or raise.
_CONTEXT = Context(
    prec=1_000, rounding=ROUND_HALF_EVEN, Emin=-99_999, Emax=99_999,
    capitals=1, clamp=0, flags=[], traps=[],
)  # fmt: skip


def encode_data(data: object, what: str) -> bytes:
    """Encode the ``data`` of an event as JSON, without top-level keys of value None.

    OpenMeter rejects null at the top level and accepts it in nested values.

    :raises MeterValueError: if *data* is not a JSON object, or too large for OpenMeter.
        Its message begins with *what*, as in all functions of this module.
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
    """Encode a finite number of at most `MAX_DIGITS` digits without loss."""
    return msgspec.json.encode(_exact_number(number))


def add_exactly(left: Decimal, right: Decimal) -> Decimal:
    """Return the sum of two Decimals, independent of the application's context."""
    return _CONTEXT.add(left, right)


def as_decimal(number: float | Decimal) -> Decimal:
    """Return a finite number as a Decimal, a float by its shortest decimal form.

    Floats are rounded to 40 decimal places: otherwise a sum with a tiny rounding error,
    such as 1e-60, would have too many digits to be sent.
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
    """Return an error message if a finite number has too many digits, or None."""
    if isinstance(number, Decimal):
        # Computed without the text: that of 1E-999999999 would fill the memory.
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
    """Return an error message if *value* cannot be a type, id or subject, or None."""
    if not isinstance(value, str) or not value:
        return f"expected text that is not empty, got {safe_repr(value)}"
    if "\0" in value:
        # OpenMeter accepts such an event, but then fails to list events.
        return f"expected text without NUL, got {safe_repr(value)}"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"expected text that can be encoded, got {safe_repr(value)}"
    return None


def is_finite(number: float | Decimal) -> bool:
    """Return True if *number* is in the range of a 64-bit float, as OpenMeter needs."""
    try:
        return math.isfinite(float(number))
    except (OverflowError, ValueError):  # a huge integer, a signalling NaN
        return False


def written_number(number: int | Decimal) -> str:
    """Return *number* as text with all digits, without an exponent."""
    return f"{number:f}" if isinstance(number, Decimal) else str(int(number))


def _exact_number(number: float | Decimal) -> int | float | str:
    if isinstance(number, float):
        return float(number)
    if isinstance(number, int) and abs(number) <= MAX_EXACT_INTEGER:
        return int(number)
    return written_number(number)


def _exact(value: object, path: str) -> object:
    """Convert *value* to JSON types, with each number in a form that loses nothing."""
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
    """Convert a date, UUID, set, dataclass or Struct to JSON types."""
    try:
        return msgspec.to_builtins(value)
    except TypeError:
        raise MeterValueError(
            f"{path}: expected a JSON value, got {type(value).__name__}"
        ) from None


# -- The size of a Kafka message


class _Event(msgspec.Struct):
    """The attributes of an event that OpenMeter copies into its message."""

    id: str
    source: str
    type: str
    subject: str
    data: msgspec.Raw = msgspec.Raw(b"")


def message_bytes(event: bytes) -> int:
    """Return the size in bytes of the Kafka message that OpenMeter makes of an event.

    The message is JSON that contains ``data`` as a JSON string, both written by Go's
    encoder. The key of the message repeats source and id.
    """
    decoded = msgspec.json.decode(event, type=_Event)
    texts = (decoded.id, decoded.source, decoded.type, decoded.subject)
    key = len(decoded.source.encode()) + len(decoded.id.encode())
    size = sum(_text_bytes(msgspec.json.encode(text)) for text in texts)
    return size + key + _data_bytes(bytes(decoded.data)) + _FRAME_BYTES


def too_large(size: int) -> str:
    """Return the error message for a message of *size* bytes."""
    return (
        f"expected at most {MAX_MESSAGE_BYTES} bytes in the message that OpenMeter "
        f"makes of it (<, > and & take seven there, a quotation mark two), got {size}"
    )


def _text_bytes(text: bytes) -> int:
    """Return the length of a JSON string as Go writes it, with <, > and & escaped."""
    escaped = sum(map(text.count, (b"<", b">", b"&")))
    return len(text) + 5 * escaped + 3 * _separators(text)


def _data_bytes(data: bytes) -> int:
    """Return the length of a JSON document as Go writes it within a JSON string."""
    size = _text_bytes(data)
    # The outer string adds a backslash to each quotation mark, backslash and escape.
    again = sum(map(data.count, (b'"', b"\\", b"<", b">", b"&")))
    return size + again + _separators(data) + _number_growth(data)


def _separators(text: bytes) -> int:
    """Return the number of characters U+2028 and U+2029, which Go escapes."""
    return text.count(b"\xe2\x80\xa8") + text.count(b"\xe2\x80\xa9")


def _number_growth(data: bytes) -> int:
    """Return the number of bytes that Go adds by its notation of floats."""
    # The first alternative skips strings: for these the group is empty.
    floats = re.findall(rb'"(?:[^"\\]|\\.)*"|(-?\d+(?:\.\d+(?:e-?\d+)?|e-?\d+))', data)
    return sum(len(_as_go_writes(number)) - len(number) for number in floats if number)


def _as_go_writes(number: bytes) -> str:
    value = float(number)
    if value == 0 or 1e-6 <= abs(value) < 1e21:
        text = f"{Decimal(repr(value)):f}"
        return text.removesuffix(".0")
    return repr(value).removesuffix(".0").replace("e-0", "e-")


# Sets, because compiling a regular expression would take 1 ms at each import.
_IN_SCHEME = frozenset(ascii_letters + digits + "+.-")
_CHARACTERS = _IN_SCHEME | frozenset("_~:/?#[]@!$&'()*,;=%")
_HEX = frozenset(hexdigits)
#: Characters that end the first segment of a URI reference (RFC 3986, 4.2).
_SEGMENT_ENDS = frozenset("/?#")


def source_problem(source: object) -> str | None:
    """Return an error message if OpenMeter cannot parse *source*, or None.

    CloudEvents 1.0 requires a non-empty URI reference.
    """
    if not isinstance(source, str) or not _has_valid_characters(source):
        return f"expected a URI reference such as 'my-api', got {safe_repr(source)}"
    before, colon, _ = source.partition(":")
    if colon and _SEGMENT_ENDS.isdisjoint(before) and not _is_scheme(before):
        return (
            "expected a URI reference without a colon in its first part, unless that "
            f"is a scheme, got {safe_repr(source)}"
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
        and all(len(rest) >= 2 and _HEX.issuperset(rest[:2]) for rest in escapes)
    )


def _is_scheme(text: str) -> bool:
    return text[:1].isalpha() and _IN_SCHEME.issuperset(text)


_HUNDREDTHS = tuple(f".{n:02}Z" for n in range(100))


class Clock:
    """The current time as RFC 3339 text, to the hundredth of a second. Any thread.

    The text is cached until its hundredth is over, measured by the monotonic clock:
    comparing two floats is cheaper than formatting a time.
    """

    __slots__ = ("_second", "monotonic", "now", "text", "until")

    def __init__(self) -> None:
        #: Returns the Unix time in seconds.
        self.now: Callable[[], float] = time.time
        self.monotonic: Callable[[], float] = time.monotonic
        #: The cached text, valid while `monotonic()` is less than `until`.
        self.text: str = ""
        self.until: float = 0.0
        #: The last whole second: Unix time and text.
        self._second: tuple[int, str] = (0, "1970-01-01T00:00:00")

    def renew(self) -> str:
        """Format, cache and return the current time."""
        now = self.now()
        hundredths = floor(now * 100.0)
        whole = hundredths // 100
        second, text = self._second
        if whole != second:
            text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole))
            self._second = (whole, text)
        text += _HUNDREDTHS[hundredths % 100]
        # In this order: a thread that reads the new `until` must read the new text.
        self.text = text
        self.until = self.monotonic() + (hundredths + 1) / 100.0 - now
        return text


clock: Final = Clock()


def set_clock(now: Callable[[], float]) -> Callable[[], float]:
    """Use *now* (Unix seconds) for event times; return the function used before.

    For tests.
    """
    previous, clock.now = clock.now, now
    # A replaced clock may run at another speed, so its text must not be cached.
    clock.monotonic = time.monotonic if now is time.time else lambda: inf
    clock.until = 0.0
    return previous


def timestamp() -> str:
    """Return the current time as RFC 3339 text, to the hundredth of a second.

    OpenMeter stores whole seconds. The fraction is for the age of an event.
    """
    return clock.text if clock.monotonic() < clock.until else clock.renew()


#: Number of characters of a timestamp without the fraction of a second and the Z.
WHOLE_SECONDS = len("2026-01-02T03:04:05")


def is_later(left: str, right: str) -> bool:
    """Return True if *left* is in a later second than *right*, both in UTC."""
    return left[:WHOLE_SECONDS] > right[:WHOLE_SECONDS]


class _Timed(msgspec.Struct):
    time: datetime


def moment_of(event: bytes) -> float | None:
    """Return the time of an encoded event in Unix seconds, or None if unknown."""
    try:
        return msgspec.json.decode(event, type=_Timed).time.timestamp()
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def age_of(event: bytes) -> float:
    """Return the age of an encoded event in seconds, 0 if unknown."""
    moment = moment_of(event)
    return 0.0 if moment is None else max(time.time() - moment, 0.0)


def read_time(value: object, what: str) -> str:
    """Return the time *value* as RFC 3339 text in UTC.

    :raises MeterValueError: if *value* is neither RFC 3339 text nor a datetime, has no
        time zone, or is before 1970: OpenMeter drops such an event silently.
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

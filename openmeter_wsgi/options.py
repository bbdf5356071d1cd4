"""Checks and converts the value of each option, from code, variables or a file.

A reader, such as `url` or `meters`, takes a value of any type and returns the converted
value. It returns a converted value unchanged. For an invalid value it raises ValueError
with the expected and the given value, to which `Policy` adds the name of the option.

The module also defines which servers require an API key (`ApiKey`), and the URL of
version 3 of OpenMeter's API.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, get_args, get_origin
from urllib.parse import urlsplit

import msgspec

from openmeter_wsgi import log
from openmeter_wsgi.errors import ConfigError, MeterValueError
from openmeter_wsgi.events import VALUE_PROPERTY, read_usage
from openmeter_wsgi.measures import Measure, read_measure, split
from openmeter_wsgi.routes import RouteRule
from openmeter_wsgi.values import source_problem, text_problem

if TYPE_CHECKING:
    from collections.abc import Callable

logger: Final = log.get_logger(__name__)


#: Domains of OpenMeter Cloud and Kong Konnect. Other servers require no API key.
_HOSTED = (".openmeter.cloud", ".konghq.com")
#: The host of Kong Konnect, after the name of a region and a dot.
_KONNECT = "api.konghq.com"


def is_konnect(url: str) -> bool:
    """Return True if *url* is the URL of Kong Konnect, in any region."""
    region, _, rest = (urlsplit(url).hostname or "").partition(".")
    return region != "" and rest == _KONNECT


#: Default of ``question_rate`` per second, for hosted and for self-hosted servers.
_HOSTED_RATE, _OWN_RATE = 25.0, 200.0


def is_hosted(url: str) -> bool:
    """Return True if *url* is the URL of OpenMeter Cloud or Kong Konnect."""
    host = urlsplit(url).hostname or ""
    return host == "openmeter.cloud" or host.endswith(_HOSTED)


def question_rate(given: float | None, *, url: str) -> float:
    """Return the option ``question_rate``, or its default for the server at *url*."""
    if given is not None:
        return given
    return _HOSTED_RATE if is_hosted(url) else _OWN_RATE


def v3_url(url: str) -> str:
    """Return the URL of version 3 of OpenMeter's API on the server at *url*."""
    return url + ("/v3/openmeter" if is_konnect(url) else "/api/v3/openmeter")


def checked_key(text: object) -> str:
    """Return the API key in *text* without surrounding white space.

    :raises ValueError: if the key cannot be sent in a header. The message never
        contains the key.
    """
    if not isinstance(text, str):
        raise ValueError(f"expected text, got {type(text).__name__}")
    key = text.strip()
    if not key:
        raise ValueError("expected a key, got empty text")
    if key[0] in "'\"" and key[0] == key[-1]:
        raise ValueError("expected a key without quotes around it, got one in quotes")
    for position, character in enumerate(key):
        if not "!" <= character <= "~":
            raise ValueError(
                "expected visible ASCII characters, got another character at position "
                f"{position}"
            )
    return key


class ApiKey:
    """An API key from text, a callable or a file. Used by one thread.

    The key is read on first use, and again after OpenMeter answered 401.
    """

    def __init__(self, read: Callable[[], object] | None, name: str) -> None:
        self._read = read
        self._name = name
        self._key: str | None = None

    @classmethod
    def from_options(
        cls, key: str | Callable[[], str] | None, file: str | Path | None
    ) -> ApiKey:
        """Return the API key of *key* or *file*, or one that is always None.

        :raises ValueError: if a text or file contains no valid key. A callable is not
            called yet: it may work only in a worker process.
        """
        if file is not None:
            path = Path(file)
            from_file = cls(path.read_text, f"api_key_file {str(path)!r}")
            from_file.current()
            return from_file
        if callable(key):
            return cls(key, "api_key()")
        if key is None:
            return cls(None, "no key")
        text = checked_key(key)
        return cls(lambda: text, "api_key")

    def current(self) -> str | None:
        """Return the key to send, None if there is none. Read it on first use.

        :raises ValueError: naming the source, if the key cannot be read now.
        """
        if self._key is None and self._read is not None:
            self._key = self._fresh(self._read)
        return self._key

    @property
    def known(self) -> str | None:
        """The key that was read last, None before the first reading."""
        return self._key

    def renew(self) -> bool:
        """Read the key again; return True if it has changed."""
        if self._read is None:
            return False
        previous, self._key = self._key, None
        self._key = self._fresh(self._read)
        return self._key != previous

    def required_by(self, url: str) -> bool:
        """Return True if there is no key, and the server at *url* requires one."""
        return self._read is None and is_hosted(url)

    def _fresh(self, read: Callable[[], object]) -> str:
        try:
            return checked_key(read())
        except ValueError as error:
            raise ValueError(f"{self._name}: {error}") from None
        except Exception as error:
            # A callable of the application may raise any exception.
            raise ValueError(
                f"{self._name}: cannot be read: {type(error).__name__}: {error}"
            ) from error

    def __repr__(self) -> str:
        return f"<ApiKey from {self._name}>"


_SECRET_HEADERS = {
    "authorization", "proxy-authorization", "cookie", "set-cookie", "x-api-key",
}  # fmt: skip


def key(value: Any) -> Any:
    """Read a key: text that can be sent in a header, a callable, or None."""
    return value if value is None or callable(value) else checked_key(value)


#: Minimum number of characters of a secret.
_MIN_SECRET = 16


def ticket_secret(value: Any) -> tuple[str, ...] | None:
    """Read one secret, or a new and an old one. Messages never contain a secret."""
    if value is None:
        return None
    secrets = value.split() if isinstance(value, str) else value
    secrets = tuple(secrets) if isinstance(secrets, Iterable) else ()
    for secret in secrets or ("",):
        if not isinstance(secret, str) or len(secret) < _MIN_SECRET:
            raise ValueError(
                f"expected text of at least {_MIN_SECRET} characters, or two such "
                "texts with a space between them"
            )
    if len(secrets) > 2:
        raise ValueError(
            f"expected one secret, or a new and an old one, got {len(secrets)}"
        )
    try:
        # Imported here, because it is required only with a secret.
        import itsdangerous  # noqa: F401
    except ImportError:
        raise ValueError(
            "requires itsdangerous; run: pip install 'openmeter_wsgi[jobs]'"
        ) from None
    return secrets


def url(value: Any) -> str:
    """Read a base URL; return it without a trailing slash."""
    if not isinstance(value, str):
        raise ValueError(f"expected a URL, got {value!r}")
    parts = urlsplit(value.strip())
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError(
            f"expected a URL such as https://openmeter.cloud, got {value!r}"
        )
    if parts.username is not None or parts.password is not None:
        raise ValueError("expected a URL without a user or password: use api_key")
    if parts.query or parts.fragment:
        raise ValueError(f"expected a URL without ? and #, got {value!r}")
    _ = parts.port  # raises ValueError for an invalid port
    if parts.path.rstrip("/").endswith(("/events", "/v3/openmeter")):
        raise ValueError(
            f"expected the URL of the server without the path of the API, got {value!r}"
        )
    return value.strip().rstrip("/")


def api_flavor(value: Any) -> str:
    """Read the version of OpenMeter's API."""
    if value == "konnect":
        raise ValueError(
            "expected 'v1' or 'v3', got 'konnect': write 'v3', and api_url "
            "'https://<region>.api.konghq.com', by which Kong Konnect is recognised"
        )
    return str(typed(value, Literal["v1", "v3"]))


def path(value: Any) -> str | None:
    """Read a path; return it as an absolute path, independent of later `chdir`."""
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ValueError(f"expected a path, got {value!r}")
    return os.path.abspath(os.fspath(value))


def optional_url(value: Any) -> str | None:
    """Read a base URL, or None."""
    return None if value is None else url(value)


def redis_url(value: Any) -> str | None:
    """Read the URL of a Redis. It may contain a password, so no message contains it."""
    schemes = ("redis://", "rediss://", "unix://")
    if value is None or (isinstance(value, str) and value.startswith(schemes)):
        return value
    raise ValueError(f"expected a URL that begins with one of {', '.join(schemes)}")


def function(value: Any) -> Any:
    """Read a callable, or None."""
    if value is None or callable(value):
        return value
    raise ValueError(f"expected a callable, got {value!r}")


def source(value: Any) -> str:
    """Read the source of events."""
    if problem := source_problem(value):
        raise ValueError(problem)
    return str(value)


def text(value: Any) -> str:
    """Read text that is not empty."""
    if problem := text_problem(value):
        raise ValueError(problem)
    return str(value)


def subject(value: Any) -> Any:
    """Read a callable, or ``header:Name``."""
    if value is None or callable(value):
        return value
    kind, _, name = value.partition(":") if isinstance(value, str) else ("", "", "")
    name = name.strip()
    if kind != "header" or not name.replace("-", "").isalnum() or not name.isascii():
        raise ValueError(
            "expected a callable that takes the environ, or 'header:Name', got "
            f"{value!r}"
        )
    if name.lower() in _SECRET_HEADERS:
        raise ValueError(
            f"expected a header that contains no secret, got {name!r}: subjects are "
            "stored, displayed and logged"
        )
    return f"header:{name}"


def subject_path(value: Any) -> str:
    """Read the path to the subject in a user object."""
    if isinstance(value, str) and all(value.removeprefix(".").split(".")):
        return value
    raise ValueError(f"expected a path such as '.sub' or '.data.id', got {value!r}")


def meter(value: Any) -> Any:
    """Read one or several documents."""
    if value is None:
        return None
    documents = [value] if isinstance(value, Mapping) else list(value)
    if not documents or not all(map(_is_document, documents)):
        raise ValueError(
            "expected {'type': …, 'data': {…}} or a list of them, got "
            f"{value!r}; for numbers by type use the option meters"
        )
    for document in documents:
        if document.get("id") or document.get("time"):
            raise ValueError(
                f"meter {document['type']!r}: an id or time that is the same for every "
                "request would be billed once"
            )
    split(documents, None)
    return value


def _is_document(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("type"), str)


def meters(value: Any) -> Any:
    """Read amounts by meter type."""
    if value is None:
        return None
    if not isinstance(value, Mapping) or isinstance(value.get("type"), str):
        raise ValueError(f"expected a mapping of type to number, got {value!r}")
    if not value:
        raise ValueError("expected at least one type and number, got {}; leave it out")
    split(None, value)
    return value


def routes(value: Any) -> Any:
    """Read a mapping of rules to options. None or False means not metered."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ValueError(f"expected options by rule, got {value!r}")
    for rule, given in value.items():
        RouteRule(rule)
        if given is not None and given is not False and not isinstance(given, Mapping):
            raise ValueError(f"{rule!r}: expected options or None, got {given!r}")
    return value


def meter_when(value: Any) -> Any:
    """Read a condition on the exchange: a callable, a measure, or its text."""
    if isinstance(value, str):
        value = read_measure(value)
    if value is None or isinstance(value, Measure) or callable(value):
        return value
    raise ValueError(
        "expected a callable on the exchange or a measure such as "
        f"'$response.succeeded', got {value!r}"
    )


def audit(value: Any) -> Any:
    """Read a callable that takes audit records, or None."""
    if value is None or callable(value):
        return value
    raise ValueError(
        f"expected a callable, got {value!r}; for a file, give the logger "
        "'openmeter_wsgi.audit' a FileHandler and the level DEBUG"
    )


def typed(value: Any, hint: Any) -> Any:
    """Convert a value to the type *hint*."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    try:
        converted = msgspec.convert(value, hint)
    except msgspec.ValidationError as error:
        expected = _expected(str(error), hint)
        raise ValueError(f"{expected}, got {value!r}") from None
    if isinstance(converted, float) and not math.isfinite(converted):
        raise ValueError(f"expected a finite number, got {value!r}")
    return converted


def _expected(message: str, hint: Any) -> str:
    if choices := _choices(hint):
        return "expected one of " + ", ".join(map(repr, choices))
    return "e" + message.split(", got")[0].removeprefix("E")


def _choices(hint: Any) -> list[Any]:
    """Return the values of a Literal, or of a union of Literals and None."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    parts = get_args(hint)
    if not any(get_origin(part) is Literal for part in parts):
        return []
    return [
        choice
        for part in parts
        for choice in ([None] if part is type(None) else _choices(part))
    ]


#: Options of earlier versions, each with its replacement.
REMOVED = {
    "billing_errors": "leave it out; only meter_on_status_codes decides",
    "idempotency_keys": "leave it out; set_idempotency_key works without it",
    "journal": "leave it out; the file system decides",
    "entitlement_cache_size": "leave it out; a process keeps 10,000 answers",
    "value_property": "write meter={'type': ..., 'data': {'NAME': 1}} for a property "
    "other than total",
    "max_queue_events": "write max_queue_bytes; an event takes about 250 bytes",
    "entitlements_path": "leave it out; api_flavor decides",
    "unmatched": "for None write routes={..., '*': None}, for 'policy' nothing",
}


def unknown_option(name: str, names: Sequence[str]) -> str:
    """Return the error message for an unknown option, with a similar name if any."""
    if name in REMOVED:
        return f"{name}: is no longer an option: {REMOVED[name]}"
    import difflib  # imported only for an error

    close = difflib.get_close_matches(name.lower(), names, n=1)
    return f"unknown option {name!r}" + (
        f" (did you mean {close[0]!r}?)" if close else ""
    )


#: A valid feature key in OpenMeter.
_FEATURE = re.compile(r"[a-z0-9]+(?:_[a-z0-9]+)*", re.ASCII)
#: Maximum number of characters of a feature key.
_MAX_FEATURE = 64
#: An id (ULID), which version 2 of the API accepts in place of a feature key.
_ULID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Za-hjkmnp-tv-z]{25}", re.ASCII)


class CountedMeter(NamedTuple):
    """The meter by which the balance of a feature is counted down."""

    #: The meter type.
    type: str
    #: The property of ``data`` with the amount. An event without this property counts
    #: as 1, as with OpenMeter's aggregation COUNT.
    property: str = VALUE_PROPERTY


def features(value: Any) -> tuple[str, ...]:
    """Read feature keys; drop duplicates."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ValueError(f"expected a list of feature keys, got {value!r}")
    keys = tuple(dict.fromkeys(value))
    for key in keys:
        if problem := feature_problem(key):
            raise ValueError(problem)
    return keys


def feature_problem(key: Any) -> str | None:
    """Return an error message if *key* is not a valid feature key, or None."""
    if problem := text_problem(key):
        return problem
    if not invalid_feature_keys([key]) or is_ulid(key):
        return None
    proposed = similar_feature_key(key)
    hint = f"; write {proposed!r} here and in OpenMeter" if proposed else ""
    return (
        f"OpenMeter takes no feature key like {key!r} (expected a-z and 0-9, words "
        f"joined by one _, 1 to {_MAX_FEATURE} characters){hint}"
    )


def similar_feature_key(key: str) -> str | None:
    """Return a valid feature key similar to *key*, or None."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower()
    words = re.findall(r"[a-z0-9]+", snake, re.ASCII)
    return "_".join(words)[:_MAX_FEATURE].rstrip("_") or None


def is_ulid(key: str) -> bool:
    """Return True if *key* is an id (ULID)."""
    return _ULID.fullmatch(key) is not None


def invalid_feature_keys(keys: Iterable[str]) -> list[str]:
    """Return those *keys* that are not valid feature keys."""
    return [
        key for key in keys if not _FEATURE.fullmatch(key) or len(key) > _MAX_FEATURE
    ]


def customer(value: Any) -> Any:
    """Read a callable or mapping from subjects to customer keys."""
    if value is None or callable(value) or isinstance(value, Mapping):
        return value
    raise ValueError(
        f"expected a callable on the subject or a mapping of subjects, got {value!r}"
    )


def counted_meters(value: Any) -> dict[str, CountedMeter]:
    """Read a mapping of features to meters, or a list of features named like meters."""
    if isinstance(value, Mapping):
        return {_feature(key): _counted(key, meter) for key, meter in value.items()}
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ValueError(f"expected a list of feature keys, got {value!r}")
    keys = list(value)
    for key in keys:
        if problem := feature_problem(key):
            similar = None if text_problem(key) else similar_feature_key(key)
            mapping = f", with its meter: { ({similar: key})!r}" if similar else ""
            raise ValueError(problem + mapping)
    return {key: CountedMeter(key) for key in keys}


def _feature(key: Any) -> str:
    if problem := feature_problem(key):
        raise ValueError(problem)
    return str(key)


def _counted(feature: str, meter: Any) -> CountedMeter:
    for text in meter if isinstance(meter, CountedMeter) else ():
        if problem := text_problem(text):
            raise ValueError(problem)
    if isinstance(meter, CountedMeter):
        return meter
    if isinstance(meter, str) and meter:
        return CountedMeter(meter)
    if isinstance(meter, Mapping) and {"type"} <= meter.keys() <= {"type", "property"}:
        return _counted(feature, CountedMeter(**meter))
    raise ValueError(
        f"{feature!r}: expected a meter type or {{'type': …, 'property': …}}, got "
        f"{meter!r}"
    )


def reserved(value: Any) -> Any:
    """Read the amounts that a request reserves, by feature, or a callable."""
    if value is None or callable(value):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(
            f"expected amounts by feature or a callable on the environ, got {value!r}"
        )
    return amounts(value)


def amounts(value: Mapping[str, Any]) -> dict[str, float]:
    """Read amounts by feature.

    :raises ValueError: naming an amount that is negative or not finite.
    """
    try:
        numbers = read_usage(dict(value)).numbers if value else {}
    except MeterValueError as error:
        raise ValueError(str(error).replace("meter", "feature", 1)) from None
    return {feature: float(number) for feature, number in numbers.items()}


_PREFIX = "OPENMETER_"
#: Options whose environment variable is written as JSON, with examples.
AS_JSON = {
    "meter": '{"type": "api_requests", "data": {"total": 1}}',
    "meters": '{"api_requests": 1}',
    "customer": '{"subject-1": "customer-1"}',
    "reserve": '{"tokens": 1000}',
    "routes": '{"/health": null}',
}
#: Options whose environment variable is a comma-separated list of names, or JSON.
AS_LIST = ("required_entitlements", "entitlement_meters")


def read_variables(
    environ: Mapping[str, str], hints: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the options in the environment variables *environ*. Skip empty variables.

    *hints* are the types of all options. A warning is logged for each variable whose
    name is similar to that of an option. Other variables with the prefix ``OPENMETER_``
    are ignored: they belong to other programs.

    :raises ConfigError: naming each variable that cannot be parsed.
    """
    options: dict[str, Any] = {}
    problems: list[str] = []
    for variable, text in environ.items():
        if not variable.startswith(_PREFIX) or not text.strip():
            continue
        name = variable.removeprefix(_PREFIX).lower()
        if name in REMOVED:
            problems.append(f"{variable}: {unknown_option(name, ())}")
            continue
        if name not in hints:
            _warn_if_misspelt(variable, name, list(hints))
            continue
        try:
            options[name] = _read_text(name, text, hints[name])
        except msgspec.MsgspecError as error:
            example = (
                f", expected JSON such as {AS_JSON[name]}" if name in AS_JSON else ""
            )
            problems.append(f"{variable}: {error}{example}, got {text!r}")
    if problems:
        raise ConfigError(problems)
    return options


def _read_text(name: str, text: str, hint: Any) -> Any:
    if name in AS_JSON:
        return msgspec.json.decode(text)
    if name in AS_LIST:
        if text.lstrip()[:1] in "[{":
            return msgspec.json.decode(text)
        return [part.strip() for part in text.split(",") if part.strip()]
    try:
        return msgspec.convert(text.strip(), hint, strict=False)
    except TypeError:
        return text.strip()  # the hint is not a JSON type, but a callable, for example
    except msgspec.ValidationError:
        if hint in {int, float, bool} or "int" in str(hint) or "float" in str(hint):
            raise
        return text.strip()


def _warn_if_misspelt(variable: str, name: str, names: list[str]) -> None:
    import difflib  # imported only for unknown variables

    if close := difflib.get_close_matches(name, names, n=1, cutoff=0.8):
        logger.warning(
            "%s is ignored: there is no such option; did you mean %s%s?",
            variable,
            _PREFIX,
            close[0].upper(),
        )


def read_file(path: Path) -> dict[str, Any]:
    """Return the options in a file: JSON if its name ends in .json, else TOML.

    :raises ConfigError: naming the file and the problem.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")  # some editors write a byte order mark
        is_json = path.suffix.lower() == ".json"
        options = msgspec.json.decode(text) if is_json else _toml(text)
    except OSError as error:
        raise ConfigError([f"{str(path)!r}: {error.strerror}"]) from None
    except (msgspec.DecodeError, ValueError) as error:
        raise ConfigError([f"{str(path)!r}: {error}"]) from None
    if not isinstance(options, dict):
        raise ConfigError([f"{str(path)!r}: expected options by name, got {options!r}"])
    return options


def _toml(text: str) -> Any:
    # Imported here, because few applications have a TOML file.
    import tomllib

    return tomllib.loads(text)

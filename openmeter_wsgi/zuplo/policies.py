"""Parser of Zuplo's `policies.json`, whose options become our options.

`load_document` parses the JSON, `read_entries` finds the policies in it, and
`read_policies` reads their options and the variables in them. A *place* is the position
of a value in the document, for error messages: ``policies[0].handler.options``.

Sources: Zuplo's pages on ``openmeter-inbound`` and ``monetization-inbound``, and its
monetization policy reference.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from openmeter_wsgi.errors import ConfigError, MeterValueError
from openmeter_wsgi.events import read_usage
from openmeter_wsgi.options import feature_problem, similar_feature_key
from openmeter_wsgi.status_codes import StatusCodes

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator


#: A JSON text, or the path of a file that holds one.
DocumentSource = str | os.PathLike[str]

#: A reference to a variable.
_VARIABLE = re.compile(r"\$env\(\s*([^()]*?)\s*\)")
#: Maximum number of levels of nested objects, arrays and groups of policies.
MAX_NESTING = 100
#: A bracket of JSON, or a string, which may contain brackets.
_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[{]|[\]}]', re.DOTALL)
#: Values of variables with fewer characters are only hidden if they stand in quotes.
_SHORT = 4


def load_document(source: DocumentSource) -> Any:
    """Parse *source*: a JSON text if it begins with a bracket, else the path of a file.

    :raises ConfigError: with the name of the file and the problem.
    """
    if isinstance(source, str) and source.lstrip().startswith(("{", "[")):
        content, origin = source, "the text"
    else:
        path = Path(source)
        content, origin = _read(path), repr(str(path))
    if (line := _line_of_excessive_nesting(content)) is not None:
        raise ConfigError(
            [f"{origin}: line {line}: expected at most {MAX_NESTING} levels of nesting"]
        )
    try:
        return msgspec.json.decode(content)
    except msgspec.DecodeError as error:
        raise ConfigError([f"{origin}: {error}"]) from None


def _line_of_excessive_nesting(text: str) -> int | None:
    """Return the number of the line where JSON is nested too deeply, or None."""
    depth = 0
    for match in _BRACKET.finditer(text):
        if match[0] in {"[", "{"}:
            depth += 1
            if depth > MAX_NESTING:
                return text.count("\n", 0, match.start()) + 1
        elif match[0] in {"]", "}"}:
            depth -= 1
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise ConfigError([f"{str(path)!r}: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{str(path)!r}: {error}"]) from None


def inside(place: str, key: str) -> str:
    """Return the place of *key* in the object at *place*."""
    if not re.fullmatch(r"[\w$-]+", key):
        return f"{place}[{key!r}]"
    return f"{place}.{key}" if place else key


def resolve(
    value: Any, place: str, environ: Mapping[str, str], problems: list[str]
) -> Any:
    """Return *value* with every ``$env(NAME)`` replaced by the value of the variable.

    For a variable that is not set Zuplo inserts empty text, and usage would be billed
    under an empty name. Here this is a problem.
    """
    if isinstance(value, dict):
        return {
            key: resolve(member, inside(place, key), environ, problems)
            for key, member in value.items()
        }
    if isinstance(value, list):
        return [
            resolve(member, f"{place}[{n}]", environ, problems)
            for n, member in enumerate(value)
        ]
    if not isinstance(value, str):
        return value
    problems += [
        f"{place}: the variable {name!r} is not set, or is empty"
        for name in variables_in(value)
        if not environ.get(name)
    ]
    return _VARIABLE.sub(lambda match: environ.get(match[1], ""), value)


def variables_in(value: object) -> tuple[str, ...]:
    """Return the names of the variables that the texts in *value* refer to."""
    return tuple(dict.fromkeys(_variables_in(value)))


def _variables_in(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield from _VARIABLE.findall(value)
    elif isinstance(value, Mapping):
        for member in value.values():
            yield from _variables_in(member)
    elif isinstance(value, list | tuple):
        for member in value:
            yield from _variables_in(member)


def hide_values(message: str, names: Iterable[str], environ: Mapping[str, str]) -> str:
    """Return *message* with each value of a variable replaced by its reference."""
    values = {environ[name]: name for name in names if environ.get(name)}
    for value in sorted(values, key=len, reverse=True):
        reference = f"$env({values[value]})"
        for form in dict.fromkeys((value, repr(value)[1:-1])):
            pattern = re.escape(form)
            if len(form) < _SHORT:
                pattern = rf"(?<=['\"]){pattern}(?=['\"])"
            message = re.sub(pattern, reference.replace("\\", r"\\"), message)
    return message


def _problem(error: ValueError, unresolved: Any, environ: Mapping[str, str]) -> str:
    """Return the text of *error*, with references in place of the values of variables.

    It quotes the value as written in the file.
    """
    names = variables_in(unresolved)
    if not names:
        return str(error)
    expected = str(error).partition(", got ")[0]
    if hide_values(expected, names, environ) != expected:
        expected = "expected another value"
    return f"{expected}, got {unresolved!r}"


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return a hint at the one of *names* that is similar to *name*, or empty text."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


class Option(NamedTuple):
    """Our counterpart of an option of Zuplo."""

    #: Name of our option, None if there is no counterpart.
    name: str | None
    #: Returns the value of our option, None to leave the option out.
    read: Callable[[Any], Any]
    #: Reason why there is no counterpart.
    why: str = ""


def read_text(value: Any) -> str:
    """Read text that is not empty. Messages do not contain it: it may be the key."""
    if not isinstance(value, str):
        raise ValueError(f"expected text, got {type(value).__name__}")
    if not value.strip():
        raise ValueError("expected text that is not empty")
    return value


def read_names(value: Any) -> list[str] | None:
    """Read a list of names."""
    if not isinstance(value, list) or not all(
        isinstance(name, str) and name for name in value
    ):
        raise ValueError(f"expected a list of names, got {value!r}")
    return list(dict.fromkeys(value)) or None


def read_features(value: Any) -> list[str] | None:
    """Read a list of features, as keys that OpenMeter accepts."""
    names = read_names(value) or []
    return list(dict.fromkeys(map(feature_key, names))) or None


def feature_key(name: str) -> str:
    """Return *name* if OpenMeter accepts it as a key, else a similar key."""
    if variables_in(name) or (problem := feature_problem(name)) is None:
        return name
    if (like := similar_feature_key(name)) is None:
        raise ValueError(problem)
    return like


def read_status_codes(value: Any) -> Any:
    """Check status codes, and return them as written."""
    if not variables_in(value):
        StatusCodes(value)
    return value


def read_seconds(value: Any) -> float:
    """Read a duration."""
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"expected a number of seconds above 0, got {value!r}")
    return value


def read_meters(value: Any) -> dict[str, Any] | None:
    """Read a mapping of meters to numbers."""
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a mapping of meter to number, got {value!r}")
    for name, number in value.items():
        if isinstance(number, str):
            raise ValueError(f"meter {name!r}: expected a number, got {number!r}")
        read_usage({name: number})
    return dict(value) or None


def read_meter(value: Any) -> dict[str, Any] | list[dict[str, Any]] | None:
    """Read the document of a meter, or a list of documents."""
    if isinstance(value, list):
        return [_read_document(document) for document in value] or None
    return _read_document(value)


def _read_document(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("type"), str):
        raise MeterValueError(f"expected {{'type': …, 'data': {{…}}}}, got {entry!r}")
    document = dict(entry)
    if "value" in document and "data" not in document:
        # As in Zuplo's own example. OpenMeter reads numbers in data only.
        document["data"] = {"value": document.pop("value")}
    read_usage(document)
    for key in ("id", "time"):
        if document.get(key) is not None:
            raise MeterValueError(
                f"meter {entry['type']!r}: with the same {key} for every request, "
                "only one would be billed"
            )
    return {key: _as_text(value) for key, value in document.items()}


def _as_text(value: Any) -> Any:
    """Return *value* with each text that looks like a measure escaped as a text."""
    if isinstance(value, Mapping):
        return {key: _as_text(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_as_text(member) for member in value]
    if isinstance(value, str) and value.startswith("$") and not variables_in(value):
        return f"${value}"
    return value


def _without_counterpart(why: str) -> Option:
    return Option(None, lambda value: value, why)


_AUTHENTICATION = "the application authenticates, and states the user with set_user()"
_PLANS = "plans and payments are not checked; see required_entitlements"
#: Options of both kinds of policies.
_COMMON = {
    "meterOnStatusCodes": Option("meter_on_status_codes", read_status_codes),
    "requiredEntitlements": Option("required_entitlements", read_features),
}
_OPENMETER = {
    "apiUrl": Option("api_url", read_text),
    "apiKey": Option("api_key", read_text),
    "meter": Option("meter", read_meter),
    "eventSource": Option("event_source", read_text),
    "subjectPath": Option("subject_path", read_text),
    **_COMMON,
}
_MONETIZATION = {
    "meters": Option("meters", read_meters),
    "cacheTtlSeconds": Option("allow_ttl", read_seconds),
    "authHeader": _without_counterpart(_AUTHENTICATION),
    "authScheme": _without_counterpart(_AUTHENTICATION),
    # Options of the first version of the policy.
    "bucketId": _without_counterpart("a bucket is a store of customers at Zuplo"),
    "allowRequestsWithoutSubscription": _without_counterpart(_PLANS),
    "allowedSubscriptionStatuses": _without_counterpart(_PLANS),
    "allowRequestsOverQuota": _without_counterpart(_PLANS),
    **_COMMON,
}
#: Options of each kind of policy.
ZUPLO_OPTIONS: dict[str, dict[str, Option]] = {
    "openmeter-inbound": _OPENMETER,
    "monetization-inbound": _MONETIZATION,
}
#: Defaults of Zuplo, according to its documentation.
DEFAULTS: dict[str, Any] = {
    "meter_on_status_codes": "200-299",
    "event_source": "api-gateway",
    "subject_path": ".sub",
}

COMPOSITE = "composite-inbound"
#: Kinds of policies by the export of their handler, which Zuplo runs. Only its editor
#: uses ``policyType``.
_EXPORTS = {
    "OpenMeterInboundPolicy": "openmeter-inbound",
    "MonetizationInboundPolicy": "monetization-inbound",
    "CompositeInboundPolicy": COMPOSITE,
}
#: Current names of renamed kinds.
_SUCCESSORS = {"openmeter-metering-inbound": "openmeter-inbound"}
_KEYS = ("name", "policyType", "type", "handler", "options")


class Entry(NamedTuple):
    """A policy of the file, with its options as written."""

    place: str
    name: str | None
    kind: str
    options_place: str
    options: Mapping[str, Any]
    #: Keys that are not known.
    unknown: list[str]


def read_entries(document: Any, problems: list[str]) -> list[Entry]:
    """Return the policies of a whole file, of a list, or of a single policy.

    :raises ConfigError: if *document* is none of these. The message shows no values, as
        the key may be among them.
    """
    within = ""
    if isinstance(document, Mapping):
        if "policies" not in document:
            return [_read_entry("", _single_policy(document), problems)]
        within, document = "policies", document["policies"]
    if not isinstance(document, list):
        raise ConfigError([f"{within or 'the document'}: expected a list of policies"])
    for n, entry in enumerate(document):
        if not isinstance(entry, Mapping):
            raise ConfigError([f"{within}[{n}]: expected an object"])
    return [
        _read_entry(f"{within}[{n}]", entry, problems)
        for n, entry in enumerate(document)
    ]


def _single_policy(document: Mapping[str, Any]) -> Mapping[str, Any]:
    if "export" in document and "handler" not in document:
        # Some of Zuplo's pages show only the handler.
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
    """Return the kind of a policy, by its export, or else by its type."""
    declared = _text(document.get("policyType", document.get("type")))
    handler = document.get("handler")
    if isinstance(handler, str):
        # "$import(@zuplo/runtime).OpenMeterInboundPolicy"
        export: str | None = handler.rpartition(").")[2]
    else:
        export = _text(handler.get("export")) if isinstance(handler, Mapping) else None
    run = _EXPORTS.get(export) if export else None
    if export and declared in _EXPORTS.values() and run != declared:
        problems.append(
            f"{inside(place, 'handler')}: expected the export of a policy of the type "
            f"{declared!r}, got {export!r}{did_you_mean(export, _EXPORTS)}"
        )
    kind = run or declared or export
    if kind is None or kind in _SUCCESSORS:
        expected = repr(_SUCCESSORS[kind]) if kind else "the type of a policy"
        problems.append(
            f"{inside(place, 'policyType')}: expected {expected}, got {kind!r}"
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


_KEY = "apiKey"


@dataclasses.dataclass(frozen=True)
class ZuploPolicy:
    """A policy of ``policies.json``. A policy that does not meter has no options."""

    #: The name by which routes refer to it, None for a single policy without a name.
    name: str | None
    #: Its type, such as ``"openmeter-inbound"``.
    kind: str
    #: Our options of it. Not in the repr: the key is among them.
    options: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    #: Places of keys and options without a counterpart, and the reasons.
    ignored: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    #: Names of the policies in a group.
    members: tuple[str, ...] = ()
    #: Variables that the key refers to; () for a key as text, None without a key.
    key_variables: tuple[str, ...] | None = None

    @property
    def metered(self) -> bool:
        """True if the policy meters."""
        return self.kind in ZUPLO_OPTIONS

    def __str__(self) -> str:
        return repr(self.name) if self.name else f"the nameless {self.kind}"


def read_policies(
    source: DocumentSource,
    environ: Mapping[str, str] = os.environ,
    *,
    resolves: bool = True,
    leave_out: Collection[str] = (),
) -> list[ZuploPolicy]:
    """Return the policies in *source*: a whole ``policies.json``, a list, or a policy.

    :param resolves: True to replace each ``$env(NAME)`` by the variable in *environ*.
        False to keep the texts, and to leave out the key.
    :param leave_out: our options that are not read.
    :raises ConfigError: with every problem and its place.
    """
    problems: list[str] = []
    entries = read_entries(load_document(source), problems)
    if not resolves:
        leave_out = {*leave_out, "api_key"}
    reader = _Reader(environ, problems, leave_out, resolves=resolves)
    policies = [
        reader.read_metering(entry)
        if entry.kind in ZUPLO_OPTIONS
        else reader.read_other(entry)
        for entry in entries
    ]
    names = [entry.name for entry in entries]
    problems += [
        f"{inside(entry.place, 'name')}: another policy is named {entry.name!r}, too"
        for n, entry in enumerate(entries)
        if entry.name is not None and entry.name in names[:n]
    ]
    if problems:
        raise ConfigError(problems)
    return policies


class _Reader:
    """Reads the options of entries, and collects their problems."""

    def __init__(
        self,
        environ: Mapping[str, str],
        problems: list[str],
        leave_out: Collection[str],
        *,
        resolves: bool,
    ) -> None:
        self._environ = environ
        self._problems = problems
        self._leave_out = leave_out
        self._resolves = resolves

    def read_metering(self, entry: Entry) -> ZuploPolicy:
        """Read a policy that meters."""
        known = ZUPLO_OPTIONS[entry.kind]
        policy = ZuploPolicy(entry.name, entry.kind, key_variables=_variables(entry))
        policy.ignored.extend(
            (inside(entry.place, key), "does not concern metering")
            for key in entry.unknown
        )
        for key, value in entry.options.items():
            place = inside(entry.options_place, key)
            if key not in known:
                hint = did_you_mean(key, known)
                self._problems.append(f"{place}: unknown option{hint}")
            elif known[key].name is None:
                policy.ignored.append((place, known[key].why))
            elif known[key].name not in self._leave_out:
                self._read_option(policy, known[key], place, value)
        if entry.kind == "monetization-inbound":
            _note_other_checks(policy, entry.options_place)
        return policy

    def _read_option(
        self, policy: ZuploPolicy, option: Option, place: str, written: Any
    ) -> None:
        value, unset = written, list[str]()
        if self._resolves:
            value = resolve(written, place, self._environ, unset)
        if unset:
            remedy = _REPLACEMENTS.get(option.name or "", "")
            self._problems += [problem + remedy for problem in unset]
            return
        try:
            read = option.read(value)
        except ValueError as error:
            self._problems.append(f"{place}: {_problem(error, written, self._environ)}")
            return
        if read is not None and option.name is not None:
            policy.options[option.name] = read
            if option.name == "required_entitlements":
                _note_renamed_features(policy, place, value, written)

    def read_other(self, entry: Entry) -> ZuploPolicy:
        """Read a policy that does not meter, or a group of policies."""
        if entry.kind != COMPOSITE:
            why = [(entry.place, "does not meter")]
            return ZuploPolicy(entry.name, entry.kind, ignored=why)
        members: list[str] | None = None
        try:
            members = read_names(entry.options.get("policies", []))
        except ValueError as error:
            place = inside(entry.options_place, "policies")
            self._problems.append(f"{place}: {error}")
        return ZuploPolicy(entry.name, entry.kind, members=tuple(members or ()))


_REPLACE = "; set it, or replace the file's value: by "
#: Remedies for a variable that is not set, by our option.
_REPLACEMENTS = {
    "api_key": f"{_REPLACE}OPENMETER_API_KEY or api_key= (api_key=None if the server "
    "needs no key)",
    "api_url": f"{_REPLACE}OPENMETER_API_URL or api_url=",
}


def _variables(entry: Entry) -> tuple[str, ...] | None:
    return variables_in(entry.options[_KEY]) if _KEY in entry.options else None


def _note_renamed_features(
    policy: ZuploPolicy, place: str, names: list[str], written: list[str]
) -> None:
    """Note the names of features that OpenMeter does not accept as keys.

    :param written: the names as written in the file, with references to variables.
    """
    for n, name in enumerate(names):
        if (key := feature_key(name)) != name:
            shown = "another key" if variables_in(written[n]) else repr(key)
            why = (
                f"OpenMeter does not accept {written[n]!r} as the key of a feature; "
                f"{shown} is used instead, and the feature needs this key in OpenMeter"
            )
            policy.ignored.append((f"{place}[{n}]", why))


def _note_other_checks(policy: ZuploPolicy, place: str) -> None:
    """Note the checks of ``monetization-inbound`` that have no counterpart."""
    required = policy.options.get("required_entitlements", [])
    meters = policy.options.get("meters", {})
    if not_required := [
        m for m in meters if (similar_feature_key(m) or m) not in required
    ]:
        why = (
            "Zuplo refuses a caller without a balance of "
            f"{', '.join(map(repr, not_required))}; required_entitlements does so here"
        )
        policy.ignored.append((inside(place, "meters"), why))
    if not required and policy.options.pop("allow_ttl", None) is not None:
        why = "no entitlement is required, so there is nothing to cache"
        policy.ignored.append((inside(place, "cacheTtlSeconds"), why))

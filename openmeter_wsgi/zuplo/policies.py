"""Zuplo's `policies.json`: documents, entries and options, read into ours.

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

_VARIABLE = re.compile(r"\$env\(\s*([^()]*?)\s*\)")
#: Objects, arrays and groups of policies are nested no deeper than this.
MAX_NESTING = 100
_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[{]|[\]}]', re.DOTALL)
#: A shorter value of a variable is also part of ordinary words.
_SHORT = 4


def load_document(source: DocumentSource) -> Any:
    """Return the document in *source*: text if it opens a JSON object or array.

    :raises ConfigError: naming the file, and what is wrong with it.
    """
    if isinstance(source, str) and source.lstrip().startswith(("{", "[")):
        content, what = source, "the text"
    else:
        path = Path(source)
        content, what = _read(path), repr(str(path))
    if (line := _too_deep(content)) is not None:
        raise ConfigError(
            [f"{what}: line {line}: expected at most {MAX_NESTING} levels of nesting"]
        )
    try:
        return msgspec.json.decode(content)
    except msgspec.DecodeError as error:
        raise ConfigError([f"{what}: {error}"]) from None


def _too_deep(text: str) -> int | None:
    """Return the line in which JSON is nested too deep, None if there is none."""
    depth = 0
    for found in _BRACKET.finditer(text):
        if found[0] in {"[", "{"}:
            depth += 1
            if depth > MAX_NESTING:
                return text.count("\n", 0, found.start()) + 1
        elif found[0] in {"]", "}"}:
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
    """Return *value* with the variable for every ``$env(NAME)`` in its texts.

    Zuplo puts empty text for a variable that is not set; billed under an empty
    name, usage would be lost, so here it is a problem.
    """
    if isinstance(value, dict):
        return {
            key: resolve(each, inside(place, key), environ, problems)
            for key, each in value.items()
        }
    if isinstance(value, list):
        return [
            resolve(each, f"{place}[{n}]", environ, problems)
            for n, each in enumerate(value)
        ]
    if not isinstance(value, str):
        return value
    problems += [
        f"{place}: the variable {name!r} is not set, or is empty"
        for name in variables_in(value)
        if not environ.get(name)
    ]
    return _VARIABLE.sub(lambda found: environ.get(found[1], ""), value)


def variables_in(value: object) -> tuple[str, ...]:
    """Return the names of the variables that the texts in *value* refer to."""
    return tuple(dict.fromkeys(_variables_in(value)))


def _variables_in(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield from _VARIABLE.findall(value)
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _variables_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _variables_in(each)


def hide_values(message: str, names: Iterable[str], environ: Mapping[str, str]) -> str:
    """Return *message* with the reference in place of the value of each variable."""
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
    """Return the text of *error*, without the values of variables.

    Of a value that refers to some it quotes the text as it stands in the file.
    """
    names = variables_in(unresolved)
    if not names:
        return str(error)
    expected = str(error).partition(", got ")[0]
    if hide_values(expected, names, environ) != expected:
        expected = "expected another value"
    return f"{expected}, got {unresolved!r}"


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return the hint that *name* was meant to be one of *names*, if it is near."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


class Option(NamedTuple):
    """The counterpart of an option of Zuplo's."""

    #: The name of ours; None where there is nothing to say here.
    name: str | None
    #: Returns the value as ours has it, None if it says nothing.
    read: Callable[[Any], Any]
    #: Why it has no meaning here.
    why: str = ""


def read_text(value: Any) -> str:
    """Read text that is not empty. It may be a key, so no message contains it."""
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
    """Read a list of features, each by the key that OpenMeter takes for it."""
    names = read_names(value) or []
    return list(dict.fromkeys(map(feature_key, names))) or None


def feature_key(name: str) -> str:
    """Return *name*, or the key like it that OpenMeter takes."""
    if variables_in(name) or (problem := feature_problem(name)) is None:
        return name
    if (like := similar_feature_key(name)) is None:
        raise ValueError(problem)
    return like


def read_status_codes(value: Any) -> Any:
    """Check status codes and leave them as they were written."""
    if not variables_in(value):
        StatusCodes(value)
    return value


def read_seconds(value: Any) -> float:
    """Read a duration."""
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"expected a number of seconds above 0, got {value!r}")
    return value


def read_meters(value: Any) -> dict[str, Any] | None:
    """Read numbers by meter."""
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a mapping of meter to number, got {value!r}")
    for name, number in value.items():
        if isinstance(number, str):
            raise ValueError(f"meter {name!r}: expected a number, got {number!r}")
        read_usage({name: number})
    return dict(value) or None


def read_meter(value: Any) -> dict[str, Any] | list[dict[str, Any]] | None:
    """Read one document or a list of them."""
    if isinstance(value, list):
        return [_read_document(document) for document in value] or None
    return _read_document(value)


def _read_document(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("type"), str):
        raise MeterValueError(f"expected {{'type': …, 'data': {{…}}}}, got {entry!r}")
    document = dict(entry)
    if "value" in document and "data" not in document:
        # Zuplo's own example has it there; what OpenMeter can count is in data.
        document["data"] = {"value": document.pop("value")}
    read_usage(document)
    for key in ("id", "time"):
        if document.get(key) is not None:
            raise MeterValueError(
                f"meter {entry['type']!r}: the same {key} for every request would "
                "be billed once"
            )
    return {key: _as_text(value) for key, value in document.items()}


def _as_text(value: Any) -> Any:
    """Return *value* with texts that would name a measure here marked as texts."""
    if isinstance(value, Mapping):
        return {key: _as_text(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_as_text(each) for each in value]
    if isinstance(value, str) and value.startswith("$") and not variables_in(value):
        return f"${value}"
    return value


def _unread(value: Any) -> Any:
    return value


def _nothing(why: str) -> Option:
    return Option(None, _unread, why)


_AUTHENTICATION = "the application authenticates, and leaves the user with set_user()"
_PLANS = "plans and payments are not asked for; see required_entitlements"
_BOTH = {
    "meterOnStatusCodes": Option("meter_on_status_codes", read_status_codes),
    "requiredEntitlements": Option("required_entitlements", read_features),
}
_OPENMETER = {
    "apiUrl": Option("api_url", read_text),
    "apiKey": Option("api_key", read_text),
    "meter": Option("meter", read_meter),
    "eventSource": Option("event_source", read_text),
    "subjectPath": Option("subject_path", read_text),
    **_BOTH,
}
_MONETIZATION = {
    "meters": Option("meters", read_meters),
    "cacheTtlSeconds": Option("allow_ttl", read_seconds),
    "authHeader": _nothing(_AUTHENTICATION),
    "authScheme": _nothing(_AUTHENTICATION),
    # The first version of the policy had these.
    "bucketId": _nothing("a bucket is Zuplo's own store of customers"),
    "allowRequestsWithoutSubscription": _nothing(_PLANS),
    "allowedSubscriptionStatuses": _nothing(_PLANS),
    "allowRequestsOverQuota": _nothing(_PLANS),
    **_BOTH,
}
#: The options that each kind of policy has.
ZUPLO_OPTIONS: dict[str, dict[str, Option]] = {
    "openmeter-inbound": _OPENMETER,
    "monetization-inbound": _MONETIZATION,
}
#: What Zuplo's documentation gives as the default of these options.
DEFAULTS: dict[str, Any] = {
    "meter_on_status_codes": "200-299",
    "event_source": "api-gateway",
    "subject_path": ".sub",
}

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
    """Return the kind of a policy, by its export or else by its type."""
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


_KEY = "apiKey"


@dataclasses.dataclass(frozen=True)
class ZuploPolicy:
    """One policy of a ``policies.json``; one that does not meter has no options."""

    #: What routes call it, None for one that stands alone.
    name: str | None
    #: Its type, such as ``"openmeter-inbound"``.
    kind: str
    #: What it says, in our options. Not shown: the key is among them.
    options: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    #: Where something stands that has no meaning here, and why it has none.
    ignored: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    #: The policies that a group consists of.
    members: tuple[str, ...] = ()
    #: The variables that held the key; () if it was text, None if there is none.
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
    """Return the policies in *source*: a whole ``policies.json``, a list, or one.

    If it *resolves* variables, the value of NAME in *environ* takes the place of
    ``$env(NAME)``. If not, texts stay as they are, and the key is left out. Our
    options in *leave_out* are not read.

    :raises ConfigError: with every problem and its place.
    """
    problems: list[str] = []
    entries = read_entries(load_document(source), problems)
    if not resolves:
        leave_out = {*leave_out, "api_key"}
    reader = _Reader(environ, problems, leave_out, resolves=resolves)
    policies = [
        reader.read(entry) if entry.kind in ZUPLO_OPTIONS else reader.leave_out(entry)
        for entry in entries
    ]
    names = [entry.name for entry in entries]
    problems += [
        f"{inside(entry.place, 'name')}: another policy is called {entry.name!r}, too"
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

    def read(self, entry: Entry) -> ZuploPolicy:
        """Return a policy that meters."""
        known = ZUPLO_OPTIONS[entry.kind]
        policy = ZuploPolicy(entry.name, entry.kind, key_variables=_variables(entry))
        policy.ignored.extend(
            (inside(entry.place, key), "says nothing about metering")
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
            _note_what_zuplo_checks(policy, entry.options_place)
        return policy

    def _read_option(
        self, policy: ZuploPolicy, option: Option, place: str, said: Any
    ) -> None:
        value, unset = said, list[str]()
        if self._resolves:
            value = resolve(said, place, self._environ, unset)
        if unset:
            remedy = _REPLACEMENTS.get(option.name or "", "")
            self._problems += [problem + remedy for problem in unset]
            return
        try:
            read = option.read(value)
        except ValueError as error:
            self._problems.append(f"{place}: {_problem(error, said, self._environ)}")
            return
        if read is not None and option.name is not None:
            policy.options[option.name] = read
            if option.name == "required_entitlements":
                _note_renamed_features(policy, place, value, said)

    def leave_out(self, entry: Entry) -> ZuploPolicy:
        """Return a policy that does not meter, or a group of policies."""
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
#: What to do about a missing variable, by our option.
_REPLACEMENTS = {
    "api_key": f"{_REPLACE}OPENMETER_API_KEY or api_key= (api_key=None if the server "
    "needs no key)",
    "api_url": f"{_REPLACE}OPENMETER_API_URL or api_url=",
}


def _variables(entry: Entry) -> tuple[str, ...] | None:
    return variables_in(entry.options[_KEY]) if _KEY in entry.options else None


def _note_renamed_features(
    policy: ZuploPolicy, place: str, names: list[str], said: list[str]
) -> None:
    """Note the names of features that OpenMeter does not take as keys.

    *said* are the names as they stand in the file, with references to variables.
    """
    for n, name in enumerate(names):
        if (key := feature_key(name)) != name:
            written = "another one" if variables_in(said[n]) else repr(key)
            why = (
                f"OpenMeter takes no feature key like {said[n]!r}; {written} is "
                "written in its place, and the feature needs that key in OpenMeter"
            )
            policy.ignored.append((f"{place}[{n}]", why))


def _note_what_zuplo_checks(policy: ZuploPolicy, place: str) -> None:
    """Note the checks of ``monetization-inbound``, which are not taken over."""
    asked = policy.options.get("required_entitlements", [])
    meters = policy.options.get("meters", {})
    if unasked := [m for m in meters if (similar_feature_key(m) or m) not in asked]:
        why = (
            "Zuplo refuses a caller without a balance of "
            f"{', '.join(map(repr, unasked))}; here required_entitlements would"
        )
        policy.ignored.append((inside(place, "meters"), why))
    if not asked and policy.options.pop("allow_ttl", None) is not None:
        why = "nothing is asked for, so nothing is cached"
        policy.ignored.append((inside(place, "cacheTtlSeconds"), why))

"""Options from outside the program: variables, a TOML file, a JSON file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from openmeter_wsgi import log
from openmeter_wsgi.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

logger = log.get_logger(__name__)

_PREFIX = "OPENMETER_"
#: Options whose variable is written as JSON.
AS_JSON = ("meter", "meters", "customer", "reserve", "routes")
#: A list of names with commas, or JSON.
AS_LIST = ("required_entitlements", "entitlement_meters")


def read_variables(
    environ: Mapping[str, str], hints: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the options that *environ* sets; an empty variable sets none.

    *hints* has the type of each option there is. A variable that is nearly an
    option's is warned of; others with our prefix are somebody else's.

    :raises ConfigError: naming each variable whose text cannot be read.
    """
    options: dict[str, Any] = {}
    problems: list[str] = []
    for variable, text in environ.items():
        if not variable.startswith(_PREFIX) or not text.strip():
            continue
        name = variable.removeprefix(_PREFIX).lower()
        if name not in hints:
            _warn_if_misspelt(variable, name, list(hints))
            continue
        try:
            options[name] = _read_text(name, text, hints[name])
        except msgspec.MsgspecError as error:
            problems.append(f"{variable}: {error}, got {text!r}")
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
        return text.strip()  # a type that is no JSON type, such as a callable
    except msgspec.ValidationError:
        if hint in {int, float, bool} or "int" in str(hint) or "float" in str(hint):
            raise
        return text.strip()


def _warn_if_misspelt(variable: str, name: str, names: list[str]) -> None:
    import difflib  # here, as few make a mistake

    if close := difflib.get_close_matches(name, names, n=1, cutoff=0.8):
        logger.warning(
            "%s: is no option, did you mean %s%s?", variable, _PREFIX, close[0].upper()
        )


def read_file(path: Path) -> dict[str, Any]:
    """Return the options in a file; JSON if it ends so, else TOML.

    :raises ConfigError: naming the file and what is wrong with it.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".json":
            options = msgspec.json.decode(content)
        else:
            options = _toml(content.decode())
    except OSError as error:
        raise ConfigError([f"{str(path)!r}: {error.strerror}"]) from None
    except (msgspec.DecodeError, ValueError) as error:
        raise ConfigError([f"{str(path)!r}: {error}"]) from None
    if not isinstance(options, dict):
        raise ConfigError([f"{str(path)!r}: expected options by name, got {options!r}"])
    return options


def _toml(text: str) -> Any:
    # Here, as few applications have such a file, and all import this module.
    import tomllib

    return tomllib.loads(text)

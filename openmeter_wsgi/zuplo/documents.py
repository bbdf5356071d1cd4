"""Zuplo's JSON documents, and the variables that they refer to."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from openmeter_wsgi.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

#: A JSON text, or the path of a file that holds one.
Source = str | os.PathLike[str]

_VARIABLE = re.compile(r"\$env\(\s*([^()]*?)\s*\)")


def load(source: Source) -> Any:
    """Return the document in *source*: text if it opens a JSON object or array.

    :raises ConfigError: naming the file, and what is wrong with it.
    """
    if isinstance(source, str) and source.lstrip().startswith(("{", "[")):
        content, what = source, "the text"
    else:
        path = Path(source)
        content, what = _read(path), repr(str(path))
    try:
        return msgspec.json.decode(content)
    except msgspec.DecodeError as error:
        raise ConfigError([f"{what}: {error}"]) from None


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise ConfigError([f"{str(path)!r}: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{str(path)!r}: {error}"]) from None


def inside(place: str, key: str) -> str:
    """Return the place of *key* in what stands at *place*."""
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
    """Return the names of the variables that a text refers to, each once."""
    found = _VARIABLE.findall(value) if isinstance(value, str) else []
    return tuple(dict.fromkeys(found))


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return the hint that *name* was meant to be one of *names*, if it is near."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""

"""A translation as a file of options, with the key left to a variable."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.zuplo.translation import DELIVERY

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from openmeter_wsgi.zuplo.translation import Translation

_VARIABLE = "OPENMETER_API_KEY"
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def to_toml(translation: Translation) -> str:
    """Return *translation* as TOML. It never contains the key.

    A route that is not metered is ``false``.

    :raises ConfigError: for a null in the data of a meter, which TOML cannot say.
    """
    top = translation.default_options
    lines = [_comment(f"Not taken over: {text}") for text in translation.warnings]
    lines += _key_comment(translation)
    lines += _options(translation.delivery if top is None else top)
    if top is None:
        lines += ["", _comment("Requests that match none of these are not metered.")]
        lines += _routes(translation.routes)
    return "\n".join(lines) + "\n"


def _routes(routes: Mapping[str, dict[str, Any] | None]) -> Iterator[str]:
    if unmetered := [rule for rule, options in routes.items() if options is None]:
        yield "[routes]"
        for rule in unmetered:
            yield f"{_key(rule)} = false"
        yield ""
    blocks = [
        [f"[routes.{_key(rule)}]", *_options(options, leave_out=DELIVERY)]
        for rule, options in routes.items()
        if options is not None
    ]
    for n, block in enumerate(blocks):
        yield from ["", *block] if n else block


def _key_comment(translation: Translation) -> Iterator[str]:
    variables = translation.key_variables
    if variables is None:
        return
    if variables == (_VARIABLE,):
        yield _comment(f"The key is read from the variable {_VARIABLE}.")
    elif variables:
        names = " and ".join(variables)
        yield _comment(f"Set the variable {_VARIABLE} to what {names} held for Zuplo.")
    else:
        yield _comment(
            f"Set the variable {_VARIABLE} to the key that Zuplo's file has."
        )


def _options(
    options: Mapping[str, Any], leave_out: tuple[str, ...] = ()
) -> Iterator[str]:
    for name, value in options.items():
        if name != "api_key" and name not in leave_out:
            yield f"{_key(name)} = {_value(value, name)}"


def _comment(text: str) -> str:
    # A line break would end the comment, and what follows would be options.
    return "# " + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else _text(name)


def _value(value: Any, place: str) -> str:
    if isinstance(value, dict):
        pairs = (f"{_key(k)} = {_value(v, f'{place}.{k}')}" for k, v in value.items())
        return f"{{ {', '.join(pairs)} }}" if value else "{}"
    if isinstance(value, list):
        return f"[{', '.join(_value(v, f'{place}[{n}]') for n, v in enumerate(value))}]"
    if isinstance(value, str):
        return _text(value)
    if value is None:
        raise ConfigError([f"{place}: expected what TOML can say, got null"])
    return json.dumps(value)


def _text(text: str) -> str:
    # The escapes of JSON are escapes of TOML as well; but TOML wants one for DEL,
    # and none in two halves, as JSON's ASCII form has it beyond the first plane.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")

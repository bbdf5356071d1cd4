"""A number named by a JSONPath (RFC 9535), such as ``$.usage.total_tokens``."""

from __future__ import annotations

from typing import Any

from openmeter_wsgi.bodies.reader import Unknown
from openmeter_wsgi.errors import ConfigError
from openmeter_wsgi.wire import is_finite


class NumberPath:
    """A JSONPath, compiled once; any thread may use it.

    :raises ConfigError: if *path* is no JSONPath, or the library is not installed.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._path = _compiled(path)

    def __repr__(self) -> str:
        return f"NumberPath({self.path!r})"

    def find_number(self, document: object) -> int | float | Unknown:
        """Return the number that the path leads to; several are added up.

        Unknown are: ``no_match``, ``too_deep`` (nested beyond what the library
        follows), and ``null``, ``negative`` or ``not_a_number`` where any of what it
        leads to is that. Text is no number, nor is a boolean. No term is negative, or
        what a customer sends, and the response echoes, would lower a sum.
        """
        try:
            found = self._path.findall(document)
        except RecursionError:
            return Unknown("too_deep")
        except Exception:  # noqa: BLE001 - a filter that does not suit the document
            return Unknown("no_match")
        if not found:
            return Unknown("no_match")
        if any(value is None for value in found):
            return Unknown("null")
        if not all(map(_is_number, found)):
            return Unknown("not_a_number")
        if any(value < 0 for value in found):
            return Unknown("negative")
        try:
            total = sum(found)
        except OverflowError:  # of integers that no float can hold, and a float
            return Unknown("not_a_number")
        return total if _is_number(total) else Unknown("not_a_number")


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return is_finite(value)


def _compiled(path: str) -> Any:
    try:
        import jsonpath  # here, for only who names a path needs the library
    except ModuleNotFoundError:
        problem = (
            f"{path!r}: a JSONPath needs python-jsonpath; "
            "run: pip install 'openmeter_wsgi[jsonpath]'"
        )
        raise ConfigError([problem]) from None
    problem = f"expected a JSONPath such as '$.usage.total_tokens', got {path!r}"
    if path == "":  # the library takes it for the whole document
        raise ConfigError([problem])
    try:
        return jsonpath.compile(path)
    except (jsonpath.JSONPathError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError([f"{problem}: {error}"]) from None

"""Loggers that thin out repeated lines and count them."""

from __future__ import annotations

import logging
import re
import time
from typing import Any

#: An outage of an hour under load is a line a minute, not a line a request.
REPEAT_INTERVAL = 60.0
#: As the ``extra`` of a line: what went before is over. It is written in any case, and
#: so is what begins anew after it.
OVER = {"is_over": True}
#: Distinct lines remembered; past it all is forgotten, which costs a repeated line.
MEMORY = 1_000


#: Of one text that comes from elsewhere a line holds so many characters.
MAX_TEXT = 5_000
_WORDS = re.compile(r"""([\s'"]+)""")
_KEY = re.compile(r"""(?i:bearer)\s+[^\s'"]+""")


def clean(text: str, limit: int = MAX_TEXT) -> str:
    """Return *text*, which comes from elsewhere, as one line without secrets.

    Without the credentials of a URL or a header, and without characters that could
    forge another line or steer a terminal; at most *limit* characters.
    """
    if "@" in text:
        text = "".join(map(_without_credentials, _WORDS.split(text)))
    text = _KEY.sub("[...]", text)
    if not text.isprintable():
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text[:limit]


def _without_credentials(word: str) -> str:
    """Leave out what stands before the host in a URL, or in a part of one."""
    before, at, host = word.rpartition("@")
    scheme, slashes, _ = before.partition("//")
    if slashes:
        return f"{scheme}//[...]@{host}"
    return f"[...]@{host}" if at and ":" in before else word


def _cleaned(argument: Any) -> Any:
    if isinstance(argument, str):
        return clean(argument)
    return _Cleaned(argument) if isinstance(argument, BaseException) else argument


class _Cleaned:
    """An exception in the arguments of a line, whose texts are cleaned."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __str__(self) -> str:
        return clean(str(self._error))

    def __repr__(self) -> str:
        return clean(repr(self._error))


class RepeatFilter(logging.Filter):
    """Let a line through once a minute, with the number of its repetitions.

    Two records are the same line if level, template and first argument are
    equal: by convention the first argument says what the line is about, later
    ones are its figures.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[object, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether *record* is written, and clean its texts.

        Any thread; takes no lock.
        """
        if isinstance(record.args, dict):
            record.args = {k: _cleaned(v) for k, v in record.args.items()}
        elif record.args:
            record.args = tuple(map(_cleaned, record.args))
        if record.levelno < logging.INFO:
            return True
        if getattr(record, "is_over", False):
            self._seen.clear()
            return True
        args = record.args
        topic = str(args[0]) if isinstance(args, tuple) and args else None
        line = (record.levelno, record.msg, topic)
        now = time.monotonic()
        written, repeats = self._seen.get(line, (-REPEAT_INTERVAL, 0))
        if now - written < REPEAT_INTERVAL:
            self._seen[line] = (written, repeats + 1)
            return False
        if len(self._seen) >= MEMORY:
            self._seen.clear()
        self._seen[line] = (now, 0)
        if repeats:
            record.msg = f"{record.msg} (and {repeats} times before)"
        return True


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module, with repetitions thinned."""
    logger = logging.getLogger(name)
    logger.addFilter(RepeatFilter())
    return logger

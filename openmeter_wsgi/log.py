"""Loggers that write a repeated line once a minute, with the number of repetitions."""

from __future__ import annotations

import logging
import re
import time
from typing import Any

#: Minimum number of seconds between two equal lines: an outage logs one line per
#: minute, not one per request.
REPEAT_INTERVAL = 60.0
#: The start of each line: not every application logs the name of the logger.
PREFIX = "openmeter_wsgi: "
#: The ``extra`` of a line that ends a problem. This line is always written, and so is
#: the first line of the next problem.
OVER = {"is_over": True}
#: Maximum number of distinct lines that a filter remembers. Beyond it, it forgets all.
MEMORY = 1_000


#: Maximum number of characters of a text from outside in a line.
MAX_TEXT = 5_000
_WORDS = re.compile(r"""([\s'"]+)""")
_KEY = re.compile(r"""(?i:bearer)\s+[^\s'"]+""")


def clean(text: str, limit: int = MAX_TEXT) -> str:
    """Return *text* from outside as one line without secrets.

    It removes the credentials of URLs and headers. It also removes characters that
    could forge another line or control a terminal, and cuts the text at *limit*.
    """
    if "@" in text:
        text = "".join(map(_without_credentials, _WORDS.split(text)))
    text = _KEY.sub("[...]", text)
    if not text.isprintable():
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text[:limit]


def _without_credentials(word: str) -> str:
    """Remove the credentials before the host in a URL or in a part of a URL."""
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
    """An exception among the arguments of a line, whose texts are cleaned."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __str__(self) -> str:
        return clean(str(self._error))

    def __repr__(self) -> str:
        return clean(repr(self._error))


class RepeatFilter(logging.Filter):
    """A filter that passes a line once a minute and adds prefix and repetitions.

    Two records are the same line if level, template and first argument are equal. By
    convention the first argument is the subject of the line, and the others are values.
    """

    def __init__(self) -> None:
        super().__init__()
        #: The time of the last write of each line, and the repetitions since.
        self._seen: dict[object, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Clean the texts of *record*; return True if it is to be written.

        Any thread; takes no lock.
        """
        if isinstance(record.args, dict):
            record.args = {k: _cleaned(v) for k, v in record.args.items()}
        elif record.args:
            record.args = tuple(map(_cleaned, record.args))
        repeats = self._repeats(record)
        if repeats is None:
            return False
        times = f" (and {repeats} times before)" if repeats else ""
        record.msg = f"{PREFIX}{record.msg}{times}"
        return True

    def _repeats(self, record: logging.LogRecord) -> int | None:
        """Return the number of suppressed repetitions, None to suppress *record*."""
        if record.levelno < logging.INFO:
            return 0
        if getattr(record, "is_over", False):
            self._seen.clear()
            return 0
        args = record.args
        subject = str(args[0]) if isinstance(args, tuple) and args else None
        line = (record.levelno, record.msg, subject)
        now = time.monotonic()
        written, repeats = self._seen.get(line, (-REPEAT_INTERVAL, 0))
        if now - written < REPEAT_INTERVAL:
            self._seen[line] = (written, repeats + 1)
            return None
        if len(self._seen) >= MEMORY:
            self._seen.clear()
        self._seen[line] = (now, 0)
        return repeats


def get_logger(name: str) -> logging.Logger:
    """Return the logger *name* with a `RepeatFilter`."""
    logger = logging.getLogger(name)
    if not logger.filters:
        logger.addFilter(RepeatFilter())
    return logger

"""Loggers that write a repeated line once a minute, with its count."""

from __future__ import annotations

import logging
import re
import time
from typing import Any

#: Seconds between two equal lines: an outage logs a line a minute, not one a request.
REPEAT_INTERVAL = 60.0
#: The beginning of each line, as not every application logs the name of the logger.
PREFIX = "openmeter_wsgi: "
#: The ``extra`` of a line that ends a problem. It is always written, and so is the
#: first line of the next problem.
OVER = {"is_over": True}
#: The most distinct lines that are remembered; beyond it all are forgotten.
MEMORY = 1_000


#: The most characters of a foreign text in a line.
MAX_TEXT = 5_000
_WORDS = re.compile(r"""([\s'"]+)""")
_KEY = re.compile(r"""(?i:bearer)\s+[^\s'"]+""")


def clean(text: str, limit: int = MAX_TEXT) -> str:
    """Return the foreign *text* as one line without secrets.

    It removes the credentials of URLs and headers, and characters that could forge
    another line or control a terminal, and cuts the text at *limit* characters.
    """
    if "@" in text:
        text = "".join(map(_without_credentials, _WORDS.split(text)))
    text = _KEY.sub("[...]", text)
    if not text.isprintable():
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text[:limit]


def _without_credentials(word: str) -> str:
    """Remove the credentials before the host in a URL, or in a part of one."""
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
    """An exception in the arguments of a line; its texts are cleaned."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __str__(self) -> str:
        return clean(str(self._error))

    def __repr__(self) -> str:
        return clean(repr(self._error))


class RepeatFilter(logging.Filter):
    """Writes a line once a minute, with the number of its repetitions and our name.

    Two records are the same line if level, template and first argument are equal. By
    convention the first argument is the subject of the line, the others are figures.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[object, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return True if *record* is to be written; clean its texts.

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
        """Return the suppressed repetitions before *record*, None to suppress it."""
        if record.levelno < logging.INFO:
            return 0
        if getattr(record, "is_over", False):
            self._seen.clear()
            return 0
        args = record.args
        topic = str(args[0]) if isinstance(args, tuple) and args else None
        line = (record.levelno, record.msg, topic)
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
    """Return the logger of a module, with a `RepeatFilter`."""
    logger = logging.getLogger(name)
    if not logger.filters:
        logger.addFilter(RepeatFilter())
    return logger

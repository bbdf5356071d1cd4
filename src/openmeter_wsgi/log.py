"""Log lines that an operator can read: a repetition is thinned, and counted."""

from __future__ import annotations

import logging
import time

#: An outage of an hour under load is a line a minute, not a line a request.
REPEAT_INTERVAL = 60.0
#: As the ``extra`` of a line: what went before is over. It is written in any case, and
#: so is what begins anew after it.
OVER = {"is_over": True}
#: Distinct lines remembered; past it all is forgotten, which costs a repeated line.
MEMORY = 1_000


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
        """Say whether *record* is written. Any thread; takes no lock."""
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

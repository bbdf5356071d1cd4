"""A configuration that cannot work: what is wrong with it, and what to write."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from typing import TYPE_CHECKING

from openmeter_wsgi.commands.checks.findings import failure, warning
from openmeter_wsgi.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openmeter_wsgi.commands.checks.findings import Finding
    from openmeter_wsgi.errors import ConfigError

_REMEDIES = {
    "api_url": "write scheme, host and port alone, such as http://127.0.0.1:8888",
    "api_key": "set OPENMETER_API_KEY to a key that may ingest events",
    "api_key_file": "name one file that holds the key and nothing else",
    "spool_dir": "name a directory of the application's own, mode 0700",
}

#: The loggers that warn of a configuration which nothing else here looks at.
_WARNS = {
    "openmeter_wsgi.options.files": "write it as the option is called",
    "openmeter_wsgi.measures": "name the whole path, such as $.usage.total_tokens",
}


def problems_of(error: ConfigError) -> list[Finding]:
    """Return a failure for each problem of a configuration."""
    return [failure("configuration", said, _remedy(said)) for said in error.problems]


@contextlib.contextmanager
def warnings_told() -> Iterator[list[Finding]]:
    """Collect what reading a configuration would write into the log."""
    found: list[Finding] = []
    package = logging.getLogger("openmeter_wsgi")
    handler = _Collector(found)
    package.addHandler(handler)
    try:
        yield found
    finally:
        package.removeHandler(handler)


class _Collector(logging.Handler):
    def __init__(self, found: list[Finding]) -> None:
        super().__init__()
        self._found = found

    def emit(self, record: logging.LogRecord) -> None:
        # What the others say has a check of its own.
        for name, remedy in _WARNS.items():
            if record.name == name and record.levelno >= logging.WARNING:
                said = record.getMessage()
                self._found.append(warning("configuration", said, remedy))


def _remedy(problem: str) -> str:
    option = problem.partition(":")[0].partition("[")[0]
    if option in _REMEDIES:
        return _REMEDIES[option]
    if option in {field.name for field in dataclasses.fields(Policy)}:
        return f"mend {option} where it is set: in the code, in the file or in " + (
            f"OPENMETER_{option.upper()}"
        )
    if problem.startswith("unknown option"):
        return "write an option as it is called; the fields of Policy are all there are"
    return "mend it where it is set"

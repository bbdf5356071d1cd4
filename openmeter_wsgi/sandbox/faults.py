"""Simulated faults of ingest requests and of entitlement checks.

Each group of requests has its own `GroupFaults`. A route calls `GroupFaults.check` and
`GroupFaults.draw` before it handles a request, and `GroupFaults.delay` afterwards.
"""

from __future__ import annotations

import itertools
import random
import re
import threading
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from openmeter_wsgi.sandbox.request_validation import Problem

if TYPE_CHECKING:
    from collections.abc import Callable

#: The groups of requests.
GROUPS = ("ingest", "entitlements")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The faults of one group of requests. By default there are none."""

    #: The share of requests that is answered with 500, from 0 to 1.
    fail_rate: float = 0.0
    #: Seconds by which each response is delayed.
    latency: float = 0.0
    #: Seconds for which a request is handled but not answered.
    hang: float = 0.0
    #: Seconds between two bytes of a response.
    byte_delay: float = 0.0
    #: True to answer all requests with 503.
    outage: bool = False
    #: Answer all requests with 429 and this ``Retry-After``, in seconds.
    retry_after: float | None = None
    #: Answer all requests with this status, 401 or 403, as if the API key were wrong.
    denied: int | None = None
    #: Answer 400 to requests with an event of this type.
    refused_type: str | None = None
    #: Answer 400 to requests with an event of this subject.
    refused_subject: str | None = None
    #: True to answer 204 to ingest requests and store nothing.
    forget: bool = False
    #: True to answer 500 to ingest requests and store only the ids of their events, so
    #: that the events are duplicates when they are sent again.
    claim: bool = False

    def __post_init__(self) -> None:
        for name, (expected, fits) in _RULES.items():
            value = getattr(self, name)
            if not fits(value):
                given = _camel(name)
                raise ValueError(f"{given}: expected {expected}, got {value!r}")


_Rule = tuple[str, "Callable[[Any], bool]"]


def _number(most: float, *, optional: bool = False) -> _Rule:
    def fits(value: Any) -> bool:
        if value is None:
            return optional
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and 0 <= value <= most

    return f"a number from 0 to {most:g}", fits


_FLAG: _Rule = ("true or false", lambda value: isinstance(value, bool))
_TEXT: _Rule = (
    "a text",
    lambda value: value is None or (isinstance(value, str) and value != ""),
)
#: The valid values of each setting.
_RULES: dict[str, _Rule] = {
    "fail_rate": _number(1.0),
    # These are seconds. The maxima exceed the timeouts of usual clients.
    "latency": _number(60.0),
    "hang": _number(600.0),
    "byte_delay": _number(5.0),
    "outage": _FLAG,
    "retry_after": _number(86_400.0, optional=True),
    "denied": ("401 or 403", lambda value: value in (None, 401, 403)),
    "refused_type": _TEXT,
    "refused_subject": _TEXT,
    "forget": _FLAG,
    "claim": _FLAG,
}
#: The settings that only ingest has.
INGEST_ONLY = frozenset(("refused_type", "refused_subject", "forget", "claim"))


def names(group: str) -> list[str]:
    """Return the names of the settings of *group*."""
    known = [field.name for field in fields(Settings)]
    return [n for n in known if group == "ingest" or n not in INGEST_ONLY]


def _camel(name: str) -> str:
    return re.sub("_(.)", lambda match: match[1].upper(), name)


class GroupFaults:
    """The faults of one group of requests. Thread-safe."""

    def __init__(self, group: str) -> None:
        self.settings: Settings = Settings()
        self._names = names(group)
        self._stopped = threading.Event()
        self._released = threading.Event()
        # Without a seed, so that the runs differ.
        self._random = random.SystemRandom()
        self._failures = itertools.cycle(("after", "before"))

    def set(self, **changes: Any) -> None:
        """Change the named settings of `Settings` and keep the others.

        :raises ValueError: if a value is invalid; then nothing is changed.
        """
        self.apply(self.changed(changes))

    def changed(self, changes: dict[str, Any]) -> Settings:
        """Return the settings with *changes*; raise ValueError if they are invalid."""
        if unknown := changes.keys() - set(self._names):
            listed = ", ".join(map(_camel, self._names))
            raise ValueError(f"{', '.join(unknown)}: expected one of {listed}")
        return replace(self.settings, **changes)

    def apply(self, settings: Settings) -> None:
        """Apply *settings*. If requests no longer hang, release those that do."""
        self.settings = settings
        if not settings.hang:
            self.release()

    def clear(self) -> None:
        """Remove all faults, and answer the requests that hang."""
        self.apply(Settings())

    def document(self) -> dict[str, Any]:
        """Return the settings by the names that the page and its API use."""
        return {_camel(name): getattr(self.settings, name) for name in self._names}

    def update(self, document: dict[str, Any]) -> Settings:
        """Return the settings with the changes in *document* of the page's API."""
        known = {_camel(name): name for name in self._names}
        return self.changed({known.get(n, n): value for n, value in document.items()})

    def release(self) -> None:
        """Answer the requests that hang now. Later requests hang as set."""
        self._released.set()
        self._released = threading.Event()

    def check(self) -> None:
        """Raise the error of the fault ``outage``, ``retry_after`` or ``denied``."""
        settings = self.settings
        if settings.outage:
            raise Problem(503, "the service is unavailable, on purpose")
        if settings.retry_after is not None:
            detail = "too many requests, on purpose"
            raise Problem(429, detail, retry_after=settings.retry_after)
        if settings.denied is not None:
            raise Problem(settings.denied, "the key is refused, on purpose")

    def draw(self) -> str | None:
        """Choose if the request fails: return ``before``, ``after`` or None.

        The request fails ``before`` or, alternately, ``after`` its events are stored.
        As in OpenMeter, the client cannot see the difference and sends them again.
        """
        if self._random.random() >= self.settings.fail_rate:
            return None
        return next(self._failures)

    def delay(self) -> None:
        """Wait for ``latency`` and ``hang``, or until the sandbox closes."""
        released, settings = self._released, self.settings
        if settings.latency:
            self._stopped.wait(settings.latency)
        if settings.hang and not self._stopped.is_set():
            released.wait(settings.hang)

    def pause(self) -> None:
        """Wait between two bytes of a response, or until the sandbox closes."""
        self._stopped.wait(self.settings.byte_delay)

    def stop(self) -> None:
        """End all waits, now and in future, because the sandbox closes."""
        self._stopped.set()
        self._released.set()


class Faults:
    """The faults of the sandbox, by group of requests. Thread-safe.

    ``faults.ingest`` applies to ingest requests, ``faults.entitlements`` to entitlement
    checks; `set` and `clear` apply to both.
    """

    def __init__(self) -> None:
        self.ingest: GroupFaults = GroupFaults("ingest")
        self.entitlements: GroupFaults = GroupFaults("entitlements")
        self._groups = {name: getattr(self, name) for name in GROUPS}

    def set(self, **changes: Any) -> None:
        """Change the named settings of `Settings` in both groups.

        :raises ValueError: if a value is invalid; then nothing is changed.
        """
        self._apply({g: f.changed(changes) for g, f in self._groups.items()})

    def clear(self) -> None:
        """Remove all faults, and answer the requests that hang."""
        self._apply(dict.fromkeys(GROUPS, Settings()))

    def release(self) -> None:
        """Answer all requests that hang."""
        for group in self._groups.values():
            group.release()

    def stop(self) -> None:
        """End all waits, now and in future, because the sandbox closes."""
        for group in self._groups.values():
            group.stop()

    def document(self) -> dict[str, Any]:
        """Return the settings by group."""
        return {name: group.document() for name, group in self._groups.items()}

    def update(self, document: Any) -> None:
        """Apply the changes in *document*; if one is invalid, answer 400."""
        groups = document if isinstance(document, dict) else {"": None}
        for name, changes in groups.items():
            if name not in GROUPS or not isinstance(changes, dict):
                raise Problem(400, f"expected an object with {', '.join(GROUPS)}")
        try:
            self._apply({g: self._groups[g].update(c) for g, c in groups.items()})
        except ValueError as error:
            raise Problem(400, str(error)) from None

    def _apply(self, wanted: dict[str, Settings]) -> None:
        for name, settings in wanted.items():
            self._groups[name].apply(settings)

"""Simulated faults, set separately for ingest and for entitlement checks."""

from __future__ import annotations

import itertools
import random
import re
import threading
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from openmeter_wsgi.sandbox.validation import Problem

if TYPE_CHECKING:
    from collections.abc import Callable

#: The requests that have faults of their own.
GROUPS = ("ingest", "entitlements")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The faults of one group of requests; by default none."""

    #: The share that is answered with 500, from 0 to 1.
    fail_rate: float = 0.0
    #: Seconds by which every answer is late.
    latency: float = 0.0
    #: Seconds for which an accepted request gets no answer, unless it is released
    #: before.
    hang: float = 0.0
    #: Seconds between two bytes of an answer.
    byte_delay: float = 0.0
    #: True: every request is answered with 503.
    outage: bool = False
    #: Seconds: every request is answered with 429 and this ``Retry-After``.
    retry_after: float | None = None
    #: 401 or 403: the answer to every request, as if its key were wrong.
    denied: int | None = None
    #: The event type, and the subject, for which a request is answered with 400.
    refused_type: str | None = None
    refused_subject: str | None = None
    #: True: events are answered with 204 and forgotten.
    forget: bool = False
    #: True: ids of events are remembered, the events answered with 500 and forgotten;
    #: a retry is a duplicate.
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
#: The values that each setting may have.
_RULES: dict[str, _Rule] = {
    "fail_rate": _number(1.0),
    # Longer than any sensible client waits, in seconds.
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
    """Return the settings of *group*."""
    known = [field.name for field in fields(Settings)]
    return [n for n in known if group == "ingest" or n not in INGEST_ONLY]


def _camel(name: str) -> str:
    return re.sub("_(.)", lambda found: found[1].upper(), name)


class GroupFaults:
    """The faults of one group of requests. Any thread."""

    def __init__(self, group: str) -> None:
        self.settings: Settings = Settings()
        self._names = names(group)
        self._stopped = threading.Event()
        self._released = threading.Event()
        # Not for secrets, and a seed would make runs alike, not more real.
        self._random = random.SystemRandom()
        self._failures = itertools.cycle(("after", "before"))

    def set(self, **changes: Any) -> None:
        """Change the named settings, as in `Settings`; the others stay.

        :raises ValueError: if a value makes no sense; nothing is changed then.
        """
        self.apply(self.changed(changes))

    def changed(self, changes: dict[str, Any]) -> Settings:
        """Return the settings with *changes*, or raise ValueError."""
        if unknown := changes.keys() - set(self._names):
            listed = ", ".join(map(_camel, self._names))
            raise ValueError(f"{', '.join(unknown)}: expected one of {listed}")
        return replace(self.settings, **changes)

    def apply(self, settings: Settings) -> None:
        """Apply *settings*; release hanging requests if requests no longer hang."""
        self.settings = settings
        if not settings.hang:
            self.release()

    def clear(self) -> None:
        """Set everything right, and answer what hangs."""
        self.apply(Settings())

    def document(self) -> dict[str, Any]:
        """Return the settings as the page and its API name them."""
        return {_camel(name): getattr(self.settings, name) for name in self._names}

    def update(self, document: dict[str, Any]) -> Settings:
        """Return the settings changed by *document*, or raise ValueError."""
        known = {_camel(name): name for name in self._names}
        return self.changed({known.get(n, n): value for n, value in document.items()})

    def release(self) -> None:
        """Answer the requests that hang now; later ones hang as set."""
        self._released.set()
        self._released = threading.Event()

    def check(self) -> None:
        """Refuse the request where an outage, a limit or a wrong key is set."""
        settings = self.settings
        if settings.outage:
            raise Problem(503, "the sandbox is out of order, on purpose")
        if settings.retry_after is not None:
            detail = "too many requests, on purpose"
            raise Problem(429, detail, retry_after=settings.retry_after)
        if settings.denied is not None:
            raise Problem(settings.denied, "the key is refused, on purpose")

    def draw(self) -> str | None:
        """Return None, or ``before`` or ``after`` if the next request is to fail.

        The events of the first, third and every other failing request are stored, as in
        OpenMeter, where a 500 does not tell this: the client sends them again.
        """
        if self._random.random() >= self.settings.fail_rate:
            return None
        return next(self._failures)

    def delay(self) -> None:
        """Wait as long as answers are late or hang, or until the sandbox closes."""
        released, settings = self._released, self.settings
        if settings.latency:
            self._stopped.wait(settings.latency)
        if settings.hang and not self._stopped.is_set():
            released.wait(settings.hang)

    def pause(self) -> None:
        """Wait between two bytes of an answer, unless the sandbox closes."""
        self._stopped.wait(self.settings.byte_delay)

    def stop(self) -> None:
        """Let all wait no longer."""
        self._stopped.set()
        self._released.set()


class Faults:
    """The faults of the sandbox, by group of requests. Any thread.

    ``faults.ingest`` applies to ingest requests, ``faults.entitlements`` to entitlement
    checks; `set` and `clear` apply to both.
    """

    def __init__(self) -> None:
        self.ingest: GroupFaults = GroupFaults("ingest")
        self.entitlements: GroupFaults = GroupFaults("entitlements")
        self._groups = {name: getattr(self, name) for name in GROUPS}

    def set(self, **changes: Any) -> None:
        """Change the named settings of both groups, as in `Settings`.

        :raises ValueError: if a value makes no sense; nothing is changed then.
        """
        self._apply({g: f.changed(changes) for g, f in self._groups.items()})

    def clear(self) -> None:
        """Set everything right, and answer what hangs."""
        self._apply(dict.fromkeys(GROUPS, Settings()))

    def release(self) -> None:
        """Answer all requests that hang."""
        for group in self._groups.values():
            group.release()

    def stop(self) -> None:
        """Let all wait no longer."""
        for group in self._groups.values():
            group.stop()

    def document(self) -> dict[str, Any]:
        """Return the settings, by group."""
        return {name: group.document() for name, group in self._groups.items()}

    def update(self, document: Any) -> None:
        """Apply the settings in *document*, or answer 400 and change nothing."""
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

"""Faults on purpose: what a client must survive, for ingest and for questions apart."""

from __future__ import annotations

import enum
import random
import threading
from dataclasses import dataclass, replace
from typing import Any

from openmeter_wsgi.sandbox.protocol import Problem

#: Longer than any sensible client waits, in seconds.
MAX_LATENCY = 60.0
MAX_HANG = 600.0
#: What a client is asked to wait at most, in seconds.
MAX_RETRY_AFTER = 86_400.0
#: The requests that have faults of their own.
GROUPS = ("ingest", "entitlements")


class Fault(enum.Enum):
    """When a request fails that is chosen to."""

    #: Nothing of it was taken.
    BEFORE = "before"
    #: All of it was taken, and the client is told otherwise: it will send it again.
    AFTER = "after"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is wrong with one group of requests; by default nothing."""

    #: The share that is answered with 500, from 0 to 1.
    fail_rate: float = 0.0
    #: Seconds by which every answer is late.
    latency: float = 0.0
    #: Seconds for which a request that was taken stays without an answer, unless it
    #: is released before.
    hang: float = 0.0
    #: Whether every request is answered with 503.
    outage: bool = False
    #: Seconds: every request is answered with 429 and this ``Retry-After``.
    retry_after: float | None = None

    def __post_init__(self) -> None:
        _check("failRate", self.fail_rate, 1.0)
        _check("latency", self.latency, MAX_LATENCY)
        _check("hang", self.hang, MAX_HANG)
        if not isinstance(self.outage, bool):
            raise ValueError(f"outage: expected true or false, got {self.outage!r}")
        if self.retry_after is not None:
            _check("retryAfter", self.retry_after, MAX_RETRY_AFTER)

    def document(self) -> dict[str, Any]:
        """Return the settings as the page and its API name them."""
        return {name: getattr(self, option) for name, option in _NAMES.items()}


_NAMES = {
    "failRate": "fail_rate",
    "latency": "latency",
    "hang": "hang",
    "outage": "outage",
    "retryAfter": "retry_after",
}


def _check(name: str, value: Any, most: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= most:
        raise ValueError(f"{name}: expected a number from 0 to {most:g}, got {value!r}")


class GroupFaults:
    """The faults of one group of requests. Any thread."""

    def __init__(self) -> None:
        self.settings = Settings()
        self._stopped = threading.Event()
        self._released = threading.Event()
        # Not for secrets, and a seed would make runs alike, not more real.
        self._random = random.SystemRandom()

    def set(self, **changes: Any) -> None:
        """Change what is named, as in `Settings`; the rest stays.

        :raises ValueError: if a value makes no sense; nothing is changed then.
        """
        self.apply(replace(self.settings, **changes))

    def apply(self, settings: Settings) -> None:
        """Take *settings*, and answer what hangs where nothing is to hang any more."""
        self.settings = settings
        if not settings.hang:
            self.release()

    def clear(self) -> None:
        """Set everything right, and answer what hangs."""
        self.apply(Settings())

    def release(self) -> None:
        """Answer what hangs now; what comes later hangs as is set."""
        self._released.set()
        self._released = threading.Event()

    def check(self) -> None:
        """Refuse the request where an outage or a limit is set: 503, 429."""
        settings = self.settings
        if settings.outage:
            raise Problem(503, "the sandbox is out of order, on purpose")
        if settings.retry_after is not None:
            detail = "too many requests, on purpose"
            raise Problem(429, detail, retry_after=settings.retry_after)

    def draw(self) -> Fault | None:
        """Return how the next request fails.

        One chosen request in two is taken first, as with OpenMeter, where a 500 says
        nothing about what was taken.
        """
        if self._random.random() >= self.settings.fail_rate:
            return None
        return self._random.choice(list(Fault))

    def delay(self) -> None:
        """Wait as long as answers are late or hang, or until the sandbox closes."""
        released, settings = self._released, self.settings
        if settings.latency:
            self._stopped.wait(settings.latency)
        if settings.hang and not self._stopped.is_set():
            released.wait(settings.hang)

    def stop(self) -> None:
        """Let all wait no longer."""
        self._stopped.set()
        self._released.set()


class Faults:
    """What is wrong with the sandbox, by group of requests. Any thread.

    ``faults.ingest`` is for events that arrive, ``faults.entitlements`` for questions
    about entitlements; `set` and `clear` are for both.
    """

    def __init__(self) -> None:
        self.ingest = GroupFaults()
        self.entitlements = GroupFaults()
        self._groups = {name: getattr(self, name) for name in GROUPS}

    def set(self, **changes: Any) -> None:
        """Change what is named in both groups, as in `Settings`.

        :raises ValueError: if a value makes no sense; nothing is changed then.
        """
        for group in self._groups.values():
            group.set(**changes)

    def clear(self) -> None:
        """Set everything right, and answer what hangs."""
        for group in self._groups.values():
            group.clear()

    def release(self) -> None:
        """Answer what hangs."""
        for group in self._groups.values():
            group.release()

    def stop(self) -> None:
        """Let all wait no longer."""
        for group in self._groups.values():
            group.stop()

    def document(self) -> dict[str, Any]:
        """Return what is set, by group."""
        return {name: g.settings.document() for name, g in self._groups.items()}

    def update(self, document: Any) -> None:
        """Set what *document* names, by group, or answer 400 and change nothing."""
        wanted = {
            name: replace(self._groups[name].settings, **_options(changes))
            for name, changes in _object(document, GROUPS).items()
        }
        for name, settings in wanted.items():
            self._groups[name].apply(settings)


def _options(changes: Any) -> dict[str, Any]:
    options = {_NAMES[n]: v for n, v in _object(changes, tuple(_NAMES)).items()}
    try:
        Settings(**options)
    except ValueError as error:
        raise Problem(400, str(error)) from None
    return options


def _object(document: Any, names: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(document, dict) or document.keys() - set(names):
        raise Problem(400, f"expected an object with {', '.join(names)}")
    return document

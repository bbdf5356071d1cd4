"""Faults on purpose: what a client must survive, at a rate and with a delay."""

from __future__ import annotations

import enum
import random
import threading
from typing import Any

from openmeter_wsgi.sandbox.problems import Problem

#: Longer than any sensible client waits.
MAX_LATENCY = 60.0


class Fault(enum.Enum):
    """When a request fails that is chosen to."""

    #: Nothing of it was taken.
    BEFORE = "before"
    #: All of it was taken, and the client is told otherwise: it will send it again.
    AFTER = "after"


class Faults:
    """Which ingest requests are answered with 500, and how late all are answered.

    Any thread. One chosen request in two is stored first, as with OpenMeter, where a
    500 says nothing about what was taken.

    :param rate: the share of requests that fail, from 0 to 1.
    :param latency: seconds.
    """

    def __init__(self, rate: float = 0.0, latency: float = 0.0) -> None:
        self.rate = 0.0
        self.latency = 0.0
        self._stopped = threading.Event()
        # Not for secrets, and a seed would make runs alike, not more real.
        self._random = random.SystemRandom()
        self.set(rate, latency)

    def set(self, rate: Any, latency: Any) -> None:
        """Change both, or raise ValueError and change nothing."""
        _check("failRate", rate, 1.0)
        _check("latency", latency, MAX_LATENCY)
        self.rate, self.latency = float(rate), float(latency)

    def draw(self) -> Fault | None:
        """Return the fault of the next request."""
        if self._random.random() >= self.rate:
            return None
        return self._random.choice(list(Fault))

    def delay(self) -> None:
        """Wait for the latency, or until the sandbox closes."""
        if self.latency:
            self._stopped.wait(self.latency)

    def stop(self) -> None:
        """Let all wait no longer."""
        self._stopped.set()

    def document(self) -> dict[str, float]:
        """Return what is set."""
        return {"failRate": self.rate, "latency": self.latency}

    def update(self, document: Any) -> None:
        """Set what *document* names, or answer 400."""
        if not isinstance(document, dict) or document.keys() - self.document():
            raise Problem(400, "expected an object with failRate and latency")
        wanted = self.document() | document
        try:
            self.set(wanted["failRate"], wanted["latency"])
        except ValueError as error:
            raise Problem(400, str(error)) from None


def _check(name: str, value: Any, most: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= most:
        raise ValueError(f"{name}: expected a number from 0 to {most:g}, got {value!r}")

"""What meters instead: the seam at which a test takes over all middlewares at once.

A process may give its middlewares, those that it has and those that it will make,
something that looks like their own metering and delivers nothing. It costs what
serves requests nothing: an exchange is made when it begins and when it ends.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Protocol

    from openmeter_wsgi.metering import Metering
    from openmeter_wsgi.policy import Policy

    class Substitute(Protocol):
        """Meters in place of the middlewares of a process."""

        def metering(self, policy: Policy) -> Metering:
            """Return what bills the requests under *policy*."""

        def watch(self, response: Iterable[bytes]) -> Iterable[bytes]:
            """Return what the client of a test gets in place of *response*."""

    class Substitutable(Protocol):
        """What can be taken over: a middleware."""

        def exchange(self, substitute: Substitute | None) -> Callable[[], None]:
            """Let *substitute* meter, or its own metering.

            Returns what takes that back.
            """


_present: weakref.WeakSet[Substitutable] = weakref.WeakSet()
_substitute: Substitute | None = None


def present(made: Substitutable) -> Substitute | None:
    """Remember what was made just now, and return what meters in its place."""
    _present.add(made)
    return _substitute


@contextlib.contextmanager
def substituted(substitute: Substitute) -> Iterator[None]:
    """Let *substitute* meter for all middlewares of this process, old and new."""
    global _substitute  # noqa: PLW0603 - there is one for the process, see above
    before, _substitute = _substitute, substitute
    restore = {made: made.exchange(substitute) for made in list(_present)}
    try:
        yield
    finally:
        _substitute = before
        for made in list(_present):
            if made in restore:
                restore[made]()
            else:
                made.exchange(before)

"""The usual ways from a response to its events: what can be known beforehand is.

Most responses of a policy are like one before: they completed, their handler stated
nothing, and their status was seen. What is left to do for them depends on their status
alone. All others go the long way (`Billing.events`), as does the first of each status.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, TypeAlias

from openmeter_wsgi.environ import CALLER
from openmeter_wsgi.events import quoted, static_templates
from openmeter_wsgi.timestamps import clock, timestamp
from openmeter_wsgi.wire import SHORT_SUBJECT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from openmeter_wsgi.events import RequestIds
    from openmeter_wsgi.forks import Mark
    from openmeter_wsgi.policy import Policy
    from openmeter_wsgi.subject import FindSubject
    from openmeter_wsgi.usage import Meter

#: One event, or a list of several.
Made: TypeAlias = bytes | list[bytes]
#: From an environ to what was made, None for the long way.
Make: TypeAlias = "Callable[[dict[str, Any]], Made | None]"

#: Status lines that are learnt: an application may invent reasons.
_MAX_STATUS_LINES = 1_000


class UsualWay:
    """How the responses of one status end, and how many have ended so.

    Any thread: `count` is added to as the `Counts` are.
    """

    __slots__ = ("count", "make", "put", "reason")

    def __init__(
        self, make: Make | None, put: Callable[[Any], object], reason: str | None
    ) -> None:
        self.count = 0
        #: What makes the events, None where there are none …
        self.make = make
        #: … and what takes all that was made.
        self.put = put
        #: Why there are none.
        self.reason = reason


class UsualWays:
    """The usual ways of one policy. One process, any thread."""

    def __init__(self, policy: Policy, make: Make, put: Callable[[bytes], object]):
        #: By status line.
        self.by_status: dict[str, UsualWay] = {}
        #: Two threads may learn the same at once, and each count for a while.
        self._learnt: list[UsualWay] = []
        self._events_each = len(policy.static_meters)
        self._is_audited = policy.audit is not None
        self._make = make
        self._put = put if self._events_each == 1 else _putting_all(put)

    def learn(self, status: str, *, is_billed: bool) -> None:
        """Let later responses of a status line go this way, if they can."""
        if len(self.by_status) >= _MAX_STATUS_LINES:
            return
        reason = None
        if not (is_billed and self._events_each):
            reason = "no_meters" if is_billed else "status"
            if self._is_audited:
                return  # each of them is told of
        make = None if reason else self._make
        way = UsualWay(make, self._put, reason)
        self._learnt.append(way)
        self.by_status[status] = way

    def forget(self) -> None:
        """Let the next response of each status go the long way."""
        self.by_status.clear()

    @property
    def metered(self) -> int:
        """Requests that became events."""
        return sum(way.count for way in self._learnt if way.make)

    @property
    def events(self) -> int:
        """Events made of them."""
        return self.metered * self._events_each

    @property
    def unbilled(self) -> Counter[str]:
        """Requests that became none, by reason."""
        found: Counter[str] = Counter()
        for way in self._learnt:
            if way.reason and way.count:
                found[way.reason] += way.count
        return found


def _putting_all(put: Callable[[bytes], object]) -> Callable[[list[bytes]], None]:
    def put_all(events: list[bytes]) -> None:
        for event in events:
            put(event)

    return put_all


def usual_make(
    meters: Iterable[Meter],
    source: str,
    *,
    ids: RequestIds,
    is_own: Mark,
    find_subject: FindSubject,
    anonymous: str | None,
) -> Make:
    """Return what makes the events of responses that nothing is special about.

    *anonymous* is whom a request is billed to that does not say who is calling, None
    where *find_subject* has to be asked all the same.
    """
    templates = static_templates(meters, source)
    if len(templates) == 1:
        return _making_one(*templates[0], ids, is_own, find_subject, anonymous)

    def make(environ: dict[str, Any]) -> list[bytes] | None:
        if environ["REQUEST_METHOD"] == "OPTIONS" or not is_own[0]:
            return None
        subject = find_subject(environ)
        if not subject or len(subject) > SHORT_SUBJECT:
            return None
        request_id = ids.new()
        tail = f'{timestamp()}","subject":{quoted(subject)}}}'
        return [
            f"{head}{request_id}{middle}{tail}".encode() for head, middle in templates
        ]

    return make


def _making_one(
    head: str,
    middle: str,
    ids: RequestIds,
    is_own: Mark,
    find_subject: FindSubject,
    anonymous: str | None,
) -> Make:
    """Return what makes the one event that most policies bill.

    It does what the other one does, in one piece: each call costs a request.
    """

    def make(environ: dict[str, Any]) -> bytes | None:
        # A process forked while the application ran has a copy of the response, which
        # is its parent's to settle.
        if environ["REQUEST_METHOD"] == "OPTIONS" or not is_own[0]:
            return None
        if anonymous is None or CALLER in environ or "REMOTE_USER" in environ:
            subject = find_subject(environ)
            if not subject or len(subject) > SHORT_SUBJECT:
                return None
        else:
            subject = anonymous
        try:
            block, numbers = ids.block
            number = next(numbers)
        except StopIteration:
            block, number = ids.new_in_next_block(), ""
        monotonic = clock.monotonic
        time = clock.text if monotonic() < clock.until else clock.renew()
        return (
            f'{head}{block}{number}{middle}{time}","subject":{quoted(subject)}}}'
        ).encode()

    return make

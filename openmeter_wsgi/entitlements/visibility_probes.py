"""The probes in OpenMeter's list of events, which move the visibility mark.

The sender calls `Visibility.accepted` with each batch that OpenMeter has accepted; some
of its event ids become probes. Once a second the thread ``openmeter_wsgi.visibility``
asks for the oldest probes in OpenMeter's list of events, which reads the same table as
balances do. As probes are listed, the mark moves (see `quota.visibility_mark`).

With a spool only the process that sends does so. It writes the mark and the probes to
files of the spool: for the other processes, and for the next sender. The ledgers read
the mark (`Visibility.until`).
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Final, Protocol, TypeVar
from urllib.parse import quote

import msgspec

from openmeter_wsgi import log
from openmeter_wsgi.connection import Connection
from openmeter_wsgi.entitlements.client import decoded
from openmeter_wsgi.errors import DeliveryError
from openmeter_wsgi.lock import UNFINISHED
from openmeter_wsgi.quota.visibility_mark import (
    MAX_PROBES,
    FixedLag,
    Probes,
    ProbeState,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from openmeter_wsgi.delivery.batch import Batch
    from openmeter_wsgi.options import ApiKey
    from openmeter_wsgi.policy import Policy

logger: Final = log.get_logger(__name__)

_Kind = TypeVar("_Kind")


class _Event(msgspec.Struct):
    id: str


class _Item(msgspec.Struct):
    event: _Event


class _Page(msgspec.Struct):
    items: list[_Item]


_EVENTS = "/api/v2/events?limit={}&filter={}"
#: Maximum number of ids per request: the size of a page.
MAX_IDS = 100
_MAX_ANSWER_BYTES = 1_048_576
#: Statuses of a server without the list, or of a key that may not read it.
_NO_LIST = {400, 401, 403, 404, 405, 501}


class EventList:
    """OpenMeter's list of events. Belongs to one thread at a time."""

    def __init__(self, *, url: str, key: ApiKey, timeout: float) -> None:
        self._url = url
        self._connection = Connection(
            key=key, timeout=timeout, max_answer_bytes=_MAX_ANSWER_BYTES
        )

    def listed(self, ids: Sequence[str]) -> set[str]:
        """Return the ids among *ids* that OpenMeter lists.

        :raises DeliveryError: if OpenMeter gives no valid answer.
        """
        wanted = msgspec.json.encode({"id": {"$in": ids}}).decode()
        path = _EVENTS.format(MAX_IDS, quote(wanted, safe=""))
        reply = self._connection.request("GET", self._url + path)
        listed = {item.event.id for item in decoded(reply, _Page).items}
        # OpenMeter strips ids in this list only.
        return {event_id for event_id in ids if event_id.strip() in listed}

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def event_list(policy: Policy, timeout: float) -> EventList:
    """Return the list of the server that answers questions about entitlements."""
    url = policy.entitlements_url or policy.api_url
    return EventList(url=url, key=policy.entitlements_key, timeout=timeout)


class Sending(Protocol):
    """The part of a delivery queue that the visibility of its events depends on."""

    def delivered_until(self) -> float:
        """Return a moment (wall clock) before which all queued events are delivered."""

    @property
    def directory(self) -> Path | None:
        """The directory of the spool, None if events are queued in memory."""

    @property
    def is_sender(self) -> bool:
        """True if this process sends the queued events."""


class _MarkFile(msgspec.Struct):
    """The file in which the sender of a spool publishes the mark."""

    #: The mark.
    until: float
    #: The wall-clock time at which the file was written.
    at: float
    #: Seconds that usage currently takes to become visible.
    lag: float


#: Seconds between two requests for the list.
INTERVAL = 1.0
#: Seconds after which a list that was refused is requested again.
_RETRY_DELAY = 600.0
_MARK, _PROBES = "visible_until.json", "probes.json"
#: Maximum number of bytes read from a file.
_MAX_FILE = 4_000_000


class Visibility:
    """The visibility mark of one process or, with a spool, of one host. Any thread.

    Does nothing before `follow` is called. The first accepted batch starts the thread.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        #: Only batches with events of these types get probes.
        self._type_markers = _type_markers(policy)
        self._probes = Probes(policy.max_visibility_lag)
        self._sending: Sending | None = None
        self._take_token: Callable[[], float] = lambda: 0.0
        self._fixed_lag = FixedLag(lambda: 0.0, policy.visibility_lag)
        self._fixed_lag_until = 0.0
        self._max_ids = MAX_IDS
        self._mark_file: _MarkFile | None = None
        self._written_state = b""
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()
        self._starting = threading.RLock()
        self._pid = os.getpid()

    def follow(self, sending: Sending, take_token: Callable[[], float]) -> None:
        """Follow the delivery of *sending*.

        *take_token* takes a token and returns 0.0, or returns the seconds until one is
        there.
        """
        self._sending = sending
        self._take_token = take_token
        self._fixed_lag = FixedLag(sending.delivered_until, self._policy.visibility_lag)

    # -- From the ledger

    def until(self) -> float:
        """Return the mark, and start the thread if it is needed."""
        sending = self._sending
        if sending is None:
            return 0.0
        self._closed.clear()
        if sending.directory is None:
            return self._compute_mark(sending)
        if sending.is_sender:
            self._start()
        self._mark_file = _read(sending.directory / _MARK, _MarkFile)
        fixed = self._fixed_lag.until()
        if self._mark_file is None:
            return fixed
        if time.time() - self._mark_file.at > self._policy.max_visibility_lag:
            return fixed  # no sender writes the file
        return min(self._mark_file.until, sending.delivered_until())

    @property
    def lag(self) -> float:
        """Seconds that usage currently takes to become visible."""
        if (mark_file := self._mark_file) is not None:
            return mark_file.lag
        return self._policy.visibility_lag if self._uses_fixed_lag else self._probes.lag

    # -- From the sender

    def accepted(self, batch: Batch) -> None:
        """Add probes for a batch that OpenMeter has accepted. Never raises."""
        try:
            if not any(_contains_any(text, self._type_markers) for text in batch.texts):
                return
            last, steps = len(batch) - 1, MAX_PROBES - 1
            positions = {round(n * last / steps) for n in range(MAX_PROBES)}
            events = [batch[n] for n in sorted(positions)]
            self._probes.add(
                [msgspec.json.decode(event, type=_Event).id for event in events]
            )
        except Exception:
            logger.exception("%s: a batch gets no probes; its usage may count as "
                             "visible too early", "visibility")  # fmt: skip
        self._start()

    def elected(self) -> None:
        """Continue with the last sender's probes: this process now sends the spool.

        After `close` the thread does not start before `until` is called again.
        """
        directory = self._sending.directory if self._sending is not None else None
        if directory is not None:
            state = _read(directory / _PROBES, ProbeState)
            self._probes = Probes(self._policy.max_visibility_lag)
            if state is not None:
                self._probes.restore(state)
        self._start()

    def ended(self) -> None:
        """Write the probes to the spool, for the next sender."""
        if self._sending is not None:
            self._publish(self._sending)

    def close(self) -> None:
        """End the thread."""
        if os.getpid() == self._pid:
            self._closed.set()

    # -- The thread

    def _start(self) -> None:
        if self._sending is None or sys.is_finalizing():
            return
        with self._starting:
            if self._thread is not None or self._closed.is_set():
                return
            thread = self._thread = threading.Thread(
                target=self._run, name="openmeter_wsgi.visibility", daemon=True
            )
        try:
            thread.start()
        except RuntimeError as error:
            self._thread = None
            logger.error("%s: no thread can be started to look for accepted events; "
                         "quotas may be used up too early", error)  # fmt: skip

    def _run(self) -> None:
        sending = self._sending
        if sending is None:
            return
        # No request waits for the list, so its timeout is that of a delivery.
        events = event_list(self._policy, self._policy.request_timeout)
        try:
            while not self._closed.wait(INTERVAL):
                self._probe(sending, events)
        finally:
            events.close()
            with self._starting:
                self._thread = None

    def _probe(self, sending: Sending, events: EventList) -> None:
        """Ask for the oldest probes and move the mark, if this process sends."""
        if not sending.is_sender:
            return
        try:
            self._probes.close_group(sending.delivered_until())
            ids = self._probes.oldest_unlisted(self._max_ids)
            if ids and not self._uses_fixed_lag and not self._take_token():
                self._list_ids(events, ids)
            self._publish(sending)
        except Exception:
            logger.exception("%s: looking for accepted events failed and is tried "
                             "again in %g s", "visibility", INTERVAL)  # fmt: skip

    def _list_ids(self, events: EventList, ids: list[str]) -> None:
        """Ask for *ids* in the list of events; adapt to its errors."""
        try:
            self._probes.note_listed(events.listed(ids))
        except DeliveryError as error:
            if error.status in _NO_LIST:
                self._fall_back(error)
            elif error.status == 200:
                # The events are too large: ask for fewer of them.
                self._max_ids = max(self._max_ids // 2, 1)
            else:
                logger.warning(
                    "%s: OpenMeter does not list events now (status %s: %s); until it "
                    "does, quotas may be used up too early",
                    "visibility", error.status or "none", error.reason,
                )  # fmt: skip
        else:
            self._max_ids = min(self._max_ids * 2, MAX_IDS)

    def _fall_back(self, error: DeliveryError) -> None:
        """Use a fixed lag for some minutes: the list was refused."""
        self._fixed_lag_until = time.monotonic() + _RETRY_DELAY
        logger.warning(
            "%s: OpenMeter does not list events (status %s: %s); usage counts as "
            "visible visibility_lag=%g s after its delivery, and a quota may be "
            "overshot where that takes longer. Use a key that may list events",
            "visibility", error.status, error.reason, self._policy.visibility_lag,
        )  # fmt: skip

    @property
    def _uses_fixed_lag(self) -> bool:
        return time.monotonic() < self._fixed_lag_until

    def _compute_mark(self, sending: Sending) -> float:
        """Return the mark that follows from this process's delivery and probes."""
        fixed = self._fixed_lag.until()
        self._probes.close_group(sending.delivered_until())
        return fixed if self._uses_fixed_lag else self._probes.visible_until

    # -- The files of a spool

    def _publish(self, sending: Sending) -> None:
        """Write the mark, and the probes if they have changed."""
        directory = sending.directory
        if directory is None:
            return
        mark = self._compute_mark(sending)
        lag = self._policy.visibility_lag if self._uses_fixed_lag else self._probes.lag
        mark_file = _MarkFile(mark, time.time(), lag)
        state = msgspec.json.encode(self._probes.state())
        with contextlib.suppress(OSError):  # the spool logs a full disk
            if state != self._written_state:
                _write(directory / _PROBES, state)
                self._written_state = state
            _write(directory / _MARK, msgspec.json.encode(mark_file))


def _type_markers(policy: Policy) -> list[bytes]:
    """Return the JSON text that marks an event of each type that is counted down."""
    types = {counted.type for counted in policy.entitlement_meters.values()}
    return [b'"type":' + msgspec.json.encode(name) for name in types]


def _read(path: Path, kind: type[_Kind]) -> _Kind | None:
    """Return the decoded content of a file, None if it cannot be read."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        with open(os.open(path, flags), "rb") as file:
            return msgspec.json.decode(file.read(_MAX_FILE), type=kind)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def _write(path: Path, text: bytes) -> None:
    """Replace a file atomically.

    :raises OSError: if the file cannot be written.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    with contextlib.suppress(FileNotFoundError):
        unfinished.unlink()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(unfinished, flags, 0o600), "wb") as file:
        file.write(text)
    unfinished.rename(path)


def _contains_any(text: bytes, markers: Iterable[bytes]) -> bool:
    return any(marker in text for marker in markers)

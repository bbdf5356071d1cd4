"""Probes of visibility: the ids of accepted events that OpenMeter lists by now.

The sender tells of every accepted batch. A thread looks for a few of their ids in the
list, which shows what balances count, and moves the mark (see `quota.visibility`). With
a spool the mark is in a file, for all processes of the host.
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
from openmeter_wsgi.quota.visibility_mark import PROBES, FixedLag, Probes, State

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
#: A page of the list has no more.
MAX_IDS = 100
_MAX_ANSWER_BYTES = 1_048_576
#: The server has no such list, or this key may not read it.
_NO_LIST = {400, 401, 403, 404, 405, 501}


class EventList:
    """OpenMeter's list of events. Belongs to one thread at a time."""

    def __init__(self, *, url: str, key: ApiKey, timeout: float) -> None:
        self._url = url
        self._connection = Connection(
            key=key, timeout=timeout, max_answer_bytes=_MAX_ANSWER_BYTES
        )

    def listed(self, ids: Sequence[str]) -> set[str]:
        """Return those of *ids* that OpenMeter lists.

        :raises DeliveryError: if it says nothing that can be read.
        """
        wanted = msgspec.json.encode({"id": {"$in": ids}}).decode()
        path = _EVENTS.format(MAX_IDS, quote(wanted, safe=""))
        reply = self._connection.request("GET", self._url + path)
        listed = {item.event.id for item in decoded(reply, _Page).items}
        # The list trims ids that the rest of OpenMeter takes as they are.
        return {one for one in ids if one.strip() in listed}

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def event_list(policy: Policy, timeout: float) -> EventList:
    """Return the list of the server that answers about entitlements."""
    url = policy.entitlements_url or policy.api_url
    return EventList(url=url, key=policy.entitlements_key, timeout=timeout)


class Sending(Protocol):
    """A delivery, as far as the visibility of its events depends on it."""

    def delivered_until(self) -> float:
        """Return a moment (wall clock) before which all that was put is delivered."""

    @property
    def directory(self) -> Path | None:
        """The directory of the spool, None if events wait in memory."""

    @property
    def is_sender(self) -> bool:
        """True if this process sends what is put."""


class _Published(msgspec.Struct):
    """The mark as the sender of a spool writes it down."""

    until: float
    at: float
    lag: float


#: Seconds between two questions.
INTERVAL = 1.0
#: After so many seconds a list that was refused is asked for again.
_TRY_AGAIN = 600.0
_MARK, _PROBES = "visible_until.json", "probes.json"
#: A larger file is none of ours.
_MAX_FILE = 4_000_000


class Visibility:
    """The mark *visible until* of one process or, with a spool, of one host.

    Any thread. It does nothing before `follow` was called, and starts a thread with
    the first accepted batch.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._types = _markers(policy)
        self._probes = Probes(policy.max_visibility_lag)
        self._sending: Sending | None = None
        self._take_question: Callable[[], float] = lambda: 0.0
        self._fixed = FixedLag(lambda: 0.0, policy.visibility_lag)
        self._is_fixed_until = 0.0
        self._at_most = MAX_IDS
        self._published: _Published | None = None
        self._kept = b""
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()
        self._starting = threading.RLock()
        self._pid = os.getpid()

    def follow(self, sending: Sending, take_question: Callable[[], float]) -> None:
        """Watch what *sending* delivers; *take_question* takes a token."""
        self._sending = sending
        self._take_question = take_question
        self._fixed = FixedLag(sending.delivered_until, self._policy.visibility_lag)

    # -- From the ledger

    def until(self) -> float:
        """Return the mark, and let the thread run if it is needed."""
        sending = self._sending
        if sending is None:
            return 0.0
        self._closed.clear()
        if sending.directory is None:
            return self._own_mark(sending)
        if sending.is_sender:
            self._start()
        self._published = _read(sending.directory / _MARK, _Published)
        fixed = self._fixed.until()
        if self._published is None:
            return fixed
        if time.time() - self._published.at > self._policy.max_visibility_lag:
            return fixed  # the sender does not write it
        return min(self._published.until, sending.delivered_until())

    @property
    def lag(self) -> float:
        """The seconds that usage takes at present to become visible."""
        if (published := self._published) is not None:
            return published.lag
        return self._policy.visibility_lag if self._is_fixed else self._probes.lag

    # -- From the sender

    def accepted(self, batch: Batch) -> None:
        """Remember some ids of a batch that OpenMeter has accepted. Never raises."""
        try:
            if not any(_holds(text, self._types) for text in batch.texts):
                return
            count = len(batch)
            places = {round(n * (count - 1) / (PROBES - 1)) for n in range(PROBES)}
            self._probes.accepted(
                [msgspec.json.decode(batch[n], type=_Event).id for n in sorted(places)]
            )
        except Exception:
            logger.exception("%s: a batch is not looked for", "visibility")
        self._start()

    def elected(self) -> None:
        """Note that this process begins to send what is in the spool.

        It goes on looking for what the last sender was looking for; after `close` not
        before the mark is asked for again.
        """
        directory = self._sending.directory if self._sending is not None else None
        if directory is not None:
            state = _read(directory / _PROBES, State)
            self._probes = Probes(self._policy.max_visibility_lag)
            if state is not None:
                self._probes.restore(state)
        self._start()

    def ended(self) -> None:
        """Let the next sender of the spool know what this one was looking for."""
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
            logger.error("%s: no thread can be started to see what is visible", error)

    def _run(self) -> None:
        sending = self._sending
        if sending is None:
            return
        # Nobody waits for it, so it may take longer than a question.
        events = event_list(self._policy, self._policy.request_timeout)
        try:
            while not self._closed.wait(INTERVAL):
                self._look(sending, events)
        finally:
            events.close()
            with self._starting:
                self._thread = None

    def _look(self, sending: Sending, events: EventList) -> None:
        """Move the mark as far as the list shows, if this process sends."""
        if not sending.is_sender:
            return
        try:
            self._probes.mark(sending.delivered_until())
            ids = self._probes.due(self._at_most)
            if ids and not self._is_fixed and not self._take_question():
                self._ask(events, ids)
            self._publish(sending)
        except Exception:
            logger.exception("%s: could not be looked for and is soon again",
                             "visibility")  # fmt: skip

    def _ask(self, events: EventList, ids: list[str]) -> None:
        try:
            self._probes.seen(events.listed(ids))
        except DeliveryError as error:
            if error.status in _NO_LIST:
                self._fall_back(error)
            elif error.status == 200:
                # Events are so large that fewer of them fit into an answer.
                self._at_most = max(self._at_most // 2, 1)
            else:
                logger.warning(
                    "%s: OpenMeter does not list events now (status %s: %s); quotas "
                    "wait for it, for max_visibility_lag at most",
                    "visibility", error.status or "none", error.reason,
                )  # fmt: skip
        else:
            self._at_most = min(self._at_most * 2, MAX_IDS)

    def _fall_back(self, error: DeliveryError) -> None:
        self._is_fixed_until = time.monotonic() + _TRY_AGAIN
        logger.warning(
            "%s: OpenMeter does not list events (status %s: %s); usage counts as "
            "visible visibility_lag=%g s after its delivery, and a quota may be "
            "overshot where that takes longer. Use a key that may list events",
            "visibility", error.status, error.reason, self._policy.visibility_lag,
        )  # fmt: skip

    @property
    def _is_fixed(self) -> bool:
        return time.monotonic() < self._is_fixed_until

    def _own_mark(self, sending: Sending) -> float:
        """Return the mark of this process's own delivery."""
        fixed = self._fixed.until()
        self._probes.mark(sending.delivered_until())
        return fixed if self._is_fixed else self._probes.visible_until

    # -- The files of a spool

    def _publish(self, sending: Sending) -> None:
        directory = sending.directory
        if directory is None:
            return
        mark = self._own_mark(sending)
        lag = self._policy.visibility_lag if self._is_fixed else self._probes.lag
        published = _Published(mark, time.time(), lag)
        state = msgspec.json.encode(self._probes.state())
        with contextlib.suppress(OSError):  # of a full disk the log tells
            if state != self._kept:
                _write(directory / _PROBES, state)
                self._kept = state
            _write(directory / _MARK, msgspec.json.encode(published))


def _markers(policy: Policy) -> list[bytes]:
    """Return what is in each event of a type that is counted down."""
    types = {counted.type for counted in policy.entitlement_meters.values()}
    return [b'"type":' + msgspec.json.encode(one) for one in types]


def _read(path: Path, kind: type[_Kind]) -> _Kind | None:
    """Return what is in a file, None if there is nothing that can be read."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        with open(os.open(path, flags), "rb") as file:
            return msgspec.json.decode(file.read(_MAX_FILE), type=kind)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def _write(path: Path, text: bytes) -> None:
    """Replace a file.

    :raises OSError: if the directory does not take it.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    with contextlib.suppress(FileNotFoundError):
        unfinished.unlink()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(unfinished, flags, 0o600), "wb") as file:
        file.write(text)
    unfinished.rename(path)


def _holds(text: bytes, markers: Iterable[bytes]) -> bool:
    return any(marker in text for marker in markers)

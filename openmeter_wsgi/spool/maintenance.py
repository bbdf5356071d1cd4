"""The maintenance of a journal: it prepares segments and forces them on the disk."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Final

from openmeter_wsgi import log
from openmeter_wsgi.errors import SpoolError
from openmeter_wsgi.spool.files import NoFile, open_file, read_name, whole_end
from openmeter_wsgi.spool.progress import is_synced, sync_directory
from openmeter_wsgi.spool.watermark import Watermark
from openmeter_wsgi.threads import Wakeup

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from openmeter_wsgi.spool.files import SegmentName
    from openmeter_wsgi.spool.writer import SpoolWriter

#: By making this file a process asks the sender to deliver now.
FLUSH = "flush"

logger: Final = log.get_logger(__name__)

#: Seconds between two looks while events come.
_LOOK_INTERVAL = 1.0


class SegmentMaintenance:
    """A thread that keeps the segments of a process; in the sender's it syncs them all.

    Not the sender's thread: that one may wait seconds for an answer. While events come
    it looks each second whether what the process owns is still there; without them,
    and in a process that is not the sender, it sleeps without a timeout.
    """

    def __init__(
        self,
        directory: Path,
        writer: SpoolWriter,
        *,
        hurry: Callable[[], None],
        tend: Callable[[], None],
        interval: float,
    ) -> None:
        self._directory = directory
        self._writer = writer
        self._hurry = hurry
        #: Called at each look: to see whether the sender, here or elsewhere, is well.
        self._tend = tend
        self._interval = interval
        self._wakeup = Wakeup()
        self._thread: threading.Thread | None = None
        self._elected = False
        #: The end of the part of each segment that is on the disk, by its key.
        self._synced: dict[str, int] = {}
        #: The keys of segments that are on the disk as a whole and do not grow.
        self._settled: set[str] = set()
        self._names: set[str] = set()
        self._watermark = Watermark(directory)

    def start(self) -> None:
        """Start the thread. Without one, writers prepare segments themselves."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, name="openmeter_wsgi.journal", daemon=True
            )
            try:
                self._thread.start()
            except RuntimeError:  # no more threads, or the interpreter shuts down
                self._thread = None

    def close(self, timeout: float = 0) -> None:
        """End the thread, and wait up to *timeout* seconds for it.

        If the process ends first, a segment that the thread is making stays behind.
        """
        thread, self._thread = self._thread, None
        self._wakeup.set()
        if timeout and thread not in {None, threading.current_thread()}:
            thread.join(timeout)

    def wake(self) -> None:
        """Let the thread look whether a segment is to be prepared."""
        self._wakeup.set()

    @property
    def elected(self) -> bool:
        """True if this process is the directory's sender."""
        return self._elected

    @elected.setter
    def elected(self, elected: bool) -> None:
        self._elected = elected
        self._wakeup.set()

    def _run(self) -> None:
        interval: float | None = None
        while self._thread is threading.current_thread():
            self._wakeup.wait(self._interval if self._elected else interval)
            if self._thread is threading.current_thread():
                self._turn()
                interval = _LOOK_INTERVAL if self._writer.has_moved() else None
                if interval is None:
                    self._writer.rest()

    def _turn(self) -> None:
        try:
            self._writer.look()
            self._writer.prepare()
            self._writer.touch()
            self._tend()
            if self._elected:
                self.look()
        except SpoolError as error:
            logger.warning(
                "%s: the next segment cannot be made; events go into the current one "
                "until it is full, then into memory",
                error,
            )
        except OSError as error:
            logger.warning(
                "%s: the spool cannot be forced on the disk; until it can, a loss of "
                "power costs more than one flush_interval",
                error,
            )
        except Exception:
            logger.exception("%s: its maintenance failed and goes on", "journal")

    def look(self) -> None:
        """See who asks for delivery; bring on the disk what was put.

        From then on it survives a loss of power. Say how far all is delivered.
        """
        moment = self._watermark.begin_look()
        entries = os.listdir(self._directory)
        if FLUSH in entries:
            (self._directory / FLUSH).unlink(missing_ok=True)
            self._hurry()
        names = {entry: name for entry in entries if (name := read_name(entry))}
        missed = [entry for entry, name in names.items() if not self._sync(entry, name)]
        if names.keys() != self._names:
            self._names = set(names)
            keys = {name.key for name in names.values()}
            self._synced = {k: v for k, v in self._synced.items() if k in keys}
            self._settled &= keys
            sync_directory(self._directory)
        if moment is not None and not missed:
            self._watermark.publish(moment, dict(self._synced))

    def _sync(self, entry: str, name: SegmentName) -> bool:
        """Bring one segment on the disk; False if it cannot be found any more."""
        if name.key in self._settled:
            return True
        try:
            fd = open_file(self._directory / entry)
        except FileNotFoundError:  # sealed or delivered meanwhile
            return False
        except NoFile:
            return True  # there is nothing in it
        try:
            synced = self._synced.get(name.key, 0)
            end = whole_end(fd, synced)
            if end > synced:
                is_synced(fd)
                self._synced[name.key] = end
            if name.sealed:
                self._settled.add(name.key)
        finally:
            os.close(fd)
        return True

"""The maintenance thread of a spool: it prepares segments and syncs them to disk."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Final

from openmeter_wsgi import log
from openmeter_wsgi.errors import SpoolError
from openmeter_wsgi.spool.files import NotAFile, open_file, read_name, whole_end
from openmeter_wsgi.spool.progress import sync_directory, try_sync
from openmeter_wsgi.spool.watermark import Watermark
from openmeter_wsgi.threads import Wakeup

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from openmeter_wsgi.spool.files import SegmentName
    from openmeter_wsgi.spool.writer import SpoolWriter

#: The name of a file by which a process asks the sender to deliver now.
FLUSH = "flush"

logger: Final = log.get_logger(__name__)

#: Seconds between two rounds of work while events come.
_CHECK_INTERVAL = 1.0


class SegmentMaintenance:
    """A thread that prepares and checks the segments of a process.

    In the sender's process it also syncs the segments of all processes. It is not the
    sender's thread, which may wait seconds for an answer. While events come it works
    every second. Without events it sleeps without a timeout, unless this process is the
    sender.
    """

    def __init__(
        self,
        directory: Path,
        writer: SpoolWriter,
        *,
        hurry: Callable[[], None],
        supervise: Callable[[], None],
        interval: float,
    ) -> None:
        self._directory = directory
        self._writer = writer
        self._hurry = hurry
        #: Called in each round: checks the sender, here or in another process.
        self._supervise = supervise
        self._interval = interval
        self._wakeup = Wakeup()
        self._thread: threading.Thread | None = None
        self._elected = False
        #: The end of the synced lines of each segment, by its key.
        self._synced: dict[str, int] = {}
        #: The keys of sealed segments that are completely synced.
        self._complete: set[str] = set()
        #: The file names at the last sync of the directory.
        self._names: set[str] = set()
        self._watermark = Watermark(directory)

    def start(self) -> None:
        """Start the thread. Without it, writers prepare segments themselves."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, name="openmeter_wsgi.journal", daemon=True
            )
            try:
                self._thread.start()
            except RuntimeError:  # the limit of threads, or the interpreter shuts down
                self._thread = None

    def close(self, timeout: float = 0) -> None:
        """End the thread, and wait up to *timeout* seconds for it.

        If the process ends before the thread, it may leave an unfinished segment.
        """
        thread, self._thread = self._thread, None
        self._wakeup.set()
        if timeout and thread not in {None, threading.current_thread()}:
            thread.join(timeout)

    def wake(self) -> None:
        """Make the thread do a round of work."""
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
                self._work()
                interval = _CHECK_INTERVAL if self._writer.is_active() else None
                if interval is None:
                    self._writer.make_next_put_slow()

    def _work(self) -> None:
        """Do one round of work. Never raises an Exception."""
        try:
            self._writer.check_files()
            self._writer.prepare()
            self._writer.touch()
            self._supervise()
            if self._elected:
                self._sync_all()
        except SpoolError as error:
            logger.warning(
                "%s: the next segment cannot be made; events go into the current "
                "segment until it is full, then into memory",
                error,
            )
        except OSError as error:
            logger.warning(
                "%s: the spool cannot be synced to the disk; all events are kept, but "
                "until it can, a loss of power loses more than one flush_interval",
                error,
            )
        except Exception:
            logger.exception(
                "%s: its maintenance failed and goes on; all events are kept",
                "journal",
            )

    def _sync_all(self) -> None:
        """Sync all segments, publish the watermark and handle a request to flush.

        Synced events survive a loss of power.
        """
        moment = self._watermark.begin_mark()
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
            self._complete &= keys
            sync_directory(self._directory)
        if moment is not None and not missed:
            self._watermark.publish(moment, dict(self._synced))

    def _sync(self, entry: str, name: SegmentName) -> bool:
        """Sync one segment; return False if its name has changed or is gone."""
        if name.key in self._complete:
            return True
        try:
            fd = open_file(self._directory / entry)
        except FileNotFoundError:  # sealed or delivered meanwhile
            return False
        except NotAFile:
            return True  # no segment, so it holds no events
        try:
            synced = self._synced.get(name.key, 0)
            end = whole_end(fd, synced)
            if end > synced:
                try_sync(fd)
                self._synced[name.key] = end
            if name.sealed:
                self._complete.add(name.key)
        finally:
            os.close(fd)
        return True

"""Threads: their kind in this process, a way to wake one, and exit hooks."""

from __future__ import annotations

import atexit
import contextlib
import sys
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

#: The first version of uWSGI in which threads always run.
_ALWAYS_THREADED = (2, 0, 27)
#: The options of an older uWSGI that make threads run.
_OPTIONS = ("enable-threads", "threads")
#: Values of these options that switch them off.
_NO = (False, None, b"false", b"no", b"off", b"0")


def threads_are_greenlets() -> bool:
    """Return True if gevent has replaced the threads by greenlets."""
    # Monkey-patched: the locks of threading are no longer those of the interpreter.
    return type(threading.Lock()).__module__ != "_thread"


def threads_starve() -> bool:
    """Return True if a thread of this process runs only while a request is served.

    An older uWSGI without `enable-threads` keeps the GIL while a worker is idle. A
    thread that holds a lock at that moment keeps it until the next request, or for
    ever.
    """
    # The server itself makes this module. It cannot be imported elsewhere.
    uwsgi: Any = sys.modules.get("uwsgi")
    options = getattr(uwsgi, "opt", None)
    version = getattr(uwsgi, "version_info", None)
    if not isinstance(options, dict) or not isinstance(version, tuple):
        return False
    if version[:3] >= _ALWAYS_THREADED or threads_are_greenlets():
        return False
    return all(_option(options, name) in _NO for name in _OPTIONS)


def _option(options: dict[Any, Any], name: str) -> object:
    # The name is text or bytes, depending on the version; the value is True or bytes.
    return options.get(name, options.get(name.encode()))


#: The priority of our finalizers, which run before those of multiprocessing itself.
_PRIORITY = 100


def ends_without_hooks(environ: Mapping[str, Any]) -> bool:
    """Return True if the process that serves a request ends without exit hooks.

    Werkzeug with ``processes=`` forks for each request, and the child calls `os._exit`.
    """
    server = str(environ.get("SERVER_SOFTWARE", ""))
    return bool(environ.get("wsgi.multiprocess")) and server.startswith("Werkzeug/")


class ExitHook:
    """A call of *close* at the end of the process, as long as it has a user.

    A process of multiprocessing does not run the functions of `atexit`, but finalizers
    of its own. A terminated process runs neither.
    """

    def __init__(self, close: Callable[[], None]) -> None:
        self._close = close
        self._calls_after: list[Callable[[], None]] = []
        #: The ids of the objects that need the hook.
        self._users: set[int] = set()
        self._finalizer: Any = None

    def run(self) -> None:
        """Run the hook: call *close*, then the calls of `add`."""
        self._close()
        for call in self._calls_after:
            call()

    def add(self, call: Callable[[], None]) -> None:
        """Call *call* at the end of the process, after *close*."""
        self._calls_after.append(call)
        self.register(call)

    def register(self, user: object) -> None:
        """Run the hook at the end of the process, for *user*. May be repeated."""
        if not self._users:
            atexit.register(self.run)
            self._finalizer = _new_finalizer(self.run)
        self._users.add(id(user))

    def clear(self) -> None:
        """Do not run the hook, for any user."""
        self._users = {id(self)}
        self.unregister(self)

    def unregister(self, user: object) -> None:
        """Remove *user*. Without users the hook does not run."""
        self._users.discard(id(user))
        if not self._users:
            atexit.unregister(self.run)
            finalizer, self._finalizer = self._finalizer, None
            if finalizer is not None:
                finalizer.cancel()


def _new_finalizer(call: Callable[[], None]) -> Any:
    """Return a finalizer in a child of multiprocessing, None in other processes."""
    process: Any = sys.modules.get("multiprocessing.process")
    util: Any = sys.modules.get("multiprocessing.util")
    if util is None or process is None or process.parent_process() is None:
        return None
    return util.Finalize(None, call, exitpriority=_PRIORITY)


class Wakeup:
    """An event that wakes one thread. `set` never waits: it may run in a finaliser.

    `threading.Event.set` takes a lock. Called by a finaliser that interrupts another
    `set`, it would wait for itself.
    """

    __slots__ = ("_unset",)

    def __init__(self) -> None:
        self._unset = threading.Lock()
        self._unset.acquire()

    def set(self) -> None:
        """Wake the waiting thread, or else the next thread that waits."""
        with contextlib.suppress(RuntimeError):  # it is set already
            self._unset.release()

    def clear(self) -> None:
        """Forget an earlier `set`."""
        self._unset.acquire(blocking=False)

    def wait(self, timeout: float | None) -> None:
        """Wait for a `set`, at most until the timeout, and clear it."""
        self._unset.acquire(timeout=-1 if timeout is None else timeout)

"""The threads of this process, and the hooks that run when it ends."""

from __future__ import annotations

import atexit
import contextlib
import sys
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

#: From this version on uWSGI lets threads run without being told to.
_ALWAYS_THREADED = (2, 0, 27)
#: Each of these options of uWSGI does, too.
_OPTIONS = ("enable-threads", "threads")
_NO = (False, None, b"false", b"no", b"off", b"0")


def threads_are_greenlets() -> bool:
    """Return True if gevent has taken the place of threads."""
    # Monkey-patched: the lock that threading makes is no longer the interpreter's.
    return type(threading.Lock()).__module__ != "_thread"


def threads_starve() -> bool:
    """Return True if a thread of this process runs only while a request is served.

    An older uWSGI without `enable-threads` keeps the GIL while a worker is idle. A
    lock that a thread holds then is held until the next request, or for ever.
    """
    # Made by the server itself: it can be imported nowhere else.
    uwsgi: Any = sys.modules.get("uwsgi")
    options = getattr(uwsgi, "opt", None)
    version = getattr(uwsgi, "version_info", None)
    if not isinstance(options, dict) or not isinstance(version, tuple):
        return False
    if version[:3] >= _ALWAYS_THREADED or threads_are_greenlets():
        return False
    return all(_said(options, name) in _NO for name in _OPTIONS)


def _said(options: dict[Any, Any], name: str) -> object:
    # Under the name as text or as bytes, by version; the value is True or bytes.
    return options.get(name, options.get(name.encode()))


#: The priority of our finalizers: before what multiprocessing itself tears down.
_PRIORITY = 100


def ends_without_hooks(environ: Mapping[str, Any]) -> bool:
    """Return True if the process that serves a request ends without any exit hook.

    Werkzeug with ``processes=`` forks for each request; the child ends by `os._exit`.
    """
    server = str(environ.get("SERVER_SOFTWARE", ""))
    return bool(environ.get("wsgi.multiprocess")) and server.startswith("Werkzeug/")


class ExitHook:
    """Calls *close* when the process ends, as long as somebody has registered it.

    A process of multiprocessing ends without what `atexit` knows, but with finalizers
    of its own. One that is terminated ends without either.
    """

    def __init__(self, close: Callable[[], None]) -> None:
        self._close = close
        self._after: list[Callable[[], None]] = []
        self._users: set[int] = set()
        self._finalizer: Any = None

    def end(self) -> None:
        """Close, and make the calls that come after it."""
        self._close()
        for call in self._after:
            call()

    def add(self, call: Callable[[], None]) -> None:
        """Have *call* made at the end of the process, after it was closed."""
        self._after.append(call)
        self.register(call)

    def register(self, user: object) -> None:
        """Have it called for *user*. May be repeated."""
        if not self._users:
            atexit.register(self.end)
            self._finalizer = _finalizer(self.end)
        self._users.add(id(user))

    def clear(self) -> None:
        """Have nothing called any more."""
        self._users = {id(self)}
        self.unregister(self)

    def unregister(self, user: object) -> None:
        """Have it called no more, unless others have registered it, too."""
        self._users.discard(id(user))
        if not self._users:
            atexit.unregister(self.end)
            finalizer, self._finalizer = self._finalizer, None
            if finalizer is not None:
                finalizer.cancel()


def _finalizer(close: Callable[[], None]) -> Any:
    """Have *close* called at the end of a child of multiprocessing; None elsewhere."""
    process: Any = sys.modules.get("multiprocessing.process")
    util: Any = sys.modules.get("multiprocessing.util")
    if util is None or process is None or process.parent_process() is None:
        return None
    return util.Finalize(None, close, exitpriority=_PRIORITY)


class Wakeup:
    """Wakes one thread. Its `set` waits for nothing, so it may interrupt itself.

    The `set` of a threading.Event takes a lock: called by a finaliser in the middle
    of another `set`, it would wait for itself.
    """

    __slots__ = ("_unset",)

    def __init__(self) -> None:
        self._unset = threading.Lock()
        self._unset.acquire()

    def set(self) -> None:
        """Let the thread that waits, or else the next that does, go on."""
        with contextlib.suppress(RuntimeError):  # it is set already
            self._unset.release()

    def clear(self) -> None:
        """Forget a `set` that nobody waited for."""
        self._unset.acquire(blocking=False)

    def wait(self, timeout: float | None) -> None:
        """Wait until it is set or the time is over, and clear it."""
        self._unset.acquire(timeout=-1 if timeout is None else timeout)

"""SQLite while its process forks: nobody is within it, and no file is open.

A child that is made while another thread is within SQLite finds mutexes of its
library taken for ever. And SQLite keeps account of the locks on a file by process: a
child would take those of its parent for its own (https://www.sqlite.org/howtocorrupt.html,
2.6). A fork made in C runs no hook: whoever forks so does it before the first request,
as servers do.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol


class UsesSqlite(Protocol):
    """What is told of forks."""

    def before_fork(self) -> bool:
        """Keep everybody out until `after_fork`; say whether that was possible.

        It must not wait for long.
        """

    def after_fork(self) -> None:
        """Let others in again; called in parent and child."""


# A set that one call copies, where a WeakSet would be iterated step by step.
_users: set[weakref.ref[UsesSqlite]] = set()
#: Who is kept out, by the thread that forks.
_paused: dict[int, list[UsesSqlite]] = {}


def tell_of_forks(user: UsesSqlite) -> None:
    """Tell *user* of every fork, for as long as it lives."""
    _users.add(weakref.ref(user, _users.discard))


def _before() -> None:
    users = [user for reference in tuple(_users) if (user := reference())]
    _paused[threading.get_ident()] = [user for user in users if user.before_fork()]


def _after() -> None:
    for user in _paused.pop(threading.get_ident(), ()):
        user.after_fork()


os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after)

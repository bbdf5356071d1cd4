"""The directories in a spool: each server, an address and an API version, has its own.

A directory is named after its server, and its events go to no other one. The process of
a server also delivers the directories that ``openmeter-wsgi spool assign`` has given to
it, and the files that an earlier version of this package has left in ``spool_dir``.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple
from urllib.parse import urlsplit

import msgspec

from openmeter_wsgi import log
from openmeter_wsgi.errors import SpoolError
from openmeter_wsgi.lock import (
    election,
    has_live_owner,
    is_in_use,
    key_mark,
    owner_of_lock,
)
from openmeter_wsgi.spool import watermark
from openmeter_wsgi.spool.dead_letters import DEAD_LETTERS, UNREADABLE
from openmeter_wsgi.spool.files import (
    prepare_directory,
    read_document,
    read_name,
    write_document,
)
from openmeter_wsgi.spool.progress import sync_directory
from openmeter_wsgi.stats import Problem

if TYPE_CHECKING:
    from collections.abc import Callable

    from openmeter_wsgi.options import ApiKey
    from openmeter_wsgi.policy import Policy

logger: Final = log.get_logger(__name__)

SERVER_NAME = "server.json"
#: Between the name of a server and that of the directory that was assigned to it.
_FROM = "+from-"
_DIRECTORY = re.compile(r"[a-z0-9._-]+-[0-9a-f]{8}(\+from-.+)?")
_DEFAULT_PORTS = {"http": 80, "https": 443}
#: The readable part of a directory's name is not longer.
_MAX_NAME = 80


class Server(msgspec.Struct, frozen=True):
    """A server that events are sent to."""

    api_url: str
    api_flavor: str = "v1"

    @property
    def directory_name(self) -> str:
        """The name of its directory: readable, and different for each server."""
        parts = urlsplit(self.api_url)
        host = (parts.hostname or "").lower()
        port = parts.port if parts.port != _DEFAULT_PORTS.get(parts.scheme) else None
        path = parts.path.rstrip("/")
        address = f"{parts.scheme}://{host}:{port} {path} {self.api_flavor}"
        short = hashlib.blake2b(address.encode(), digest_size=4).hexdigest()
        said = [host, str(port or ""), *path.split("/"), self.api_flavor]
        words = [re.sub(r"[^a-z0-9.]+", "-", word.lower()).strip("-.") for word in said]
        return f"{'-'.join(filter(None, words))[:_MAX_NAME]}-{short}"


def server_directory(root: str | Path, server: Server) -> Path:
    """Return the directory of *server* in the spool at *root*."""
    return Path(os.path.abspath(root)) / server.directory_name


def prepare_server_directory(root: str | Path, server: Server) -> Path:
    """Make the directory of *server* in the spool at *root*, and check both.

    :raises ConfigError: if it cannot hold a spool, or others could write into it.
    """
    prepare_directory(str(root))
    directory = prepare_directory(str(server_directory(root, server)))
    name_server(directory, server)
    return directory


def name_server(directory: Path, server: Server) -> None:
    """Record the server of a directory, unless the file is there."""
    if not (directory / SERVER_NAME).exists():
        with contextlib.suppress(OSError):  # the name of the directory says it, too
            write_document(directory / SERVER_NAME, server)


def server_of_policy(policy: Policy) -> Server:
    """Return the server that a policy sends events to."""
    return Server(policy.api_url, policy.api_flavor)


def server_of(directory: Path) -> Server | None:
    """Return the server that a directory's events go to.

    None: no file says it, or an earlier version has left them, and they go to the
    server of the process that finds them.
    """
    own = directory.parent / directory.name.partition(_FROM)[0]
    return read_document(own / SERVER_NAME, Server)


def spool_directories(root: Path) -> list[Path]:
    """Return all directories of a spool that hold events or could.

    The spool's own directory is one if an earlier version has left files in it.
    """
    with os.scandir(root) as entries:
        found = sorted(
            root / entry.name
            for entry in entries
            if _DIRECTORY.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
        )
    return [*([root] if _is_of_earlier_version(root) else []), *found]


def _is_of_earlier_version(root: Path) -> bool:
    kept = (root / name for name in (DEAD_LETTERS, UNREADABLE))
    return has_segments(root) or any(path.exists() for path in kept)


def has_segments(directory: Path) -> bool:
    """Return True if a directory holds segments."""
    try:
        return any(map(read_name, os.listdir(directory)))
    except OSError:
        return False


def inherited_directories(root: Path, server: Server) -> list[Path]:
    """Return the directories whose events *server* gets besides those of its own."""
    prefix = server.directory_name + _FROM
    try:
        names = sorted(n for n in os.listdir(root) if n.startswith(prefix))
    except OSError:
        return []
    return [path for path in (root, *(root / n for n in names)) if has_segments(path)]


def remove_if_drained(directory: Path) -> None:
    """Remove an assigned directory in which no event and no dead letter is left."""
    kept = (directory / name for name in (DEAD_LETTERS, UNREADABLE))
    with contextlib.suppress(OSError), election(directory, wait=False) as won:
        if won and not has_segments(directory) and not any(p.exists() for p in kept):
            shutil.rmtree(directory)


class Orphan(NamedTuple):
    """A directory with events that no running process delivers."""

    directory: Path
    server: Server | None
    events: int

    @property
    def address(self) -> str:
        """The server's address, or else the name of the directory."""
        return self.server.api_url if self.server else self.directory.name


def orphans(root: Path, *, but: Server | None = None) -> list[Orphan]:
    """Return the directories of servers, *but* one, that no running process uses."""
    found = []
    for directory in spool_directories(root):
        own = root / directory.name.partition(_FROM)[0]
        is_ours = but is not None and own.name == but.directory_name
        if directory == root or is_ours or is_in_use(own) or is_in_use(directory):
            continue
        if events := watermark.backlog(directory).events:
            found.append(Orphan(directory, server_of(directory), events))
    return found


def assign(directory: Path, server: Server) -> Path:
    """Give the events of a directory to another *server*; return its new path.

    One `rename`: at every moment they belong to exactly one server, with all that is
    known of their delivery.

    :raises SpoolError: if a process uses the directory.
    """
    root = directory.parent
    origin = directory.name.rpartition(_FROM)[2]
    prepare_server_directory(root, server)
    with election(directory, wait=False) as won:
        if won is None or has_live_owner(directory):
            raise SpoolError(f"{directory}: a running process uses it")
        name = server.directory_name + _FROM + origin
        while (target := root / name).exists():
            name = f"{server.directory_name}{_FROM}{time.time_ns()}-{origin}"
        directory.rename(target)
        if has_live_owner(target):  # it began between the look and the rename
            target.rename(directory)
            raise SpoolError(f"{directory}: a process that has just begun uses it")
        sync_directory(root)
    return target


#: Says which key the sender of a directory uses.
SENDER_KEY = "sender.key"
#: Seconds between two looks at the keys of others.
_KEY_INTERVAL = 1.0
#: A key that another process wrote down longer than so many seconds before this one
#: got its own may have been replaced: it is written again while events come.
_KEY_AGE = 5.0


class KeyWatch:
    """Notices that another running process sends to the same server with another key.

    Each process writes a salted hash of its key into the file of its lock, the sender
    also into a file of the directory. A key that a dead process had says nothing. Only
    the sender learns by a 401 that a key was replaced, so the others read theirs again
    before they report anything.
    """

    def __init__(self, directory: Path, server: Server, key: ApiKey) -> None:
        self._directory = directory
        self._server = server
        self._key = key
        self._key_text: str | None = None
        self._mark = ""
        self._changed_at = 0.0
        self._sender_mark: str | None = None
        self._due_at = 0.0
        #: The problem now, None if none is known.
        self.problem: Problem | None = None

    def look(
        self,
        token: str | None,
        write: Callable[[str], None],
        *,
        is_sender: bool,
        is_waiting: bool,
    ) -> None:
        """Write down the key of this process, and compare it with those of others.

        *token* is that of its lock, into which *write* writes.

        :raises OSError: if the directory cannot be read.
        """
        if time.monotonic() < self._due_at:
            return
        self._due_at = time.monotonic() + _KEY_INTERVAL
        differs = self._differs(token, is_waiting=is_waiting)
        if differs and not is_sender:
            with contextlib.suppress(ValueError):
                self._key.renew()
            differs = self._differs(token, is_waiting=is_waiting)
        write(self._mark)
        self._write_as_sender(is_sender=is_sender)
        self._note(differs)

    def _differs(self, token: str | None, *, is_waiting: bool) -> bool:
        try:
            text = self._key.current()
        except ValueError:  # the sender says so
            text = None
        if text != self._key_text:
            self._key_text = text
            self._mark = _new_mark(text) if text else ""
            self._changed_at = time.time()
        if not text:
            return False
        others = self._marks_of_others(token, is_waiting=is_waiting)
        return any(_differs(mark, text) for mark in others)

    def _write_as_sender(self, *, is_sender: bool) -> None:
        path = self._directory / SENDER_KEY
        if not is_sender:
            self._sender_mark = None
        elif self._sender_mark != self._mark or not path.exists():
            write_document(path, self._mark)
            self._sender_mark = self._mark
        else:
            os.utime(path)

    def _marks_of_others(self, token: str | None, *, is_waiting: bool) -> list[str]:
        found = []
        since = self._changed_at - _KEY_AGE
        path = self._directory / SENDER_KEY
        # Who waits is not the sender: another process is.
        if is_waiting and path.exists() and path.stat().st_mtime >= since:
            found.append(read_document(path, str) or "")
        for entry in os.listdir(self._directory):
            owner = owner_of_lock(entry)
            if owner is not None and owner != token:
                found.append(key_mark(self._directory, owner, since=since))
        return found

    def _note(self, differs: bool) -> None:
        if differs == (self.problem is not None):
            return
        if not differs:
            self.problem = None
            logger.warning(
                "%s: all running processes that use it have the same api_key again",
                self._directory, extra=log.OVER,
            )  # fmt: skip
            return
        self.problem = Problem(
            "two_keys",
            f"another running process sends to {self._server.api_url} from the same "
            "spool with another api_key: all events of both go out under the key of "
            "the one that delivers; give both the same api_key, or each its own "
            "spool_dir",
        )
        logger.error("%s: %s", self._directory, self.problem.text)


def forget_sender_key(directory: Path) -> None:
    """Forget the key of an earlier sender."""
    with contextlib.suppress(OSError):
        (directory / SENDER_KEY).unlink(missing_ok=True)


def _new_mark(key: str) -> str:
    salt = secrets.token_hex(8)
    return f"{salt} {_hash(key, salt)}"


def _hash(key: str, salt: str) -> str:
    digest = hashlib.blake2b(key.encode(), salt=salt.encode(), digest_size=16)
    return digest.hexdigest()


def _differs(mark: str, key: str) -> bool:
    """Return True if a mark is that of another key; an empty one says nothing."""
    salt, _, digest = mark.strip().partition(" ")
    return len(salt) == 16 and bool(digest) and digest != _hash(key, salt)

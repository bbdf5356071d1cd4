"""The directories in a spool: one for each server, that is, address and API version.

A directory is named after its server, and its events go to this server only. The
process that delivers it also delivers *inherited* directories: those assigned to the
server by ``openmeter-wsgi spool assign``, and the files that an earlier version of this
package has left in ``spool_dir``. A directory with events that no running process uses
is an *orphan*. `KeyWatch` reports processes with different API keys.
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
#: Separates the name of a server from the name of a directory assigned to it.
_FROM = "+from-"
_DIRECTORY = re.compile(r"[a-z0-9._-]+-[0-9a-f]{8}(\+from-.+)?")
_DEFAULT_PORTS = {"http": 80, "https": 443}
#: Maximum length of the readable part of a directory's name.
_MAX_NAME = 80


class Server(msgspec.Struct, frozen=True):
    """A server to which events are sent."""

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
        pieces = [host, str(port or ""), *path.split("/"), self.api_flavor]
        words = [re.sub(r"[^a-z0-9.]+", "-", p.lower()).strip("-.") for p in pieces]
        return f"{'-'.join(filter(None, words))[:_MAX_NAME]}-{short}"


def server_directory(root: str | Path, server: Server) -> Path:
    """Return the directory of *server* in the spool at *root*."""
    return Path(os.path.abspath(root)) / server.directory_name


def prepare_server_directory(root: str | Path, server: Server) -> Path:
    """Make the directory of *server* in the spool at *root*, and check both.

    :raises ConfigError: if it cannot hold a spool, or other users can write into it.
    """
    prepare_directory(str(root))
    directory = prepare_directory(str(server_directory(root, server)))
    name_server(directory, server)
    return directory


def name_server(directory: Path, server: Server) -> None:
    """Write the server of a directory into a file, unless the file exists."""
    if not (directory / SERVER_NAME).exists():
        with contextlib.suppress(OSError):  # the directory's name identifies it, too
            write_document(directory / SERVER_NAME, server)


def server_of_policy(policy: Policy) -> Server:
    """Return the server to which a policy sends events."""
    return Server(policy.api_url, policy.api_flavor)


def server_of(directory: Path) -> Server | None:
    """Return the server to which the events of a directory are sent.

    None: the file is missing, or an earlier version has left the events. These are sent
    to the server of the first process that finds them.
    """
    own = directory.parent / directory.name.partition(_FROM)[0]
    return read_document(own / SERVER_NAME, Server)


def spool_directories(root: Path) -> list[Path]:
    """Return the directories of all servers in a spool.

    *root* is among them if an earlier version has left files in it.
    """
    with os.scandir(root) as entries:
        paths = sorted(
            root / entry.name
            for entry in entries
            if _DIRECTORY.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
        )
    is_used = has_segments(root) or _has_letters(root)
    return [root, *paths] if is_used else paths


def _has_letters(directory: Path) -> bool:
    return any((directory / name).exists() for name in (DEAD_LETTERS, UNREADABLE))


def has_segments(directory: Path) -> bool:
    """Return True if a directory holds segments."""
    try:
        return any(map(read_name, os.listdir(directory)))
    except OSError:
        return False


def inherited_directories(root: Path, server: Server) -> list[Path]:
    """Return the directories with events that were assigned or left to *server*."""
    prefix = server.directory_name + _FROM
    try:
        names = sorted(n for n in os.listdir(root) if n.startswith(prefix))
    except OSError:
        return []
    return [path for path in (root, *(root / n for n in names)) if has_segments(path)]


def remove_if_drained(directory: Path) -> None:
    """Remove an assigned directory without events and dead letters."""
    with contextlib.suppress(OSError), election(directory, wait=False) as won:
        if won and not has_segments(directory) and not _has_letters(directory):
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
    """Return the directories with events, *but* one, that no running process uses."""
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
    """Assign the events of a directory to another *server*; return its new path.

    As this is one `rename`, the events always belong to exactly one server, and keep
    their progress.

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
        if has_live_owner(target):  # it came between the check and the rename
            target.rename(directory)
            raise SpoolError(f"{directory}: a process that has just started uses it")
        sync_directory(root)
    return target


#: The name of a file with the mark of the sender's key.
SENDER_KEY = "sender.key"
#: Minimum number of seconds between two comparisons of the keys.
_KEY_INTERVAL = 1.0
#: Maximum age, in seconds, of another process's mark at the time when this process got
#: its key. Marks are renewed while events come; an older one may be out of date.
_KEY_AGE = 5.0


class KeyWatch:
    """A watch for another process that sends to the same server with another API key.

    Each process writes a *mark*, a salted hash of its key, into its lock file. The
    sender also writes its mark into the directory. Marks of dead processes do not
    count. Only the sender learns by a 401 that a key was replaced, so other processes
    read their key again before they report a problem.
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
        #: The current problem, or None.
        self.problem: Problem | None = None

    def compare(
        self,
        token: str | None,
        write: Callable[[str], None],
        *,
        is_sender: bool,
        is_waiting: bool,
    ) -> None:
        """Compare the key of this process with the marks of others; write its own mark.

        *token* is the owner token of this process, whose lock file *write* writes.

        :raises OSError: if the directory cannot be read.
        """
        if time.monotonic() < self._due_at:
            return
        self._due_at = time.monotonic() + _KEY_INTERVAL
        differs = self._key_differs(token, is_waiting=is_waiting)
        if differs and not is_sender:
            with contextlib.suppress(ValueError):
                self._key.renew()
            differs = self._key_differs(token, is_waiting=is_waiting)
        write(self._mark)
        self._write_as_sender(is_sender=is_sender)
        self._update_problem(differs)

    def _key_differs(self, token: str | None, *, is_waiting: bool) -> bool:
        try:
            text = self._key.current()
        except ValueError:  # the sender reports it
            text = None
        if text != self._key_text:
            self._key_text = text
            self._mark = _new_mark(text) if text else ""
            self._changed_at = time.time()
        if not text:
            return False
        others = self._marks_of_others(token, is_waiting=is_waiting)
        return any(_is_of_another_key(mark, text) for mark in others)

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
        marks = []
        since = self._changed_at - _KEY_AGE
        path = self._directory / SENDER_KEY
        # A process that waits for its turn is not the sender: the file is another's.
        if is_waiting and path.exists() and path.stat().st_mtime >= since:
            marks.append(read_document(path, str) or "")
        for entry in os.listdir(self._directory):
            owner = owner_of_lock(entry)
            if owner is not None and owner != token:
                marks.append(key_mark(self._directory, owner, since=since))
        return marks

    def _update_problem(self, differs: bool) -> None:
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
            "spool with another api_key: the events of both are sent with the key of "
            "the process that delivers; give both the same api_key, or each its own "
            "spool_dir",
        )
        logger.error("%s: %s", self._directory, self.problem.text)


def forget_sender_key(directory: Path) -> None:
    """Delete the mark of an earlier sender's key."""
    with contextlib.suppress(OSError):
        (directory / SENDER_KEY).unlink(missing_ok=True)


def _new_mark(key: str) -> str:
    salt = secrets.token_hex(8)
    return f"{salt} {_hash(key, salt)}"


def _hash(key: str, salt: str) -> str:
    digest = hashlib.blake2b(key.encode(), salt=salt.encode(), digest_size=16)
    return digest.hexdigest()


def _is_of_another_key(mark: str, key: str) -> bool:
    """Return True if a mark is of another key, False also for an invalid mark."""
    salt, _, digest = mark.strip().partition(" ")
    return len(salt) == 16 and bool(digest) and digest != _hash(key, salt)

"""Who is metered: from an environ to the subject of its events."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias
from uuid import UUID

from openmeter_wsgi import log
from openmeter_wsgi.request import REQUEST, SUBJECT, USER, interrupted
from openmeter_wsgi.values import SHORT_SUBJECT, text_problem

if TYPE_CHECKING:
    from openmeter_wsgi.policy import Policy
    from openmeter_wsgi.request import RequestRecord

logger: Final = log.get_logger(__name__)

_NOTHING: Any = object()
#: From an environ to its subject, None where it has none.
FindSubject: TypeAlias = Callable[[dict[str, Any]], str | None]


class SubjectFinder:
    """Finds the subject of requests under one policy. Any thread.

    Asked in turn: :func:`set_subject`, ``subject``, ``subject_path`` on the user,
    ``REMOTE_USER``. Empty means missing. Called at the end of the response; what a
    user's callable raises is logged and counts as missing.
    """

    def __init__(self, policy: Policy) -> None:
        missing = policy.on_missing_subject
        self._fallback = None if missing == "skip" else missing
        self._from_policy = _policy_source(policy)
        self._from_user = path_reader(policy.subject_path)
        #: Whom all requests are billed to that do not say who is calling. None where
        #: they have no subject, or a long one, or the policy finds it elsewhere.
        self.anonymous: str | None = None
        if policy.subject is None and len(missing) <= SHORT_SUBJECT:
            self.anonymous = self._fallback

    def find(self, environ: dict[str, Any]) -> str | None:
        """Return the subject of a request, None where it has none."""
        request: RequestRecord | None = environ.get(REQUEST)
        caller = None if request is None else request.caller
        if caller and SUBJECT in caller and (text := _text(caller[SUBJECT])):
            return text
        if self._from_policy and (text := _text(self._from_policy(environ))):
            return text
        if caller and USER in caller and (text := _text(self._from_user(caller[USER]))):
            return text
        if "REMOTE_USER" in environ:
            return _header_text(environ["REMOTE_USER"]) or self._fallback
        return self._fallback

    def missing_path(self, environ: dict[str, Any]) -> MissingPath | None:
        """Return the path of the policy that led to nothing, None if all did not."""
        found = None if self._from_policy is None else self._from_policy(environ)
        request: RequestRecord | None = environ.get(REQUEST)
        caller = None if request is None else request.caller
        if not isinstance(found, MissingPath) and caller and USER in caller:
            found = self._from_user(caller[USER])
        return found if isinstance(found, MissingPath) else None


def _policy_source(policy: Policy) -> Callable[[dict[str, Any]], object] | None:
    source = policy.subject
    if isinstance(source, str):
        return _header_source(source.removeprefix("header:"), policy.subject_commas)
    if source is None:
        return None

    def call(environ: dict[str, Any]) -> object:
        try:
            return source(environ)
        except BaseException as error:  # noqa: BLE001 - the user's code, on our path
            logger.error(
                "subject: %s raised %r; the request counts as one without subject",
                source, error,
            )  # fmt: skip
            if not isinstance(error, Exception):
                interrupted(environ, error)
            return None

    return call


def _header_source(name: str, has_commas: bool) -> Callable[[dict[str, Any]], object]:
    key = name.upper().replace("-", "_")
    if key not in {"CONTENT_TYPE", "CONTENT_LENGTH"}:
        key = f"HTTP_{key}"

    def read(environ: dict[str, Any]) -> object:
        text = _header_text(environ.get(key, ""))
        if "," in text and not has_commas:
            # Servers join headers of one name by commas: the proxy's and the client's.
            logger.error(
                "subject: a comma in the header %r: it was sent twice, perhaps by "
                "proxy and client, and the request counts as one without subject; "
                "subject_commas=True lets subjects hold commas",
                name,
            )
            return None
        return text

    return read


def _header_text(value: object) -> str:
    """Return a header as the text it was sent as.

    WSGI hands over its bytes, each as one character (PEP 3333). What is no UTF-8
    stays the Latin-1 that HTTP once meant. What an application has put in its place
    may be no text.
    """
    if not isinstance(value, str):
        return _text(value) or ""
    if not value.isascii():
        try:
            value = value.encode("latin-1").decode()
        except UnicodeError:
            return _text(value.strip()) or ""
    text = value.strip()
    return text if "\0" not in text else _text(text) or ""


class MissingPath(NamedTuple):
    """Stands for a subject at a path that leads to nothing."""

    path: str
    #: What has nothing of that name: the root of the path, or the type of an object.
    owner: str
    name: str


def path_reader(path: str, root: str = "") -> Callable[[object], object]:
    """Return what follows *path* through mappings, sequences and attributes.

    Where it leads to nothing that is a `MissingPath`. *root* is what the path begins
    with in the configuration.
    """
    names = path.removeprefix(".").split(".")
    whole = f"{root}.{path}" if root else path

    def read(user: object) -> object:
        value: Any = user
        try:
            for name in names:
                owner, value = value, _step(value, name)
                if value is _NOTHING:
                    is_root = root != "" and owner is user
                    whose = root if is_root else f"a {type(owner).__name__}"
                    return MissingPath(whole, whose, name)
        except Exception as error:  # noqa: BLE001 - a property of the user's object
            logger.error("subject_path %r: reading it raised %r", whole, error)
            return None
        return value

    return read


def _step(value: Any, name: str) -> Any:
    if value is None:
        return None
    if isinstance(value, Mapping):
        return value.get(name, _NOTHING)
    if isinstance(value, list | tuple) and name.isdecimal():
        return value[int(name)] if int(name) < len(value) else _NOTHING
    return getattr(value, name, _NOTHING)


def _text(subject: object) -> str | None:
    """Return a subject as text. Numbers and UUIDs are what databases call it."""
    if isinstance(subject, int | UUID) and not isinstance(subject, bool):
        with contextlib.suppress(ValueError):  # of an integer of thousands of digits
            return str(subject)
    if subject is None or subject == "" or isinstance(subject, MissingPath):
        return None
    if problem := text_problem(subject):
        logger.error("subject: %s; it counts as missing", problem)
        return None
    return str(subject)

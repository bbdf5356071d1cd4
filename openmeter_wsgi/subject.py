"""Finds the subject to bill from the environ."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias
from uuid import UUID

from openmeter_wsgi import log
from openmeter_wsgi.request import REQUEST, SUBJECT, USER, raise_after_settling
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

    The first of these that is not empty: :func:`set_subject`, ``subject``,
    ``subject_path`` in the user, ``REMOTE_USER``. It is called at the end of the
    response; an error in a user's callable is logged and counts as no subject.
    """

    def __init__(self, policy: Policy) -> None:
        missing = policy.on_missing_subject
        self._fallback = None if missing == "skip" else missing
        self._from_policy = _policy_source(policy)
        self._from_user = path_reader(policy.subject_path)
        #: The subject of all requests without a caller. None if they have none, or a
        #: long one, or the policy reads the subject from the request.
        self.anonymous: str | None = None
        if policy.subject is None and len(missing) <= SHORT_SUBJECT:
            self.anonymous = self._fallback

    def find(self, environ: dict[str, Any]) -> str | None:
        """Return the subject of a request, None if it has none."""
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
        """Return the path of the policy if it leads to nothing, else None."""
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
                raise_after_settling(environ, error)
            return None

    return call


def _header_source(name: str, has_commas: bool) -> Callable[[dict[str, Any]], object]:
    key = name.upper().replace("-", "_")
    if key not in {"CONTENT_TYPE", "CONTENT_LENGTH"}:
        key = f"HTTP_{key}"

    def read(environ: dict[str, Any]) -> object:
        text = _header_text(environ.get(key, ""))
        if "," in text and not has_commas:
            # Servers join headers of one name by commas, also a proxy's and a client's.
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
    """Return a header as text.

    In WSGI each byte of a header is one character (PEP 3333). Bytes that are not UTF-8
    stay Latin-1. An application may have put another object in its place.
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
    #: The root of the path, or the type of the object, that lacks the name.
    owner: str
    name: str


def path_reader(path: str, root: str = "") -> Callable[[object], object]:
    """Return a function that follows *path* through mappings, sequences, attributes.

    It returns a `MissingPath` if the path leads to nothing. *root* is the beginning of
    the path in the configuration.
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
    """Return a subject as text. Databases have numbers and UUIDs, too."""
    if isinstance(subject, int | UUID) and not isinstance(subject, bool):
        with contextlib.suppress(ValueError):  # of an integer of thousands of digits
            return str(subject)
    if subject is None or subject == "" or isinstance(subject, MissingPath):
        return None
    if problem := text_problem(subject):
        logger.error("subject: %s; it counts as missing", problem)
        return None
    return str(subject)

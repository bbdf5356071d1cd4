"""Finds the subject of a request, by which OpenMeter attributes usage to a customer."""

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

#: Stands for a step of a path that is missing.
_MISSING: Any = object()
#: Returns the subject of a request by its environ, None if there is none.
FindSubject: TypeAlias = Callable[[dict[str, Any]], str | None]


class SubjectFinder:
    """Finds the subjects of requests of one policy. Any thread.

    Uses the first source that is not empty: :func:`set_subject`, the option
    ``subject``, the option ``subject_path`` in the user of :func:`set_user`,
    ``REMOTE_USER``, the option ``on_missing_subject``. `find` is called when the
    response ends, and earlier if entitlements are checked. An error in a callable of
    the application is logged and counts as no subject.
    """

    def __init__(self, policy: Policy) -> None:
        missing = policy.on_missing_subject
        self._fallback = None if missing == "skip" else missing
        self._from_policy = _policy_source(policy)
        self._from_user = path_reader(policy.subject_path)
        #: The subject of all requests without `caller` and ``REMOTE_USER``. None if
        #: there is none, if it is long, or if the option ``subject`` is set.
        self.anonymous: str | None = None
        if policy.subject is None and len(missing) <= SHORT_SUBJECT:
            self.anonymous = self._fallback

    def find(self, environ: dict[str, Any]) -> str | None:
        """Return the subject of a request, or None."""
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
        """Return the path of the policy if a step of it is missing, or None."""
        subject = None if self._from_policy is None else self._from_policy(environ)
        request: RequestRecord | None = environ.get(REQUEST)
        caller = None if request is None else request.caller
        if not isinstance(subject, MissingPath) and caller and USER in caller:
            subject = self._from_user(caller[USER])
        return subject if isinstance(subject, MissingPath) else None


def _policy_source(policy: Policy) -> Callable[[dict[str, Any]], object] | None:
    source = policy.subject
    if isinstance(source, str):
        return _header_source(source.removeprefix("header:"), policy.subject_commas)
    if source is None:
        return None

    def call(environ: dict[str, Any]) -> object:
        try:
            return source(environ)
        except BaseException as error:  # noqa: BLE001 - code of the application
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
            # Servers join headers of the same name with commas: the header of the proxy
            # and one that the client forged.
            logger.error(
                "subject: the header %r contains a comma: it was sent twice, perhaps "
                "by proxy and client; the request counts as one without subject; "
                "subject_commas=True allows commas in subjects",
                name,
            )
            return None
        return text

    return read


def _header_text(value: object) -> str:
    """Return the value of a header in the environ as text, without outer white space.

    In WSGI each byte of a header is one Latin-1 character (PEP 3333). Bytes that are
    UTF-8 are decoded, others are left as they are. An application may have replaced the
    value by an object that is not text, such as a number.
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
    """A path to a subject of which a step is missing."""

    path: str
    #: The object that lacks the step, for log lines: the root, or the object's type.
    owner: str
    #: The missing step.
    name: str


def path_reader(path: str, root: str = "") -> Callable[[object], object]:
    """Return a function that follows *path* through mappings, sequences, attributes.

    That function returns a `MissingPath` if a step is missing. *root* precedes the path
    in the configuration, and in log lines.
    """
    names = path.removeprefix(".").split(".")
    full_path = f"{root}.{path}" if root else path

    def read(user: object) -> object:
        value: Any = user
        try:
            for name in names:
                owner, value = value, _step(value, name)
                if value is _MISSING:
                    is_root = root != "" and owner is user
                    described = root if is_root else f"a {type(owner).__name__}"
                    return MissingPath(full_path, described, name)
        except Exception as error:  # noqa: BLE001 - code of the application
            logger.error("subject_path %r: reading it raised %r", full_path, error)
            return None
        return value

    return read


def _step(value: Any, name: str) -> Any:
    if value is None:
        return None
    if isinstance(value, Mapping):
        return value.get(name, _MISSING)
    if isinstance(value, list | tuple) and name.isdecimal():
        return value[int(name)] if int(name) < len(value) else _MISSING
    return getattr(value, name, _MISSING)


def _text(subject: object) -> str | None:
    """Return a subject as text, or None. Ids in databases may be integers or UUIDs."""
    if isinstance(subject, int | UUID) and not isinstance(subject, bool):
        with contextlib.suppress(ValueError):  # an integer of thousands of digits
            return str(subject)
    if subject is None or subject == "" or isinstance(subject, MissingPath):
        return None
    if problem := text_problem(subject):
        logger.error("subject: %s; the subject counts as missing", problem)
        return None
    return str(subject)

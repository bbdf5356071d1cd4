"""Who is metered: from an environ to the subject of its events."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias
from uuid import UUID

from openmeter_wsgi import log
from openmeter_wsgi.environ import CALLER, ROUTE, SUBJECT, USER, environ_of
from openmeter_wsgi.wire import SHORT_SUBJECT, text_problem

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from openmeter_wsgi.policy import Policy

logger = log.get_logger(__name__)

#: From an environ to its subject, None where it has none.
FindSubject: TypeAlias = Callable[[dict[str, Any]], str | None]


def set_subject(request: object, subject: str) -> None:
    """Let *subject* be billed for this request, whatever the policy would find."""
    if (environ := _environ(request, "set_subject")) is not None:
        environ.setdefault(CALLER, {})[SUBJECT] = subject


def set_user(request: object, user: object) -> None:
    """Leave the authenticated user (claims, a mapping, an object) for the policy.

    ``subject_path`` says where its subject is.
    """
    if (environ := _environ(request, "set_user")) is not None:
        environ.setdefault(CALLER, {})[USER] = user


def set_route(request: object, route: str) -> None:
    """Say which template of an address this request has, such as ``/users/<id>``.

    Flask's and Bottle's are found without it, and Django's by its middleware.
    """
    if (environ := _environ(request, "set_route")) is not None:
        environ[ROUTE] = route


def _environ(request: object, helper: str) -> MutableMapping[str, Any] | None:
    if (environ := environ_of(request)) is None:
        logger.warning(
            "%s: %s carries no WSGI environ; it says nothing of any request",
            helper, type(request).__name__,
        )  # fmt: skip
    return environ


def subject_finder(policy: Policy) -> FindSubject:
    """Return what finds the subject of a request under *policy*.

    Asked in turn: :func:`set_subject`, ``subject``, ``subject_path`` on the user,
    ``REMOTE_USER``. Empty means missing. Called at the end of the response; what a
    user's callable raises is logged and counts as missing.
    """
    fallback = (
        None if policy.on_missing_subject == "skip" else policy.on_missing_subject
    )
    from_policy = _policy_source(policy)
    from_user = path_reader(policy.subject_path)

    def find(environ: dict[str, Any]) -> str | None:
        caller = environ.get(CALLER, ())
        if SUBJECT in caller and (text := _text(caller[SUBJECT])):
            return text
        if from_policy and (text := _text(from_policy(environ))):
            return text
        if USER in caller and (text := _text(from_user(caller[USER]))):
            return text
        if "REMOTE_USER" in environ:
            return _header_text(environ["REMOTE_USER"]) or fallback
        return fallback

    return find


def anonymous_subject(policy: Policy) -> str | None:
    """Return whom all requests are billed to that do not say who is calling.

    None where they have no subject, or a long one, or the policy finds it elsewhere in
    the request.
    """
    has_fallback = policy.on_missing_subject != "skip" and policy.subject is None
    is_short = len(policy.on_missing_subject) <= SHORT_SUBJECT
    return policy.on_missing_subject if has_fallback and is_short else None


def _policy_source(policy: Policy) -> Callable[[dict[str, Any]], object] | None:
    source = policy.subject
    if isinstance(source, str):
        name = source.removeprefix("header:").upper().replace("-", "_")
        key = name if name in {"CONTENT_TYPE", "CONTENT_LENGTH"} else f"HTTP_{name}"
        return lambda environ: _header_text(environ.get(key, ""))
    if source is None:
        return None

    def call(environ: dict[str, Any]) -> object:
        try:
            return source(environ)
        except Exception as error:  # noqa: BLE001 - the user's code, on our path
            logger.error(
                "subject: %s raised %r; the request counts as one without subject",
                source, error,
            )  # fmt: skip
            return None

    return call


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


def path_reader(path: str) -> Callable[[object], object]:
    """Return what follows *path* through mappings, sequences and attributes.

    What is not there is None.
    """
    names = path.removeprefix(".").split(".")

    def read(user: object) -> object:
        value: Any = user
        try:
            for name in names:
                if isinstance(value, Mapping):
                    value = value.get(name)
                elif isinstance(value, list | tuple) and name.isdecimal():
                    value = value[int(name)] if int(name) < len(value) else None
                else:
                    value = getattr(value, name, None)
        except Exception as error:  # noqa: BLE001 - a property of the user's object
            logger.error("subject_path %r: reading it raised %r", path, error)
            return None
        return value

    return read


def _text(subject: object) -> str | None:
    """Return a subject as text. Numbers and UUIDs are what databases call it."""
    if isinstance(subject, int | UUID) and not isinstance(subject, bool):
        return str(subject)
    if subject is None or subject == "":
        return None
    if problem := text_problem(subject):
        logger.error("subject: %s; it counts as missing", problem)
        return None
    return str(subject)

import uuid
from types import SimpleNamespace
from typing import Any

import pytest

from billing import bill, environ, handled, serve
from openmeter_server import OpenMeterServer
from openmeter_wsgi import OpenMeterMiddleware, Policy, set_subject, set_user
from openmeter_wsgi.subject import SubjectFinder


def find(request: dict[str, Any], **options: Any) -> str | None:
    policy = Policy(api_url="http://127.0.0.1:1", **options)
    return SubjectFinder(policy).find(request)


def as_wsgi(text: str) -> str:
    """Return a header value as a server hands it over (PEP 3333)."""
    return text.encode().decode("latin-1")


def test_sources_are_asked_in_order() -> None:
    request = environ()
    options = {"subject": "header:X-Customer-Id", "on_missing_subject": "nobody"}

    assert find(request, **options) == "nobody"
    request["REMOTE_USER"] = "remote"
    assert find(request, **options) == "remote"
    set_user(request, {"sub": "user"})
    assert find(request, **options) == "user"
    request["HTTP_X_CUSTOMER_ID"] = "header"
    assert find(request, **options) == "header"
    set_subject(request, "set")
    assert find(request, **options) == "set"


@pytest.mark.parametrize("empty", ["", None, "  "])
def test_empty_means_missing(empty: Any) -> None:
    request = environ(HTTP_X_CUSTOMER_ID=empty or "", REMOTE_USER=empty or "")
    set_user(request, {"sub": None})
    set_subject(request, None if empty is None else "")

    assert find(request, subject="header:X-Customer-Id") is None
    assert find(request, subject=lambda _: "") is None


@pytest.mark.parametrize(
    ("said", "subject"),
    [
        (None, None),
        (42, "42"),
        (b"acme", None),
        ("", None),
        ("acme\udc80", None),
        ("acme\0", None),
    ],
)
def test_what_an_application_leaves_in_remote_user_may_be_anything(
    said: Any, subject: str | None
) -> None:
    assert find(environ(REMOTE_USER=said)) == subject
    assert find(environ(HTTP_X_NAME=said), subject="header:X-Name") == subject


@pytest.mark.parametrize(
    "leave",
    [
        lambda request: set_subject(request, "acme\0"),
        lambda request: set_user(request, {"sub": "a\0cme"}),
        lambda request: request.update(REMOTE_USER="\0acme"),
        lambda request: request.update(HTTP_X_CUSTOMER="ac\0me"),
        lambda request: request.update(HTTP_X_CUSTOMER="\xc3\xa9\0"),
    ],
    ids=["set_subject", "set_user", "REMOTE_USER", "header", "beyond ASCII"],
)
def test_a_subject_with_nul_is_not_billed(
    openmeter: OpenMeterServer, caplog: pytest.LogCaptureFixture, leave: Any
) -> None:
    middleware = OpenMeterMiddleware(
        handled(leave),
        api_url=openmeter.url,
        subject="header:X-Customer",
        meters={"a": 1},
    )
    serve(middleware, environ())
    middleware.close(40)

    assert openmeter.taken == []
    assert middleware.stats().not_metered == {"no_subject": 1}
    assert "subject: expected text without NUL, got " in caplog.text


@pytest.mark.parametrize("said", ["real,victim", "real, victim", ",", "a,", "é,b"])
def test_a_header_that_was_sent_twice_is_no_subject(
    said: str, caplog: pytest.LogCaptureFixture
) -> None:
    request = environ(HTTP_X_NAME=as_wsgi(said))

    assert find(request, subject="header:X-Name") is None
    assert "'X-Name'" in caplog.text
    assert "subject_commas" in caplog.text
    allowed = find(request, subject="header:X-Name", subject_commas=True)
    assert allowed == said
    # A value set by the server or the application was not joined from two headers.
    assert find(environ(REMOTE_USER="a,b")) == "a,b"


def test_nothing_but_what_the_policy_names_is_read_from_the_client() -> None:
    request = environ(
        HTTP_X_CUSTOMER_ID="forged",
        HTTP_REMOTE_USER="forged",
        QUERY_STRING="sub=forged",
    )

    assert find(request) is None


@pytest.mark.parametrize(
    ("path", "user", "subject"),
    [
        (".sub", {"sub": "acme"}, "acme"),
        ("sub", {"sub": "acme"}, "acme"),
        (".data.accountId", {"data": {"accountId": "a1"}}, "a1"),
        (".data.id", SimpleNamespace(data={"id": 42}), "42"),
        (
            ".account.id",
            {"account": SimpleNamespace(id=uuid.UUID(int=7))},
            str(uuid.UUID(int=7)),
        ),
        (".accounts.1.id", {"accounts": [{}, {"id": "second"}]}, "second"),
        (".accounts.5.id", {"accounts": []}, None),
        (".sub", {"sub": ""}, None),
        (".sub", {}, None),
        (".sub", "a text user", None),
        (".id", {"id": 0}, "0"),
        (".id", {"id": True}, None),
        (".id", {"id": ["acme"]}, None),
        (".id", {"id": "\ud800"}, None),
    ],
)
def test_the_path_goes_through_mappings_attributes_and_sequences(
    path: str, user: Any, subject: str | None
) -> None:
    request = environ()
    set_user(request, user)

    assert find(request, subject_path=path) == subject


def test_a_property_that_raises_is_logged_and_counts_as_missing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class User:
        @property
        def sub(self) -> str:
            raise KeyError("not loaded")

    request = environ()
    set_user(request, User())

    assert find(request) is None
    assert "not loaded" in caplog.text


def test_a_callable_is_taken_as_it_is_and_may_fail(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(request: Any) -> str:
        raise RuntimeError("database away")

    assert find(environ(), subject=lambda request: " as is ") == " as is "
    assert find(environ(REMOTE_USER="remote"), subject=broken) == "remote"
    assert "database away" in caplog.text


@pytest.mark.parametrize("text", ["acme", "Zoë", "客户", "\N{GRINNING FACE}"])
def test_a_header_arrives_as_the_text_it_was_sent_as(text: str) -> None:
    request = environ(
        HTTP_X_CUSTOMER_ID=as_wsgi(f" {text} "), REMOTE_USER=as_wsgi(text)
    )

    assert find(request, subject="header:x-customer-id") == text
    assert find(request) == text


def test_a_header_that_is_no_utf8_stays_latin_1() -> None:
    assert find(environ(REMOTE_USER="caf\xe9")) == "café"


def test_content_type_can_be_named_like_any_header() -> None:
    assert (
        find(environ(CONTENT_TYPE="text/x"), subject="header:Content-Type") == "text/x"
    )


def test_a_request_without_subject_is_counted_and_said(
    openmeter: OpenMeterServer, caplog: pytest.LogCaptureFixture
) -> None:
    assert bill(openmeter, meters={"a": 1}, on_missing_subject="skip") == []
    assert "without subject is not billed" in caplog.text


@pytest.mark.parametrize("helper", [set_user, set_subject])
def test_where_there_is_no_environ_it_is_said_and_nothing_raised(
    helper: Any, caplog: pytest.LogCaptureFixture
) -> None:
    helper(object(), "acme")

    assert "has no WSGI environ" in caplog.text

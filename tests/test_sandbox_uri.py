import pytest

from openmeter_wsgi.sandbox.ingest import InvalidEvent, reencode


@pytest.mark.parametrize(
    ("source", "written"),
    [
        ("my-api", "my-api"),
        ("my api", "my%20api"),
        ("my%20api", "my%20api"),
        ("/a/b:c", "/a/b:c"),
        ("a/b:c", "a/b:c"),
        ("urn:example:a b", "urn:example:a b"),
        ("localhost:8080", "localhost:8080"),
        ("HTTP://Host/Path", "http://Host/Path"),
        ("http://host:80/a b?x=a b#c d", "http://host:80/a%20b?x=a b#c%20d"),
        ("//host/path", "//host/path"),
        ("ä", "%C3%A4"),
        ("*", "*"),
        ("#", ""),
        ("//", ""),
        ("http://", "http:"),
    ],
)
def test_sources_are_written_as_go_writes_them(source, written):
    assert reencode(source) == written


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("127.0.0.1:8080", "first path segment in URL cannot contain colon"),
        ("my api:1", "first path segment in URL cannot contain colon"),
        (":80", "missing protocol scheme"),
        ("a%", 'invalid URL escape "%"'),
        ("a%2", 'invalid URL escape "%2"'),
        ("a%zzb", 'invalid URL escape "%zz"'),
        ("#%zz", 'invalid URL escape "%zz"'),
        ("a\tb", "net/url: invalid control character in URL"),
        ("http://host:port/", 'invalid port ":port" after host'),
        ("http://a b/", 'invalid character " " in host name'),
        ("http://%zz/", 'invalid URL escape "%zz"'),
    ],
)
def test_sources_that_go_refuses_are_refused(source, reason):
    with pytest.raises(InvalidEvent) as refused:
        reencode(source)

    assert str(refused.value) == f"cannot parse uri ref: {source}"
    assert refused.value.reason.endswith(f": {reason}")

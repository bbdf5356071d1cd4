import pytest

from openmeter_wsgi import ConfigError, OpenMeterMiddleware, Policy
from openmeter_wsgi.options import ApiKey, checked_key, is_konnect, v3_url


def test_surrounding_white_space_is_no_part_of_a_key():
    assert checked_key("\t om_secret \r\n") == "om_secret"


@pytest.mark.parametrize("value", ["om secret", "om\nsecret", "sécret", "om\x00", "ü"])
def test_what_cannot_stand_in_a_header_is_refused_without_being_repeated(value):
    with pytest.raises(ValueError, match="visible ASCII") as caught:
        checked_key(value)

    assert value not in str(caught.value)


@pytest.mark.parametrize("value", ["", "  \n"])
def test_an_empty_key_is_refused(value):
    with pytest.raises(ValueError, match="empty"):
        checked_key(value)


@pytest.mark.parametrize("value", [None, 7, b"om_secret"])
def test_a_key_is_text(value):
    with pytest.raises(ValueError, match="expected text") as caught:
        checked_key(value)

    assert "secret" not in str(caught.value)


def test_no_key_is_none_and_never_another():
    key = ApiKey.from_options(None, None)

    assert key.current() is None
    assert not key.renew()


def test_a_text_never_becomes_another():
    key = ApiKey.from_options("om_secret\n", None)

    assert key.current() == "om_secret"
    assert not key.renew()
    assert key.current() == "om_secret"


def test_a_callable_is_called_on_first_use_and_once():
    calls = []
    key = ApiKey.from_options(lambda: calls.append(1) or f"key{len(calls)}", None)
    assert calls == []

    assert [key.current(), key.current()] == ["key1", "key1"]
    assert key.renew()
    assert key.current() == "key2"
    assert len(calls) == 2


def test_a_file_is_read_at_once_and_again_when_renewed(tmp_path):
    file = tmp_path / "key"
    file.write_text("one\n")
    key = ApiKey.from_options(None, str(file))

    assert not key.renew()
    file.write_text("two\n")
    assert key.current() == "one"
    assert key.renew()
    assert key.current() == "two"


def test_a_file_that_is_missing_is_told_by_name(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        ApiKey.from_options(None, tmp_path / "nowhere")


def test_a_callable_may_fail_and_is_asked_again():
    answers = iter([RuntimeError("sealed"), None, "two words", "om_secret"])

    def read():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    key = ApiKey.from_options(read, None)

    with pytest.raises(ValueError, match=r"api_key\(\): cannot be read.*sealed"):
        key.current()
    with pytest.raises(ValueError, match=r"api_key\(\): expected text"):
        key.current()
    with pytest.raises(ValueError, match="visible ASCII") as caught:
        key.current()
    assert "two words" not in str(caught.value)
    assert key.current() == "om_secret"


def test_a_key_that_could_not_be_renewed_is_not_used_any_more():
    answers = iter(["one"])
    key = ApiKey.from_options(lambda: next(answers), None)
    assert key.current() == "one"

    with pytest.raises(ValueError, match="StopIteration"):
        key.renew()
    with pytest.raises(ValueError, match="StopIteration"):
        key.current()


@pytest.mark.parametrize(
    ("url", "required"),
    [
        ("https://openmeter.cloud", True),
        ("https://eu.openmeter.cloud", True),
        ("https://us.api.konghq.com", True),
        ("http://127.0.0.1:8888", False),
        ("https://openmeter.cloud.example", False),
        ("https://notopenmeter.cloud", False),
    ],
)
def test_a_hosted_server_requires_a_key(url, required):
    assert ApiKey.from_options(None, None).required_by(url) is required
    assert not ApiKey.from_options("om_secret", None).required_by(url)


@pytest.mark.parametrize(
    ("url", "konnect"),
    [
        ("https://eu.api.konghq.com", True),
        ("https://a-new-region.api.konghq.com", True),
        ("https://EU.API.KONGHQ.COM", True),
        ("http://eu.api.konghq.com:8080", True),
        ("https://eu.api.konghq.com/gateway", True),
        ("https://api.konghq.com", False),
        ("https://.api.konghq.com", False),
        ("https://a.b.api.konghq.com", False),
        ("https://eu.api.konghq.com.example", False),
        ("https://eu-api.konghq.com", False),
        ("https://eu.xapi.konghq.com", False),
        ("https://openmeter.cloud", False),
        ("http://127.0.0.1:8888", False),
        ("http://[::1]:8888", False),
    ],
)
def test_kong_konnect_is_recognised_by_its_host(url, konnect):
    assert is_konnect(url) is konnect
    path = "/v3/openmeter" if konnect else "/api/v3/openmeter"
    assert v3_url(url) == url + path


def test_a_missing_key_is_a_problem_of_the_configuration():
    with pytest.raises(ConfigError, match="OPENMETER_API_KEY"):
        Policy(meters={"api_requests": 1})


def test_the_key_is_in_no_repr(tmp_path):
    file = tmp_path / "key"
    file.write_text("om_secret")
    texts = []
    for options in (
        {"api_key": "om_secret", "entitlements_api_key": "om_secret"},
        {"api_key_file": file},
    ):
        policy = Policy(meters={"api_requests": 1}, **options)
        middleware = OpenMeterMiddleware(lambda *_: [], policy)
        texts += [repr(policy), str(policy), repr(policy.key), repr(middleware)]
        texts.append(repr(middleware.stats()))

    assert "om_secret" not in " ".join(texts)


def test_a_key_from_the_environment_is_not_told_in_an_error(monkeypatch):
    monkeypatch.setenv("OPENMETER_API_KEY", "om secret")

    with pytest.raises(ConfigError, match="api_key") as caught:
        OpenMeterMiddleware(lambda *_: [])

    assert "om secret" not in str(caught.value)

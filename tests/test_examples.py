"""Bills of the Flask example, which must be as its comments say."""

import importlib.util
from pathlib import Path

import pytest
import requests

EXAMPLE = Path(__file__).parents[1] / "examples" / "flask_app.py"
ACME = {"X-API-Key": "acme-key"}
REQUEST = ("api-request", {"region": "eu"})


@pytest.fixture
def app(sandbox, monkeypatch):
    """The example, imported again, as it reads the environment at its import."""
    monkeypatch.setenv("OPENMETER_API_URL", sandbox.url)
    spec = importlib.util.spec_from_file_location("flask_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module.app
    module.app.wsgi_app.close()


@pytest.fixture
def client(app):
    return app.test_client()


@pytest.fixture
def billed(app, sandbox):
    """A function that returns type and data of the billed events."""

    def read(subject="acme"):
        assert app.wsgi_app.flush(20)
        answer = requests.get(f"{sandbox.url}/api/v2/events", timeout=40)
        events = [item["event"] for item in answer.json()["items"]]
        assert {event["source"] for event in events} <= {"flask-example"}
        assert {event["subject"] for event in events} <= {subject}
        found = [(event["type"], event["data"]) for event in events]
        return sorted(found, key=repr)

    return read


def ended(response):
    """Read and close *response*, as a server does: only then is it settled."""
    with response:
        _ = response.data
    return response


def test_a_request_is_billed_once(client, billed):
    response = ended(client.get("/products", headers=ACME))

    assert response.json == ["anvil", "rocket skates"]
    assert billed() == [REQUEST]


def test_a_creation_is_billed(client, billed):
    response = ended(client.post("/orders", headers=ACME, json={"product": "anvil"}))

    assert (response.status_code, response.json) == (201, {"ordered": "anvil"})
    assert billed() == [REQUEST]


def test_a_subject_is_billed_under_its_name_as_it_is_written(client, billed):
    ended(client.get("/products/anvil", headers={"X-API-Key": "cafe-key"}))

    assert billed("Zoë's Café") == [REQUEST]


def test_a_language_model_is_billed_by_model_and_kind_of_token(client, billed):
    question = {"model": "large", "prompt": "why is it so", "max_tokens": 7}

    response = ended(client.post("/chat", headers=ACME, json=question))

    assert response.json["usage"] == {"prompt": 4, "completion": 7}
    tokens = {"model": "large"}
    assert billed() == [
        REQUEST,
        ("credits", {"total": 5}),
        ("tokens", tokens | {"kind": "completion", "tokens": 7}),
        ("tokens", tokens | {"kind": "prompt", "tokens": 4}),
    ]


def test_an_unknown_model_is_not_billed(client, billed):
    question = {"model": "huge", "prompt": "why", "max_tokens": 7}

    response = ended(client.post("/chat", headers=ACME, json=question))

    assert response.status_code == 400
    assert billed() == []


def test_a_stream_is_billed_by_page(client, billed):
    response = ended(client.get("/export?pages=4&kib=1", headers=ACME))

    assert response.data == b"x" * 4096
    assert billed() == [REQUEST, ("credits", {"total": 4})]


def test_of_a_stream_that_breaks_only_the_pages_are_billed(client, billed):
    path = "/export?pages=4&kib=1&break_after=2"

    with pytest.raises(RuntimeError, match="database"):
        ended(client.get(path, headers=ACME))

    assert billed() == [("credits", {"total": 2})]


def test_of_a_stream_that_is_left_the_request_and_the_pages_taken_are_billed(
    client, billed
):
    path = "/export?pages=4&kib=1"

    with client.get(path, headers=ACME, buffered=False) as response:
        pages = response.iter_encoded()
        taken = [next(pages), next(pages)]

    assert taken == [b"x" * 1024] * 2
    # The client had the second page and left: the server never came back for more.
    assert billed() == [REQUEST, ("credits", {"total": 1})]


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        pytest.param("/report", ACME, 500, id="an error of ours"),
        pytest.param("/products/moon", ACME, 404, id="not found"),
        pytest.param("/nowhere", ACME, 404, id="no such route"),
        pytest.param("/products", {}, 401, id="no key"),
        pytest.param("/products", {"X-API-Key": "guess"}, 401, id="a wrong key"),
    ],
)
def test_a_refusal_or_an_error_is_not_billed(client, billed, path, headers, status):
    response = ended(client.get(path, headers=headers))

    assert response.status_code == status
    assert billed() == []
    assert client.application.wsgi_app.stats().not_metered == {"status": 1}

"""Usage of the responses and streams of real SDKs, over HTTP with recorded bodies."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import anthropic
import openai
import pytest
from google import genai

from bodies import llm_body, media_type_of
from openmeter_wsgi import usage_of
from test_llm_prices import RECORDED, expected

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MESSAGES: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def provider() -> Iterator[Callable[[str], str]]:
    """A function that serves a recorded body and returns the server's address."""
    bodies: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = llm_body(bodies[-1])
            self.send_response(200)
            self.send_header("Content-Type", media_type_of(bodies[-1]))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    def serve(name: str) -> str:
        bodies.append(name)
        return f"http://127.0.0.1:{server.server_address[1]}"

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield serve
        server.shutdown()
        thread.join()


def of_openai_chat(url: str, **how: Any) -> Any:
    with openai.OpenAI(api_key="k", base_url=url) as client:
        return usage_of(
            client.chat.completions.create(model="m", messages=MESSAGES, **how)
        )


def of_openai_responses(url: str, **how: Any) -> Any:
    with openai.OpenAI(api_key="k", base_url=url) as client:
        return usage_of(client.responses.create(model="m", input="Hello", **how))


def of_anthropic(url: str, **how: Any) -> Any:
    with anthropic.Anthropic(api_key="k", base_url=url) as client:
        return usage_of(
            client.messages.create(model="m", max_tokens=9, messages=MESSAGES, **how)
        )


def of_anthropic_helper(url: str) -> Any:
    with (
        anthropic.Anthropic(api_key="k", base_url=url) as client,
        client.messages.stream(model="m", max_tokens=9, messages=MESSAGES) as stream,
    ):
        return usage_of(list(stream))


def of_google(url: str, method: str = "generate_content") -> Any:
    options: Any = {"base_url": url}
    with genai.Client(api_key="k", http_options=options) as client:
        return usage_of(getattr(client.models, method)(model="m", contents="Hello"))


STREAM = {"stream": True}


@pytest.mark.parametrize(
    ("name", "call", "how"),
    [
        ("openai_chat.json", of_openai_chat, {}),
        ("deepseek_chat.json", of_openai_chat, {}),
        ("xai_chat.json", of_openai_chat, {}),
        ("openai_compatible_gateway.json", of_openai_chat, {}),
        ("moonshot_chat_stream.sse", of_openai_chat, STREAM),
        ("openai_responses_completed.sse", of_openai_responses, STREAM),
        ("anthropic_message.json", of_anthropic, {}),
        ("anthropic_server_tool_stream.sse", of_anthropic, STREAM),
        ("anthropic_server_tool_stream.sse", of_anthropic_helper, {}),
        ("gemini_generate.json", of_google, {}),
    ],
)
def test_the_real_objects_state_what_was_recorded(
    provider: Callable[[str], str], name: str, call: Any, how: Any
) -> None:
    documents = call(provider(name), **how)

    shape = RECORDED[name][1]
    assert [document["data"] for document in documents] == [
        {**data, "provider": shape} for data in expected(name)
    ]


def test_a_stream_of_google_states_its_last_figures(
    provider: Callable[[str], str],
) -> None:
    documents = of_google(provider("gemini_stream.sse"), "generate_content_stream")

    found = {each["data"]["type"]: each["data"]["tokens"] for each in documents}
    assert found == {"input": 13, "output": 15, "cache_read": 32, "reasoning": 30}

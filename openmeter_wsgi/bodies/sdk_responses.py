"""Usage in the response objects of the SDKs of language models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from openmeter_wsgi.bodies.llm import FINDERS, LLMReports
from openmeter_wsgi.bodies.llm_shapes import priced_data
from openmeter_wsgi.errors import MeterValueError
from openmeter_wsgi.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openmeter_wsgi.bodies.llm_shapes import Provider

logger: Final = get_logger(__name__)

#: The shape of the reports of each SDK, by its package.
_SHAPES: dict[str, Provider] = {
    "openai": "openai", "anthropic": "anthropic", "google": "gemini",
}  # fmt: skip


def usage_of(
    response: object, *, meter: str = "llm_tokens", provider: str | None = None
) -> list[dict[str, Any]]:
    """Return the tokens of one call of a model, for :func:`add_meters`.

    *response* is an answer of the SDK of OpenAI, Anthropic or Google (google-genai),
    the same as a mapping, or a stream: an iterable of its chunks, which is read to its
    end. The documents are those of ``llm_usage(split="type")``.

    :param meter: the type of the events.
    :param provider: the company that bills you, where that is not the maker of the
        SDK: ``"groq"`` or ``"azure"`` with the SDK of OpenAI.
    :raises MeterValueError: if *response* is nothing of that kind.
    """
    reports: LLMReports | None = None
    for answer, document in _documents(response):
        if reports is None:
            package = type(answer).__module__.partition(".")[0]
            reports = LLMReports(FINDERS[_SHAPES.get(package)])
        reports.add_document(document)
    usage = None if reports is None else reports.usage()
    if usage is None:
        logger.warning(
            "usage_of: a %s reports no usage, so none is billed; streams of OpenAI do "
            "with stream_options={'include_usage': True}",
            type(response).__name__,
        )
        return []
    if usage.remarks:
        logger.warning(
            "usage_of: a %s holds several reports (%s), of which one is billed; pass "
            "one call at a time",
            type(response).__name__, ", ".join(usage.remarks),
        )  # fmt: skip
    name = usage.provider if provider is None else provider
    return [{"type": meter, "data": data} for data in priced_data(usage, name)]


def _documents(response: Any) -> Iterator[tuple[object, dict[str, Any]]]:
    """Yield each answer or chunk in *response*, with its content as JSON has it."""
    if isinstance(response, Mapping):
        yield response, dict(response)
    elif callable(dump := getattr(response, "model_dump", None)):
        # Google's fields have their JSON names as aliases.
        yield (
            response,
            dump(mode="json", by_alias=True, exclude_none=True, warnings=False),
        )
    elif isinstance(response, Iterable) and not isinstance(response, str | bytes):
        for chunk in response:
            yield from _documents(chunk)
    else:
        raise MeterValueError(
            "usage_of: expected a response of the SDK of OpenAI, Anthropic or Google, "
            f"or an iterable of its chunks, got a {type(response).__name__}"
        )

"""Usage in the response objects of the SDKs of language models: `usage_of`."""

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

#: The shape of the reports by the package of the SDK.
_SHAPES: dict[str, Provider] = {
    "openai": "openai", "anthropic": "anthropic", "google": "gemini",
}  # fmt: skip


def usage_of(
    response: object, *, meter: str = "llm_tokens", provider: str | None = None
) -> list[dict[str, Any]]:
    """Return the tokens of one call of a model as meters for :func:`add_meters`.

    *response* is a response object of the SDK of OpenAI, Anthropic or Google
    (google-genai), the same as a mapping, or a stream: an iterable of chunks, which is
    read to its end. The meters are the same as with ``llm_usage(split="type")``.

    :param meter: the type of the events.
    :param provider: the company that bills you, if it is not the maker of the SDK:
        ``"groq"`` or ``"azure"`` with the SDK of OpenAI.
    :raises MeterValueError: if *response* is not such an object.
    """
    reports: LLMReports | None = None
    for item, document in _documents(response):
        if reports is None:
            package = type(item).__module__.partition(".")[0]
            reports = LLMReports(FINDERS[_SHAPES.get(package)])
        reports.add_document(document)
    usage = None if reports is None else reports.usage()
    if usage is None:
        logger.warning(
            "usage_of: a %s reports no usage, so none is billed; a stream of OpenAI "
            "reports usage with stream_options={'include_usage': True}",
            type(response).__name__,
        )
        return []
    if usage.remarks:
        logger.warning(
            "usage_of: a %s holds several reports (%s), but only one call is billed; "
            "pass one call at a time",
            type(response).__name__, ", ".join(usage.remarks),
        )  # fmt: skip
    name = usage.provider if provider is None else provider
    return [{"type": meter, "data": data} for data in priced_data(usage, name)]


def _documents(response: Any) -> Iterator[tuple[object, dict[str, Any]]]:
    """Yield each object or chunk in *response*, with its content as decoded JSON."""
    if isinstance(response, Mapping):
        yield response, dict(response)
    elif callable(dump := getattr(response, "model_dump", None)):
        # Google's SDK defines the names in JSON as aliases of its fields.
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

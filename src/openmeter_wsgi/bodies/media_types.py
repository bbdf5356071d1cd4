"""What the headers of a response say about how to read its body."""

from __future__ import annotations

#: Media types of one JSON document a line.
NDJSON = frozenset({
    "application/x-ndjson", "application/ndjson", "application/jsonl",
    "application/x-jsonl", "application/jsonlines", "application/x-jsonlines",
    "application/json-lines", "application/stream+json",
})  # fmt: skip


def media_type(content_type: str | None) -> str:
    """Return the media type without its parameters, in lower case, or ``""``."""
    return (content_type or "").partition(";")[0].strip().lower()


def is_compressed(content_encoding: str | None) -> bool:
    """Say whether a ``Content-Encoding`` makes the bytes something else."""
    codings = (coding.strip().lower() for coding in (content_encoding or "").split(","))
    return any(coding not in ("", "identity") for coding in codings)

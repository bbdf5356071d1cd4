"""Send recorded calls to another server and compare its answers with OpenMeter's.

An answer is compared in three parts: its status, its meaning (the body without the
sentences for people) and its wording. Left out are identifiers, times of creation, the
order of unordered rows, and random parts of OpenMeter's answers (such as the latest of
several events of one second), which the recording lists as ``chance``.
"""

from __future__ import annotations

import base64
import http.client
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RECORDED = Path(__file__).with_name("fixtures") / "openmeter_answers.jsonl"
#: Start of the recording's clock: 2026-11-29T00:04:00Z.
START = 1_795_910_640
WORDING = ("detail", "invalid_parameters")
_ULID = re.compile(r"\b[0-7][0-9A-HJKMNP-TV-Z]{25}\b")
_CREATED = frozenset(
    ("createdAt", "updatedAt", "deletedAt", "archivedAt", "ingestedAt", "storedAt",
     "activeFrom", "created_at", "updated_at")
)  # fmt: skip
_MASKS = dict.fromkeys(("nextCursor", "first", "last"), "<cursor>") | {
    "instance": "<request>"
}


@dataclass(frozen=True)
class Difference:
    """A call that two servers answer differently."""

    name: str
    #: ``status``, ``meaning`` or ``wording``.
    kind: str
    real: Any
    here: Any

    def __str__(self) -> str:
        real, here = (json.dumps(x, ensure_ascii=False) for x in (self.real, self.here))
        return f"{self.name}: another {self.kind}\n  real {real}\n  here {here}"


def calls() -> list[dict[str, Any]]:
    """Return the recorded calls and clock steps in order."""
    lines = RECORDED.read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines[1:]]


def replay(url: str, set_clock: Callable[[float], None]) -> Iterator[Difference]:
    """Send all calls in order to a new server and yield the differences."""
    known: dict[str, str] = {}
    for call in calls():
        if "clock" in call:
            set_clock(START + call["clock"])
            continue
        here = _send(url, call, known)
        real = {name: call.get(name) for name in ("status", "answer_type", "answer")}
        if difference := _compare(call, real, here):
            yield Difference(call["name"], *difference)


def _send(url: str, call: dict[str, Any], known: dict[str, str]) -> dict[str, Any]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    path = re.sub(r"\{(\w+)\}", lambda m: known.get(m[1], "MISSING"), call["path"])
    body, headers = _body(call), dict(call.get("headers", {}))
    if call.get("type") is not None:
        headers["Content-Type"] = call["type"]
    connection.putrequest(call["method"], path, skip_accept_encoding=True)
    for name, value in headers.items():
        connection.putheader(name, value)
    chunked = call.get("chunked", False)
    if chunked:
        connection.putheader("Transfer-Encoding", "chunked")
    elif body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body, encode_chunked=chunked)
    response = connection.getresponse()
    text = response.read().decode("utf-8", "replace")
    connection.close()
    answer = _parse(text)
    for variable, name in call.get("keep", {}).items():
        if isinstance(answer, dict) and name in answer:
            known[variable] = answer[name]
    kind = response.getheader("Content-Type")
    return {"status": response.status, "answer_type": kind, "answer": answer}


def _body(call: dict[str, Any]) -> bytes | None:
    if "base64" in call:
        return base64.b64decode(call["base64"])
    if "body" not in call:
        return None
    text = re.sub(r"@(.)\*(\d+)@", lambda m: m[1] * int(m[2]), call["body"])
    if "times" in call:
        copies = (text.replace("@i@", str(number)) for number in range(call["times"]))
        text = f"[{','.join(copies)}]"
    return text.encode()


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _compare(
    call: dict[str, Any], real: dict[str, Any], here: dict[str, Any]
) -> tuple[str, Any, Any] | None:
    if real["status"] != here["status"]:
        return "status", real, here
    if real["answer"] == "<not kept>":
        return None
    chance = call.get("chance", ())
    answers = [_sorted(_without(_mask(x["answer"]), chance)) for x in (real, here)]
    meanings = [_meaning(answer) for answer in answers]
    if meanings[0] != meanings[1]:
        return "meaning", *meanings
    kinds = real["answer_type"], here["answer_type"]
    if answers[0] != answers[1] or kinds[0] != kinds[1]:
        return "wording", (answers[0], kinds[0]), (answers[1], kinds[1])
    return None


def _meaning(answer: Any) -> Any:
    if isinstance(answer, dict) and "status" in answer:
        return {name: x for name, x in answer.items() if name not in WORDING}
    return answer


def _mask(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        if value and all(_ULID.fullmatch(key) for key in value):
            return {"<ulids>": sorted(map(_mask, value.values()), key=json.dumps)}
        return {key: _mask(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_mask(item) for item in value]
    if isinstance(value, str):
        return _mask_text(value, name)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _mask_text(text: str, name: str) -> str:
    if name in _MASKS:
        return _MASKS[name]
    if name in _CREATED:
        return "<time>"
    text = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{4,9}Z", "<now>", text)
    text = re.sub(r"must be after \S+", "must be after <now>", text)
    # The first line is the error, the others repeat OpenMeter's API description.
    return _ULID.sub("<ulid>", text.split("\nSchema:")[0])


def _without(value: Any, chance: list[str]) -> Any:
    """Mask the values at the dotted paths *chance*."""
    for path in chance:
        *way, last = (int(x) if x.isdigit() else x for x in path.split("."))
        place = value
        for step in way:
            place = place[step]
        place[last] = "<chance>"
    return value


def _sorted(value: Any) -> Any:
    """Sort the rows of lists and CSV documents, which are unordered."""
    if isinstance(value, dict):
        return {key: _sorted(item) for key, item in value.items()}
    if isinstance(value, list):
        items = [_sorted(item) for item in value]
        if items and all(isinstance(x, dict) and x.keys() & _ROWS for x in items):
            return sorted(items, key=lambda x: json.dumps(x, sort_keys=True))
        return items
    if isinstance(value, str) and value.startswith("window_start,"):
        return "\n".join(sorted(value.splitlines()))
    return value


_ROWS = {"event", "windowStart"}

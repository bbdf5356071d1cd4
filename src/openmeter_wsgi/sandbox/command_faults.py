"""``--fault``: what is wrong from the start, as one word on the command line."""

from __future__ import annotations

from typing import Any

import click

from openmeter_wsgi.sandbox.faults import GROUPS, Settings

#: The name on the command line to the name in Python.
OPTIONS = {
    "fail-rate": "fail_rate",
    "latency": "latency",
    "hang": "hang",
    "outage": "outage",
    "retry-after": "retry_after",
}
Fault = tuple[tuple[str, ...], dict[str, Any]]


class FaultType(click.ParamType):  # type: ignore[type-arg] # no generic before 8.2
    """``WHERE:FAULT[=VALUE]``: the groups of requests, and one setting of theirs."""

    name = "WHERE:FAULT"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Fault:
        """Return the groups that *value* names and what it sets."""
        where, _, rest = str(value).partition(":")
        fault, equals, text = rest.partition("=")
        groups = GROUPS if where == "both" else (where,)
        if not set(groups) <= set(GROUPS) or fault not in OPTIONS:
            self.fail(_expected(value), param, ctx)
        try:
            setting = {OPTIONS[fault]: _read(fault, text) if equals else _FULL[fault]}
            Settings(**setting)
        except (KeyError, ValueError) as error:
            reason = "it needs a value" if isinstance(error, KeyError) else str(error)
            self.fail(f"{value!r}: {reason}", param, ctx)
        return groups, setting


#: What a fault means that is named without a value.
_FULL: dict[str, Any] = {"outage": True, "fail-rate": 1.0}


def _read(fault: str, text: str) -> Any:
    if fault == "outage":
        raise ValueError("an outage has no value")
    return float(text)


def _expected(value: str) -> str:
    where = "|".join((*GROUPS, "both"))
    return f"{value!r}: expected {where}:{'|'.join(OPTIONS)}, such as both:outage"

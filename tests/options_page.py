"""Reference of all options in docs/options.md, generated from the code.

    python -m tests.options_page

This command rewrites the reference, below the marker of the page. Names, types and
defaults are those of the fields of `Policy`; the text is the comment above a field. The
page is committed, and a test fails if it differs from the code.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

from sphinx.pycode import ModuleAnalyzer

from openmeter_wsgi import Policy
from openmeter_wsgi.options import AS_JSON, AS_LIST
from openmeter_wsgi.policy import (
    PER_ROUTE,
    BillingOptions,
    DeliveryOptions,
    EntitlementOptions,
)
from tests.option_values import can_be_none, can_be_written, default, takes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PAGE = Path(__file__).parents[1] / "docs" / "options.md"
MARKER = "<!-- Made by `python -m tests.options_page` from the code. -->\n"
#: The options that most applications set, first on the page.
COMMON = (
    "api_key", "api_url", "meters", "meter", "subject", "routes", "spool_dir",
    "required_entitlements",
)  # fmt: skip
#: The other options, in the order of the page.
PARTS: dict[str, type] = {
    "More for billing": BillingOptions,
    "More for entitlements": EntitlementOptions,
    "More for delivery": DeliveryOptions,
}


class Option(NamedTuple):
    """One option, in Markdown."""

    name: str
    takes: str
    default: str
    #: None if no text can state a value.
    variable: str | None
    #: The form of the variable's text, where it is not the value itself.
    form: str
    #: True if a route or a view may have its own.
    per_route: bool
    meaning: str


def reference() -> str:
    """Return the reference in Markdown.

    :raises ValueError: naming the options without a comment in the code.
    """
    parts = {name: options_of(part) for name, part in PARTS.items()}
    by_name = {option.name: option for part in parts.values() for option in part}
    if missing := [option.name for option in by_name.values() if not option.meaning]:
        raise ValueError(f"no comment in the code describes {', '.join(missing)}")
    expected = {field.name for field in dataclasses.fields(Policy) if field.init}
    if missing := sorted(expected - by_name.keys()):
        raise ValueError(f"no part of the page has {', '.join(missing)}")
    page = {"The eight that most applications set": [by_name[name] for name in COMMON]}
    for title, part in parts.items():
        page[title] = [option for option in part if option.name not in COMMON]
    return "\n".join(_lines(page))


def options_of(part: type) -> list[Option]:
    """Return the options that *part* of Policy has."""
    comments = ModuleAnalyzer.for_module(part.__module__).find_attr_docs()
    hints = get_type_hints(Policy, include_extras=True)
    return [
        _option(field, hints[field.name], comments.get((part.__name__, field.name), []))
        for field in dataclasses.fields(part)
    ]


def _option(field: dataclasses.Field[Any], hint: Any, comment: list[str]) -> Option:
    kinds = takes(hint)
    if can_be_none(hint) and field.default is not None:
        kinds += " or `None`"
    return Option(
        field.name,
        kinds,
        default(field),
        f"OPENMETER_{field.name.upper()}" if can_be_written(hint) else None,
        " (JSON)" if field.name in AS_JSON else " (a, b)" * (field.name in AS_LIST),
        field.name in PER_ROUTE,
        _markdown("\n".join(comment).strip()),
    )


def _markdown(text: str) -> str:
    """Convert the reStructuredText of our comments to Markdown."""
    text = re.sub(r":func:`(\w+)`", r"`\1()`", text)
    return text.replace("``", "`")


def _lines(page: dict[str, list[Option]]) -> Iterator[str]:
    for title, options in page.items():
        yield from (f"## {title}", "", *_table(options), "")
        for option in options:
            yield from (f"### {option.name}", "", option.meaning, "")
            yield f"Takes {option.takes}; default `{option.default}`."
            yield ""


def _table(options: Iterable[Option]) -> Iterator[str]:
    yield "| option | default | variable | per route |"
    yield "|---|---|---|---|"
    for option in options:
        variable = (
            f"`{option.variable}`{option.form}" if option.variable else "only in Python"
        )
        per_route = "yes" if option.per_route else "no"
        yield (
            f"| [`{option.name}`](#{option.name}) | `{option.default}` | {variable} "
            f"| {per_route} |"
        )


def main() -> None:
    """Rewrite the page."""
    before, _, _ = PAGE.read_text().partition(MARKER)
    PAGE.write_text(f"{before}{MARKER}\n{reference()}")


if __name__ == "__main__":
    main()

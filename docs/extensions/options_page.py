"""The directive ``policy-options``: every option of a policy, as the code has it.

Name, type and default are those of the fields of Policy; the meaning is the comment
above a field. A field without one ends the build.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

from option_values import can_be_none, can_be_written, default, takes
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

from openmeter_wsgi import Policy
from openmeter_wsgi.options import AS_JSON, AS_LIST
from openmeter_wsgi.policy import (
    PER_ROUTE,
    BillingOptions,
    DeliveryOptions,
    EntitlementOptions,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from docutils import nodes
    from sphinx.application import Sphinx

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
    """One option, each part of it in reStructuredText."""

    name: str
    takes: str
    default: str
    #: None where no text can say a value.
    variable: str | None
    #: In what form the variable is written, where that is not the value itself.
    form: str
    #: Whether a route or a view may have its own.
    per_route: bool
    meaning: list[str]


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the directive."""
    app.add_directive("policy-options", PolicyOptions)
    return {"parallel_read_safe": True}


class PolicyOptions(SphinxDirective):
    """Shows the options of a policy: a table first, then each by itself."""

    def run(self) -> list[nodes.Node]:
        """Return the tables and entries that replace the directive."""
        parts = {name: options_of(part) for name, part in PARTS.items()}
        options = [option for part in parts.values() for option in part]
        if unsaid := [option.name for option in options if not option.meaning]:
            raise self.error(
                f"no comment in the code says what these are: {', '.join(unsaid)}"
            )
        expected = {field.name for field in dataclasses.fields(Policy) if field.init}
        if missing := expected - {option.name for option in options}:
            raise self.error(f"no part of the page has {', '.join(missing)}")
        by_name = {option.name: option for option in options}
        page = {
            "The eight that most applications set": [by_name[each] for each in COMMON],
            **{
                title: [option for option in part if option.name not in COMMON]
                for title, part in parts.items()
            },
        }
        text = "\n".join(_page(page))
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def options_of(part: type) -> list[Option]:
    """Return the options that *part* of Policy has."""
    analyzer = ModuleAnalyzer.for_module(part.__module__)
    meanings = analyzer.find_attr_docs()
    hints = get_type_hints(Policy, include_extras=True)
    return [
        _option(field, hints[field.name], meanings.get((part.__name__, field.name), []))
        for field in dataclasses.fields(part)
    ]


def _option(field: dataclasses.Field[Any], hint: Any, meaning: list[str]) -> Option:
    kinds = takes(hint)
    if can_be_none(hint) and field.default is not None:
        kinds += " or ``None``"
    return Option(
        field.name,
        kinds,
        default(field),
        f"OPENMETER_{field.name.upper()}" if can_be_written(hint) else None,
        " (JSON)" if field.name in AS_JSON else " (a, b)" * (field.name in AS_LIST),
        field.name in PER_ROUTE,
        meaning,
    )


# -- The page, in MyST: tables and headings are its own, entries are Sphinx's


def _page(parts: dict[str, list[Option]]) -> Iterator[str]:
    for name, options in parts.items():
        yield from (f"## {name}", "", *_table(options), "")
        for option in options:
            yield from ("```{eval-rst}", *_entry(option), "```", "")


def _table(options: Iterable[Option]) -> Iterator[str]:
    yield "| option | default | variable | per route |"
    yield "|---|---|---|---|"
    for option in options:
        variable = (
            f"`{option.variable}`{option.form}" if option.variable else "only in Python"
        )
        per_route = "yes" if option.per_route else "no"
        yield (
            f"| {{confval}}`{option.name}` | `{option.default}` | {variable} "
            f"| {per_route} |"
        )


def _entry(option: Option) -> Iterator[str]:
    yield ".. currentmodule:: openmeter_wsgi"
    yield ""
    yield f".. confval:: {option.name}"
    yield f"   :type: {option.takes}"
    yield f"   :default: ``{option.default}``"
    yield ""
    yield from (f"   {line}" for line in option.meaning)

"""Routes of Django's as one reads them: one name each, in all languages."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.contrib.admindocs import utils as patterns
from django.urls import get_resolver
from django.urls.resolvers import LocalePrefixPattern
from django.utils import translation

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from django.http import HttpRequest


def route_name(request: HttpRequest) -> str | None:
    """Return the template of a resolved request's address, with the site's mount."""
    match = request.resolver_match
    if match is None:
        return None
    route = match.route or ""
    if settings.USE_I18N:
        urlconf = getattr(request, "urlconf", None) or settings.ROOT_URLCONF
        route = _untranslated(urlconf, translation.get_language(), route)
    # Django has decoded the mount.
    mount: str = request.META["SCRIPT_NAME"].rstrip("/")
    return mount + template_of(route)


@functools.lru_cache(maxsize=10_000)
def template_of(route: str | None) -> str:
    """Return the route of a resolved view as one reads it: ``/users/<int:pk>/``.

    Regular expressions, which routers of the REST framework make, lose their grammar.
    """
    text = route or ""
    if not _IS_PLAIN.fullmatch(text):
        text = patterns.remove_non_capturing_groups(text)
        text = patterns.replace_named_groups(text)
        text = patterns.replace_unnamed_groups(text)
        text = patterns.replace_metacharacters(text)
    return "/" + text.lstrip("/")


#: What `django.urls.path` takes, and what nobody would mean as a regular expression.
_IS_PLAIN = re.compile(r"(?:[^^$()\\<>]|<[^()<>]*>)*")


@functools.lru_cache(maxsize=10_000)
def _untranslated(urlconf: Any, language: str | None, route: str) -> str:  # noqa: ARG001
    """Return *route* without the prefix of `i18n_patterns` and without translations.

    *language* is the active one, in which *route* is said.
    """
    resolver = get_resolver(urlconf)
    said = list(_routes(resolver.url_patterns, "", with_prefix=True))
    with translation.override(None):
        plain = list(_routes(resolver.url_patterns, "", with_prefix=False))
    return dict(zip(reversed(said), reversed(plain), strict=True)).get(route, route)


def _routes(urls: Iterable[Any], before: str, *, with_prefix: bool) -> Iterator[str]:
    """Yield the routes below *before*, joined as Django joins them."""
    for url in urls:
        is_prefix = isinstance(url.pattern, LocalePrefixPattern)
        own = "" if is_prefix and not with_prefix else str(url.pattern)
        route = before + (own.removeprefix("^") if before else own)
        if hasattr(url, "url_patterns"):
            yield from _routes(url.url_patterns, route, with_prefix=with_prefix)
        else:
            yield route

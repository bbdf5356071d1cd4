"""Zuplo's configuration as the options of one middleware."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from openmeter_wsgi import log
from openmeter_wsgi.zuplo.policies import read_policies
from openmeter_wsgi.zuplo.routes import read_routes
from openmeter_wsgi.zuplo.translation import DELIVERY, Translation, translate

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = log.get_logger(__name__)

#: How long an allowance is kept is one for the whole process here.
_LIFETIME = "allow_ttl"


def options_of(
    policies: str | os.PathLike[str],
    routes: str | os.PathLike[str] | None,
    environ: Mapping[str, str],
) -> dict[str, Any]:
    """Return the options that the files say; warn of what they say in vain.

    :raises ConfigError: with every problem, each with its place.
    """
    read = read_policies(os.fspath(policies), environ)
    rules = None if routes is None else read_routes(os.fspath(routes), read)
    translation = translate(read, rules)
    for warning in translation.warnings:
        logger.warning("Zuplo's configuration: %s", warning)
    if translation.default_options is not None:
        return translation.default_options
    return _by_route(translation)


def _by_route(translation: Translation) -> dict[str, Any]:
    own = {rule: dict(said) if said else None
           for rule, said in translation.routes.items()}  # fmt: skip
    lifetimes = set()
    for said in filter(None, own.values()):
        lifetimes.add(said.pop(_LIFETIME, None))
        for name in DELIVERY:
            said.pop(name, None)
    options = {**translation.delivery, "routes": own, "unmatched": None}
    if known := [each for each in lifetimes if each is not None]:
        options[_LIFETIME] = min(known)
    return options

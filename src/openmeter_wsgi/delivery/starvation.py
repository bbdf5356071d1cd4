"""Servers that run us and leave our threads no time while they wait for a request."""

from __future__ import annotations

import sys
from typing import Any

from openmeter_wsgi.ownership import threads_are_greenlets

#: From this version on uWSGI lets threads run without being told to.
_ALWAYS_THREADED = (2, 0, 27)
#: Each of these options of uWSGI does, too.
_OPTIONS = ("enable-threads", "threads")
_NO = (False, None, b"false", b"no", b"off", b"0")


def threads_starve() -> bool:
    """Say whether a thread of this process runs only while a request is served.

    An older uWSGI without `enable-threads` keeps the GIL while a worker is idle. A
    lock that a thread holds then is held until the next request, or for ever.
    """
    # Made by the server itself: it can be imported nowhere else.
    uwsgi: Any = sys.modules.get("uwsgi")
    options = getattr(uwsgi, "opt", None)
    version = getattr(uwsgi, "version_info", None)
    if not isinstance(options, dict) or not isinstance(version, tuple):
        return False
    if version[:3] >= _ALWAYS_THREADED or threads_are_greenlets():
        return False
    return all(_said(options, name) in _NO for name in _OPTIONS)


def _said(options: dict[Any, Any], name: str) -> object:
    # Under the name as text or as bytes, by version; the value is True or bytes.
    return options.get(name, options.get(name.encode()))

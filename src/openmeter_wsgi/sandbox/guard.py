"""Who may talk to the sandbox: this machine's programs, not other sites' pages."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from flask import request

from openmeter_wsgi.sandbox.problems import Problem

if TYPE_CHECKING:
    from flask import Flask, Response

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
        " connect-src 'self'; base-uri 'none'; form-action 'none';"
        # No text becomes markup or code, whatever a script does with it.
        " frame-ancestors 'none'; require-trusted-types-for 'script';"
        " trusted-types 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def install(app: Flask, bound: str) -> None:
    """Guard *app*, which listens at the address *bound*."""

    @app.before_request
    def check() -> None:
        host = request.headers.get("Host", "")
        if not is_allowed(host, bound):
            # A page of another site whose name was made to point at this machine.
            raise Problem(403, f"host {host!r} is not a name of this sandbox")
        if request.method not in ("GET", "HEAD") and _is_foreign(host):
            raise Problem(403, "requests from pages of other sites are refused")

    @app.after_request
    def protect(response: Response) -> Response:
        response.headers.update(HEADERS)
        response.headers.setdefault("Cache-Control", "no-store")
        return response


def is_allowed(host: str, bound: str) -> bool:
    """Return whether a Host header can only mean this sandbox."""
    name = _name(host)
    if name is None:
        return False
    if name in (bound.lower(), "localhost") or name.endswith(".localhost"):
        return True
    address = _address(name)
    if _is_loopback(bound):
        return address is not None and address.is_loopback
    # Reachable from other machines: under any address, and under names without a
    # dot (a container's), which no foreign site can own.
    return address is not None or "." not in name


def _name(host: str) -> str | None:
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        return None
    return name if name and "@" not in host and "/" not in host else None


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _is_loopback(bound: str) -> bool:
    address = _address(bound)
    return bound == "localhost" or (address is not None and address.is_loopback)


def _is_foreign(host: str) -> bool:
    if request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
        return True
    origin = request.headers.get("Origin")
    return origin is not None and urlsplit(origin).netloc.lower() != host.lower()

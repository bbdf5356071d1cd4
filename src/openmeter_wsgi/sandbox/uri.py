"""URI references as Go's ``net/url`` parses and writes them.

CloudEvents sources pass through ``url.Parse`` in OpenMeter, which refuses names that
look innocent (``127.0.0.1:8080``) and re-encodes others (``my api``).
"""

from __future__ import annotations

import re
from urllib.parse import quote, unquote

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2}).{0,2}", re.DOTALL)
_VALID = re.compile(r"[A-Za-z0-9_.~!$&'()*+,;=:@/\[\]%-]*")
_SAFE = "$&+,/:;=@"


class InvalidURI(ValueError):
    """A text that Go does not take for a URI reference."""


def reencode(reference: str) -> str:
    """Return *reference* the way Go writes it after parsing it."""
    if any(ch < " " or ch == "\x7f" for ch in reference):
        raise _invalid(reference, "net/url: invalid control character in URL")
    rest, hash_, fragment = reference.partition("#")
    scheme, rest = _split_scheme(reference, rest)
    path, mark, query = rest.partition("?")
    if scheme and not path.startswith("/"):
        # Go calls this opaque (urn:x:y) and keeps it as it is.
        return f"{scheme}:{path}{mark}{query}{hash_}{_escape(reference, fragment)}"
    if not scheme and ":" in path.split("/", 1)[0]:
        raise _invalid(reference, "first path segment in URL cannot contain colon")
    authority, path = _split_authority(reference, path)
    head = f"{scheme.lower()}:" if scheme else ""
    head += f"{authority}{_escape(reference, path)}{mark}{query}"
    return f"{head}#{_escape(reference, fragment)}" if fragment else head


def _invalid(reference: str, reason: str) -> InvalidURI:
    return InvalidURI(f'parse "{reference}": {reason}')


def _split_scheme(reference: str, rest: str) -> tuple[str, str]:
    if rest.startswith(":"):
        raise _invalid(reference, "missing protocol scheme")
    if found := _SCHEME.match(rest):
        return found[1], rest[found.end() :]
    return "", rest


def _split_authority(reference: str, path: str) -> tuple[str, str]:
    if not path.startswith("//") or path.startswith("///"):
        return "", path
    host, slash, path = path[2:].partition("/")
    port = re.search(r":([^\]:]*)$", host)
    if port and not re.fullmatch("[0-9]*", port[1], re.ASCII):
        raise _invalid(reference, f'invalid port ":{port[1]}" after host')
    if " " in host:
        raise _invalid(reference, 'invalid character " " in host name')
    if bad := _ESCAPE.search(host):
        raise _invalid(reference, f'invalid URL escape "{bad[0]}"')
    return f"//{host}", slash + path


def _escape(reference: str, part: str) -> str:
    if bad := _ESCAPE.search(part):
        raise _invalid(reference, f'invalid URL escape "{bad[0]}"')
    if _VALID.fullmatch(part):
        return part
    return quote(unquote(part), safe=_SAFE)

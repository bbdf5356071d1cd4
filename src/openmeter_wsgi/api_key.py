"""The API key: a text, a callable or a file, and never seen in a repr.

And what the address of a server says: whether it needs a key, and its version 3.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable

#: OpenMeter Cloud and Kong Konnect; a server of one's own has no authentication.
_HOSTED = (".openmeter.cloud", ".konghq.com")
#: A host of Kong Konnect is the name of a region and this.
_KONNECT = "api.konghq.com"


def is_konnect(url: str) -> bool:
    """Return True if *url* is the address of Kong Konnect, in any region."""
    region, _, rest = (urlsplit(url).hostname or "").partition(".")
    return region != "" and rest == _KONNECT


def v3_url(url: str) -> str:
    """Return where version 3 of OpenMeter's API begins on the server at *url*."""
    return url + ("/v3/openmeter" if is_konnect(url) else "/api/v3/openmeter")


def checked_key(text: object) -> str:
    """Return the key in *text* without surrounding white space.

    :raises ValueError: if it cannot be sent in a header. The message never
        contains the key.
    """
    if not isinstance(text, str):
        raise ValueError(f"expected text, got {type(text).__name__}")
    key = text.strip()
    if not key:
        raise ValueError("expected a key, got empty text")
    for position, character in enumerate(key):
        if not "!" <= character <= "~":
            raise ValueError(
                f"expected visible ASCII characters, got another one at {position}"
            )
    return key


class ApiKey:
    """Where the key comes from. Read on first use, and again after a 401.

    Used by the sender alone, so it takes no lock.
    """

    def __init__(self, read: Callable[[], object] | None, name: str) -> None:
        self._read = read
        self._name = name
        self._key: str | None = None

    @classmethod
    def from_options(
        cls, key: str | Callable[[], str] | None, file: str | Path | None
    ) -> ApiKey:
        """Return the key that *key* or *file* says, or one that is no key.

        :raises ValueError: if a text or a file holds none. A callable is not
            called yet: it may do what only a worker process can.
        """
        if file is not None:
            path = Path(file)
            made = cls(path.read_text, f"api_key_file {str(path)!r}")
            made.current()
            return made
        if callable(key):
            return cls(key, "api_key()")
        if key is None:
            return cls(None, "no key")
        text = checked_key(key)
        return cls(lambda: text, "api_key")

    def current(self) -> str | None:
        """Return the key to send, None for a server that needs none.

        :raises ValueError: if it cannot be read now, naming where it is read.
        """
        if self._key is None and self._read is not None:
            self._key = self._fresh(self._read)
        return self._key

    @property
    def known(self) -> str | None:
        """The key that was read last, None before that."""
        return self._key

    def renew(self) -> bool:
        """Read the key again and say whether it is another one."""
        if self._read is None:
            return False
        before, self._key = self._key, None
        self._key = self._fresh(self._read)
        return self._key != before

    def required_by(self, url: str) -> bool:
        """Return True if there is no key and the server at *url* needs one."""
        host = urlsplit(url).hostname or ""
        hosted = host == "openmeter.cloud" or host.endswith(_HOSTED)
        return self._read is None and hosted

    def _fresh(self, read: Callable[[], object]) -> str:
        try:
            return checked_key(read())
        except ValueError as error:
            raise ValueError(f"{self._name}: {error}") from None
        except Exception as error:
            # A callable is the user's own and may raise anything at all.
            raise ValueError(
                f"{self._name}: cannot be read: {type(error).__name__}: {error}"
            ) from error

    def __repr__(self) -> str:
        return f"<ApiKey from {self._name}>"

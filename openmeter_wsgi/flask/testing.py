"""A test client whose responses end, as those of a server do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flask.testing import FlaskClient

if TYPE_CHECKING:
    from werkzeug.test import TestResponse

_WITHOUT_BODY = (204, 304)


class _Settling:
    """Reads a response and closes it; a stream is left to the test.

    A request is metered when its response is closed, and Flask's test client leaves
    that to whoever collects garbage.
    """

    def open(self, *args: Any, **kwargs: Any) -> TestResponse:
        """Send a request; see :class:`werkzeug.test.Client`."""
        response: TestResponse = super().open(*args, **kwargs)  # type: ignore[misc]
        ends = response.content_length is not None
        if ends or response.status_code in _WITHOUT_BODY:
            response.get_data()
            response.close()
        return response


def settling(client: type[FlaskClient] | None) -> type[FlaskClient]:
    """Return *client*, or Flask's own, as one that ends its responses."""
    base = client or FlaskClient
    return type(base.__name__, (_Settling, base), {})

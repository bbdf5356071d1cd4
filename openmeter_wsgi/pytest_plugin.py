"""The pytest fixture ``openmeter``, to test the billing of an application.

Every run of pytest in an environment with the package imports this module, so it and
``openmeter_wsgi`` itself import nothing else at the top.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openmeter_wsgi.testing import OpenMeter


@pytest.fixture
def openmeter() -> Iterator[OpenMeter]:
    """Collect the events that every OpenMeterMiddleware would send to OpenMeter."""
    from openmeter_wsgi.testing import OpenMeter

    with OpenMeter() as stand_in:
        yield stand_in

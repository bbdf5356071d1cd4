"""The pytest fixture ``openmeter``: billing of an application in its own tests.

This module is imported in every run of pytest where the package is installed, whether
it is needed there or not: so it imports nothing, and nor does the package itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openmeter_wsgi.testing import OpenMeter


@pytest.fixture
def openmeter() -> Iterator[OpenMeter]:
    """Stand in for OpenMeter: collect what every OpenMeterMiddleware would send."""
    from openmeter_wsgi.testing import OpenMeter

    with OpenMeter() as stand_in:
        yield stand_in

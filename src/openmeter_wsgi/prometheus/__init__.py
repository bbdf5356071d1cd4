"""Metrics for Prometheus: what a middleware counts, read where nobody waits for it.

Needs the extra ``prometheus``. One call does it, in one process or in many::

    application = OpenMeterMiddleware(application)
    export_metrics(application)

A single process is asked when it is scraped. In prometheus_client's multi-process mode
(``PROMETHEUS_MULTIPROC_DIR``) the process that is scraped cannot ask the others, and
custom collectors are left out; so each process that has settled a request writes its
counts into that directory every few seconds, and once more when it ends.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY

from openmeter_wsgi.prometheus.publishing import ProcessMetrics, begin
from openmeter_wsgi.prometheus.scraping import OpenMeterCollector

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from openmeter_wsgi.middleware import OpenMeterMiddleware


def export_metrics(
    middleware: OpenMeterMiddleware,
    *,
    registry: CollectorRegistry = REGISTRY,
    prefix: str = "openmeter_wsgi",
    interval: float = 5.0,
) -> None:
    """Let Prometheus see what *middleware* counts, of all of its processes.

    :param prefix: another one for each further middleware of the same process.
    :param interval: seconds between two writes, in multi-process mode.
    :raises ValueError: if there are metrics of this name.
    """
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        in_spool = middleware.policy.spool_dir is not None
        metrics = ProcessMetrics(registry, prefix, in_spool=in_spool)
        middleware.on_first_request(lambda process: begin(process, metrics, interval))
    else:
        registry.register(OpenMeterCollector(middleware, prefix))

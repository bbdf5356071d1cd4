"""The metrics of many processes: each writes its own, where the others find them."""

from __future__ import annotations

import atexit
import threading
import time
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter, Gauge, Histogram

from openmeter_wsgi import log
from openmeter_wsgi.prometheus.figures import COUNTERS, GAUGES, HISTOGRAMS, age
from openmeter_wsgi.stats import BOUNDS

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from openmeter_wsgi.process import Process

logger = log.get_logger(__name__)


class ProcessMetrics:
    """prometheus_client's own metrics, which keep their values in its directory."""

    def __init__(
        self, registry: CollectorRegistry, prefix: str, *, in_spool: bool
    ) -> None:
        # All processes see one spool; of their own memory each sees another.
        mode: Any = "livemax" if in_spool else "livesum"
        self.counters = [
            Counter(f"{prefix}_{f.name}", f.help, f.labels, registry=registry)
            for f in COUNTERS
        ]
        self.gauges = [
            Gauge(
                f"{prefix}_{f.name}",
                f.help,
                f.labels,
                registry=registry,
                multiprocess_mode="livemax" if f.read is age else mode,
            )
            for f in GAUGES
        ]
        self.histograms = {
            name: Histogram(f"{prefix}_{name}", text, registry=registry, buckets=BOUNDS)
            for name, text in HISTOGRAMS.items()
        }


class _Publisher:
    """Writes the counts of one process into prometheus_client's metrics."""

    def __init__(self, process: Process, metrics: ProcessMetrics) -> None:
        self._process = process
        self._metrics = metrics
        self._written: dict[tuple[str, tuple[str, ...]], float] = {}
        self._writing = threading.Lock()

    def publish(self) -> None:
        """Write what has changed. Any thread."""
        if not self._process.guard.fits():
            return
        with self._writing:
            stats = self._process.stats()
            for figure, counter in zip(COUNTERS, self._metrics.counters, strict=True):
                for labels, value in figure.read(stats).items():
                    self._add(counter, figure.name, labels, value)
            for figure, gauge in zip(GAUGES, self._metrics.gauges, strict=True):
                gauge.set(figure.read(stats)[()])
            for name, histogram in self._metrics.histograms.items():
                for seconds in getattr(self._process.counts, name).fetch_recent():
                    histogram.observe(seconds)

    def run(self, interval: float) -> None:
        """Write every so many seconds. The thread's body."""
        while True:
            time.sleep(interval)
            try:
                self.publish()
            except Exception:
                logger.exception("%s: could not be written; tried again in %.0f s",
                                 "metrics", interval)  # fmt: skip

    def _add(
        self, counter: Counter, name: str, labels: tuple[str, ...], value: float
    ) -> None:
        before = self._written.get((name, labels), 0.0)
        if value > before:
            (counter.labels(*labels) if labels else counter).inc(value - before)
            self._written[name, labels] = value


def begin(process: Process, metrics: ProcessMetrics, interval: float) -> None:
    """Write from now on what *process* counts, until its process ends."""
    publisher = _Publisher(process, metrics)
    publisher.publish()
    # Before the exit hook of the delivery, and so run after it.
    atexit.register(publisher.publish)
    thread = threading.Thread(
        target=publisher.run,
        args=(interval,),
        name="openmeter_wsgi.metrics",
        daemon=True,
    )
    try:
        thread.start()
    except RuntimeError as error:
        logger.error("%s: metrics are written at the exit of this process only", error)

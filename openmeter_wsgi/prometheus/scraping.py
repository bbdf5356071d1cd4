"""The metrics of a single process: it is asked when it is scraped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import Collector

from openmeter_wsgi.prometheus.figures import COUNTERS, GAUGES, HISTOGRAMS
from openmeter_wsgi.stats import BOUNDS, Durations

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client.metrics_core import Metric

    from openmeter_wsgi.middleware import OpenMeterMiddleware


class OpenMeterCollector(Collector):
    """The counts of the process that is asked, at the moment when it is."""

    def __init__(self, middleware: OpenMeterMiddleware, prefix: str) -> None:
        self._middleware = middleware
        self._prefix = prefix

    def describe(self) -> Iterable[Metric]:
        """Return the names, without looking anything up."""
        for figure in COUNTERS:
            yield CounterMetricFamily(self._name(figure.name), figure.help)
        for figure in GAUGES:
            yield GaugeMetricFamily(self._name(figure.name), figure.help)
        for name, text in HISTOGRAMS.items():
            yield HistogramMetricFamily(self._name(name), text)

    def collect(self) -> Iterable[Metric]:
        """Return the figures of this moment."""
        stats = self._middleware.stats()
        kinds: Any = ((CounterMetricFamily, COUNTERS), (GaugeMetricFamily, GAUGES))
        for kind, figures in kinds:
            for figure in figures:
                family = kind(
                    self._name(figure.name), figure.help, labels=figure.labels
                )
                for labels, value in figure.read(stats).items():
                    family.add_metric(labels, value)
                yield family
        for name, text in HISTOGRAMS.items():
            yield _histogram(self._name(name), text, getattr(stats, name))

    def _name(self, name: str) -> str:
        return f"{self._prefix}_{name}"


def _histogram(name: str, text: str, durations: Durations) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, text)
    so_far = 0
    buckets = []
    for bound, n in zip((*BOUNDS, float("inf")), durations.counts, strict=True):
        so_far += n
        buckets.append(("+Inf" if bound == float("inf") else str(bound), so_far))
    family.add_metric((), buckets, durations.seconds)
    return family

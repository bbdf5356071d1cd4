"""Metrics for Prometheus: the counts of a middleware in one process, or in several.

Needs the extra ``prometheus``. One call is enough, with one process or many::

    application = OpenMeterMiddleware(application)
    export_metrics(application)

A single process reads its counts when it is scraped. In the multi-process mode of
prometheus_client (``PROMETHEUS_MULTIPROC_DIR``) the scraped process cannot ask the
others, so each process that has settled a request writes its counts into that directory
every few seconds, and once more when it ends.
"""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from openmeter_wsgi import log
from openmeter_wsgi.errors import ConfigError, missing_extra
from openmeter_wsgi.stats import BOUNDS, Durations

try:
    from prometheus_client import REGISTRY, Counter, Gauge, Histogram
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
    )
    from prometheus_client.registry import Collector
except ModuleNotFoundError as _missing:
    raise missing_extra(_missing, "prometheus") from None

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

    from openmeter_wsgi.middleware import OpenMeterMiddleware
    from openmeter_wsgi.process import Process
    from openmeter_wsgi.stats import Stats

logger: Final = log.get_logger(__name__)


#: Values of a metric by the values of its labels.
Figures: TypeAlias = "Mapping[tuple[str, ...], float]"


class Figure(NamedTuple):
    """A metric: its name, help, labels, and the function that reads it."""

    name: str
    help: str
    labels: tuple[str, ...]
    read: Callable[[Stats], Figures]


def _by_reason(name: str) -> Callable[[Stats], Figures]:
    return lambda stats: {(reason,): n for reason, n in getattr(stats, name).items()}


def _one(name: str) -> Callable[[Stats], Figures]:
    return lambda stats: {(): getattr(stats, name)}


def _not_metered(stats: Stats) -> Figures:
    return {
        (policy, reason): n
        for policy, reasons in stats.not_metered_by_policy.items()
        for reason, n in reasons.items()
    }


def _decisions(stats: Stats) -> Figures:
    results = {
        "allowed": stats.allowed,
        "denied": stats.denied_by_source,
        "let_through": stats.let_through_by_source,
    }
    return {(result, source): n for result, sources in results.items()
            for source, n in sources.items()}  # fmt: skip


def _denials(stats: Stats) -> Figures:
    results = {"denied": stats.denied, "let_through": stats.let_through}
    return {(result, reason): n for result, reasons in results.items()
            for reason, n in reasons.items()}  # fmt: skip


def seconds_since(stats: Stats) -> Figures:
    """Return the age of the oldest waiting event in seconds, 0 if none waits."""
    return {(): max(time.time() - stats.oldest_at, 0.0) if stats.oldest_at else 0.0}


COUNTERS = (
    Figure("requests_settled", "Requests whose response has ended.", (),
            _one("settled")),
    Figure("requests_metered", "Requests that became events.", (), _one("metered")),
    Figure("requests_not_metered", "Requests that became no event.",
            ("policy", "reason"), _not_metered),
    Figure("requests_remarked", "Requests billed by an ambiguous body.",
            ("remark",), _by_reason("remarks")),
    Figure("events", "Events made of requests.", (), _one("events")),
    Figure("events_delivered", "Events that OpenMeter accepted.", (),
            _one("delivered")),
    Figure("events_dropped", "Events and meters that were dropped.", ("reason",),
            _by_reason("dropped")),
    Figure("events_dead_lettered", "Events that became dead letters.", (),
            _one("dead_lettered")),
    Figure("events_unspooled", "Events that the spool could not take.", (),
            _one("unspooled")),
    Figure("delivery_retries", "Attempts after the first one of a batch.", (),
            _one("retries")),
    Figure("delivery_ambiguous",
            "Attempts with no answer or a 5xx, whose events may have arrived.", (),
            _one("ambiguous")),
    Figure("entitlement_decisions", "Decisions by the source of the answer.",
            ("result", "source"), _decisions),
    Figure("entitlement_denials", "Features denied, or allowed in spite of a denial.",
            ("result", "reason"), _denials),
)  # fmt: skip
GAUGES = (
    Figure("queue_events", "Events that wait for delivery.", (), _one("waiting")),
    Figure("queue_bytes", "The bytes of the waiting events.", (),
            _one("waiting_bytes")),
    Figure("queue_oldest_age_seconds",
            "The age of the oldest waiting event in seconds.", (), seconds_since),
)  # fmt: skip
HISTOGRAMS = {
    "delivery_seconds": "The age of the oldest event of a batch at its delivery.",
    "attempt_seconds": "The time that OpenMeter took to answer an attempt.",
}


class OpenMeterCollector(Collector):
    """Collects the counts of this process at each scrape."""

    def __init__(self, middleware: OpenMeterMiddleware, prefix: str) -> None:
        self._middleware = middleware
        self._prefix = prefix

    def describe(self) -> Iterable[Metric]:
        """Return the metrics without values."""
        for figure in COUNTERS:
            yield CounterMetricFamily(self._name(figure.name), figure.help)
        for figure in GAUGES:
            yield GaugeMetricFamily(self._name(figure.name), figure.help)
        for name, text in HISTOGRAMS.items():
            yield HistogramMetricFamily(self._name(name), text)

    def collect(self) -> Iterable[Metric]:
        """Return the metrics with the current counts."""
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
    cumulative = 0
    buckets = []
    for bound, n in zip((*BOUNDS, float("inf")), durations.counts, strict=True):
        cumulative += n
        buckets.append(("+Inf" if bound == float("inf") else str(bound), cumulative))
    family.add_metric((), buckets, durations.seconds)
    return family


class ProcessMetrics:
    """Metrics of prometheus_client, which stores their values in its directory."""

    def __init__(
        self, registry: CollectorRegistry, prefix: str, *, in_spool: bool
    ) -> None:
        # All processes report the same spool, but each its own memory.
        mode: Any = "livemax" if in_spool else "livesum"
        self.counters: list[Counter] = [
            Counter(f"{prefix}_{f.name}", f.help, f.labels, registry=registry)
            for f in COUNTERS
        ]
        self.gauges: list[Gauge] = [
            Gauge(
                f"{prefix}_{f.name}",
                f.help,
                f.labels,
                registry=registry,
                multiprocess_mode="livemax" if f.read is seconds_since else mode,
            )
            for f in GAUGES
        ]
        self.histograms: dict[str, Histogram] = {
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
        """Write the changes of the counts. Called on any thread."""
        if not self._process.guard.is_valid():
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
        """Publish every *interval* seconds. Runs on a thread of its own."""
        while True:
            time.sleep(interval)
            try:
                self.publish()
            except Exception:
                logger.exception("metrics could not be written; the next attempt is in "
                                 "%.0f s", interval)  # fmt: skip

    def _add(
        self, counter: Counter, name: str, labels: tuple[str, ...], value: float
    ) -> None:
        before = self._written.get((name, labels), 0.0)
        if value > before:
            (counter.labels(*labels) if labels else counter).inc(value - before)
            self._written[name, labels] = value


def begin(process: Process, metrics: ProcessMetrics, interval: float) -> None:
    """Publish the counts of *process* from now on until it exits."""
    publisher = _Publisher(process, metrics)
    publisher.publish()
    process.transport.at_exit(publisher.publish)
    thread = threading.Thread(
        target=publisher.run,
        args=(interval,),
        name="openmeter_wsgi.metrics",
        daemon=True,
    )
    try:
        thread.start()
    except RuntimeError as error:
        logger.error("%s: metrics are written only when this process exits", error)


def export_metrics(
    middleware: OpenMeterMiddleware,
    *,
    registry: CollectorRegistry = REGISTRY,
    prefix: str = "openmeter_wsgi",
    interval: float = 5.0,
) -> None:
    """Export the counts of *middleware*, in all its processes, to Prometheus.

    :param prefix: prefix of the names; a second middleware needs another one.
    :param interval: seconds between two writes in multi-process mode.
    :raises ConfigError: if *registry* already has metrics with this prefix.
    """
    try:
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            in_spool = middleware.policy.spool_dir is not None
            metrics = ProcessMetrics(registry, prefix, in_spool=in_spool)
            middleware.on_first_request(
                lambda process: begin(process, metrics, interval)
            )
        else:
            registry.register(OpenMeterCollector(middleware, prefix))
    except ValueError:
        # Raised by prometheus_client for duplicate names.
        raise ConfigError(
            [
                f"export_metrics: the registry has metrics named {prefix}_… already: "
                "export each middleware once, and a second one with another prefix"
            ]
        ) from None

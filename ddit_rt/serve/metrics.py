"""What Prometheus is told, by the process that answers requests."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics

SECONDS = (0.01, 0.03, 0.1, 0.3, 0.5, 1, 2, 3, 5, 8, 12, 20, 30, 60, 120, 300, 600)
SPEEDUPS = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12)
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 32)


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def histogram(name: str, text: str, *labels: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(name, text, labels or ("model",), buckets=buckets, registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels or ("model",), registry=self.registry)

        self.requests = counter("ddit_requests", "Requests that ended.", "model", "endpoint", "code")
        self.request_seconds = histogram("ddit_request_seconds", "Whole requests.", "model", "endpoint")
        self.phases = {
            phase: histogram(f"ddit_{phase}_seconds", f"{phase} of a picture or video.".capitalize())
            for phase in ("queued", "encoding", "denoising", "decoding")
        }
        self.first_partial = histogram("ddit_first_partial_seconds", "From a request to its first preview.")
        self.speedup = histogram("ddit_speedup", "FLOP at p over FLOP spent.", buckets=SPEEDUPS)
        self.batch_size = histogram("ddit_batch_size", "Pictures that ran together.", buckets=BATCHES)
        self.steps = counter("ddit_steps", "Denoising steps.", "model", "size")
        self.in_flight = Gauge("ddit_in_flight", "Works asked of replicas.", ("model",), registry=self.registry)
        self.rejected = counter("ddit_rejected", "Requests refused before work.", "model", "reason")
        self.out_of_memory = counter("ddit_out_of_memory", "Works that did not fit into memory.")
        self.retries = counter("ddit_retries", "Works done again because a replica was lost.")
        self.cancelled = counter("ddit_cancelled", "Works whose client had gone.")
        self.video_jobs = Gauge("ddit_video_jobs", "Video jobs.", ("status",), registry=self.registry)

    def done(self, model: str, facts: dict[str, Any]) -> None:
        """Counts a picture or video that was made; ``facts`` as in :class:`ddit_rt.serve.work.Event`."""
        for phase, histogram in self.phases.items():
            histogram.labels(model).observe(facts["seconds"][phase])
        self.speedup.labels(model).observe(facts["speedup"])
        self.batch_size.labels(model).observe(facts["batch"])
        for size, count in facts["sizes"].items():
            self.steps.labels(model, size).inc(count)

    def text(self) -> tuple[bytes, str]:
        """The metrics and their content type."""
        return openmetrics(self.registry), CONTENT_TYPE_LATEST


def names() -> list[str]:
    """Of all metrics, counters with the ending that Prometheus gives them."""
    found = []
    for family in Metrics().registry.collect():
        found.append(f"{family.name}_total" if family.type == "counter" else family.name)
    return sorted(found)

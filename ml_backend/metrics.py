"""What Prometheus reads at /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from worker.contract import SegmentJob, SegmentResult

#: Seconds. A warm click takes tens of milliseconds; Label Studio gives up after 100 s.
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)


class Metrics:
    """Counters of one app, in a registry of its own so that two apps in one process do not meet."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("bald_sam_requests", "Requests answered.", ("route", "status"), registry=self.registry)
        self.seconds = Histogram(
            "bald_sam_request_seconds", "Time to answer.", ("route",), buckets=_BUCKETS, registry=self.registry
        )
        self.stages = Histogram(
            "bald_sam_stage_seconds", "Time of a click by stage.", ("stage",), buckets=_BUCKETS, registry=self.registry
        )
        self.proposals = Counter(
            "bald_sam_proposals",
            "Clicks answered, by whether a next click was proposed.",
            ("shown",),
            registry=self.registry,
        )
        self.events = Counter("bald_sam_events", "Events of Label Studio.", ("action",), registry=self.registry)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count one answered request."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def click(self, job: SegmentJob, result: SegmentResult) -> None:
        """Count one answered click. The timings of a result are in milliseconds."""
        for stage, milliseconds in result.timings.items():
            self.stages.labels(stage).observe(milliseconds / 1000)
        self.proposals.labels("yes" if result.proposal else "no").inc()

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

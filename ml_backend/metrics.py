"""What Prometheus reads at /metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from worker.contract import OUTCOMES, SegmentJob, SegmentResult

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

    def watch(self, snapshot: Callable[[], dict[str, Any]]) -> None:
        """Tell with each reading also what `Status.snapshot` says then, and memory and time of this process."""
        self.registry.register(_Service(snapshot))
        ProcessCollector(registry=self.registry)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)


class _Service:
    """Gauges and counters of the whole service. With several web processes each of them tells the same."""

    def __init__(self, snapshot: Callable[[], dict[str, Any]]) -> None:
        self._snapshot = snapshot

    def describe(self) -> list[Metric]:
        """Nothing: it is not asked for before it is read."""
        return []

    def collect(self) -> Iterator[Metric]:
        """One reading."""
        said = self._snapshot()
        build = GaugeMetricFamily("bald_sam_build_info", "What runs here.", labels=("version", "model_version"))
        build.add_metric((said["version"], said["model_version"]), 1)
        yield build
        yield GaugeMetricFamily("bald_sam_problems", "Lines in the banner of /status.", value=len(said["problems"]))
        yield from _queues(said["queues"])
        yield from _workers(said["workers"])
        if (counts := said["click_log"]) is not None:
            events = CounterMetricFamily("bald_sam_click_log_events", "Events of the click log.", labels=("state",))
            for state in ("taken", "written", "dropped", "refused"):
                events.add_metric((state,), counts[state])
            yield events
            up = GaugeMetricFamily("bald_sam_click_log_database_up", "Whether the database of the click log answers.")
            up.add_metric((), float(counts["database_up"]))
            yield up


def _queues(queues: list[dict[str, Any]]) -> Iterator[Metric]:
    waiting = GaugeMetricFamily("bald_sam_queue_waiting", "Jobs that wait.", labels=("queue",))
    oldest = GaugeMetricFamily("bald_sam_queue_oldest_seconds", "Age of the job that waits longest.", labels=("queue",))
    running = GaugeMetricFamily("bald_sam_queue_running", "Jobs that workers carry.", labels=("queue",))
    jobs = CounterMetricFamily("bald_sam_jobs", "Jobs that ended, by what became of them.", labels=("queue", "outcome"))
    for queue in queues:
        waiting.add_metric((queue["name"],), queue["waiting"])
        oldest.add_metric((queue["name"],), queue["oldest_s"] or 0.0)
        running.add_metric((queue["name"],), queue["running"])
        for outcome in OUTCOMES:
            jobs.add_metric((queue["name"], outcome), queue[outcome]["count"])
    yield from (waiting, oldest, running, jobs)


def _workers(workers: list[dict[str, Any]]) -> Iterator[Metric]:
    by_state = GaugeMetricFamily("bald_sam_workers", "Workers that live.", labels=("state",))
    states = [str(worker.get("state")) for worker in workers]
    for state in sorted({"ready", *states}):
        by_state.add_metric((state,), states.count(state))
    memory = GaugeMetricFamily("bald_sam_worker_memory_bytes", "Resident memory of a worker.", labels=("worker",))
    device = GaugeMetricFamily("bald_sam_worker_device_memory_bytes", "Memory in use on it.", labels=("worker",))
    size = GaugeMetricFamily("bald_sam_cache_bytes", "Bytes in a worker's cache.", labels=("worker", "cache"))
    limit = GaugeMetricFamily("bald_sam_cache_limit_bytes", "Most that it may hold.", labels=("worker", "cache"))
    looked = CounterMetricFamily("bald_sam_cache_lookups", "Look-ups in it.", labels=("worker", "cache", "result"))
    for worker in workers:
        facts, name = worker.get("facts") or {}, worker["name"]
        if "memory" in facts:
            memory.add_metric((name,), facts["memory"])
        if "device_memory" in facts:
            device.add_metric((name,), facts["device_memory"])
        for cache, usage in facts.get("caches", {}).items():
            size.add_metric((name, cache), usage["bytes"])
            limit.add_metric((name, cache), usage["max_bytes"])
            looked.add_metric((name, cache, "hit"), usage["hits"])
            looked.add_metric((name, cache, "miss"), usage["misses"])
    yield from (by_state, memory, device, size, limit, looked)

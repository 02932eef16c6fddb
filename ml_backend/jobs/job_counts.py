"""What became of the jobs of each queue, in the form of `contract.JOBS_KEY`."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from worker.contract import OUTCOMES


class JobCounts:
    """Counts of this process. May be used from many threads."""

    def __init__(self) -> None:
        self._counts: defaultdict[str, dict[str, Any]] = defaultdict(dict)
        self._lock = threading.Lock()

    def count(self, queue: str, outcome: str, said: str) -> None:
        """One more job of the queue has ended so."""
        with self._lock:
            counts = self._counts[queue]
            counts |= {outcome: counts.get(outcome, 0) + 1, f"last_{outcome}": time.time(), f"said_{outcome}": said}

    def of(self, queue: str) -> dict[str, Any]:
        """A copy of the counts of one queue."""
        with self._lock:
            return dict(self._counts[queue])


def described(counts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """For each outcome `count`, and where there was any `age_s` of the last one and what was `said` then."""
    now = time.time()
    found: dict[str, dict[str, Any]] = {}
    for outcome in OUTCOMES:
        found[outcome] = {"count": int(counts.get(outcome, 0))}
        if found[outcome]["count"]:
            # The clock of the worker's machine may be ahead.
            age_s = max(0.0, now - float(counts.get(f"last_{outcome}", now)))
            found[outcome] |= {"age_s": round(age_s, 1), "said": str(counts.get(f"said_{outcome}", ""))}
    return found

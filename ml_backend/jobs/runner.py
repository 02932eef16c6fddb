"""What a runner is: whoever has jobs done, in this process or by workers behind Redis."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from worker.contract import (
    EmbedJob,
    ImageRef,
    PrelabelFailure,
    PrelabelImage,
    PrelabelItem,
    PrelabelOptions,
    SegmentJob,
    SegmentResult,
    TrainJob,
    TrainResult,
)

#: Images that may wait to be encoded ahead; more are dropped, for they cost only the time they would have saved.
MAX_EMBED_WAITING = 256

#: Images of a batch that one job holds: within it reading, model and masks overlap.
CHUNK = 8


class Runner(Protocol):
    """Who does the work. All methods may be called from many threads at once."""

    def segment(self, job: SegmentJob, *, deadline_s: float) -> SegmentResult:
        """Answer of one click, waited for at most `deadline_s`. Raises JobFailed. A later click of the same session
        ends one that has not begun."""

    def embed(self, job: EmbedJob) -> None:
        """Encode images ahead, in the background; returns at once, and raises nothing."""

    def prelabel(
        self, items: Iterable[PrelabelItem], options: PrelabelOptions
    ) -> Iterator[PrelabelImage | PrelabelFailure]:
        """One answer for each item, in any order, as soon as it is made; clicks go first at any time. `items` is read
        a little ahead. Raises JobFailed for what keeps every item from being done; what was answered counts."""

    def train(self, job: TrainJob, progress: Callable[[str, int, int], None] | None = None) -> TrainResult:
        """Learn a head, which takes minutes; clicks go first at any time. `progress(stage, done, total)` is called now
        and then where it is known. Raises JobFailed."""

    def status(self) -> dict[str, Any]:
        """`runner`, `queues` (waiting jobs by queue), `workers` (and what they say of themselves), `running` (job, age
        in seconds), `jobs`: by queue the age of the one that waits longest, and `job_counts.described`."""

    def close(self) -> None:
        """Take no more work; what runs is not waited for."""


def image_key(image: ImageRef) -> str:
    """Short name of an image reference, the same in every process."""
    return hashlib.sha256(image.model_dump_json().encode()).hexdigest()[:16]


def in_chunks(items: Iterable[PrelabelItem], size: int = CHUNK) -> Iterator[tuple[PrelabelItem, ...]]:
    """The items in groups of `size`, the last one smaller."""
    rest = iter(items)
    while chunk := tuple(itertools.islice(rest, size)):
        yield chunk

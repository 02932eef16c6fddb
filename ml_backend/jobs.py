"""One way to have a click answered, two places to do it: `in_process_runner` and `rq_runner`."""

from __future__ import annotations

import hashlib
import itertools
import logging
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

from pydantic import TypeAdapter, ValidationError

from ml_backend.settings import Settings
from worker import contract
from worker.contract import (
    EmbedJob,
    Failure,
    ImageRef,
    PrelabelFailure,
    PrelabelImage,
    PrelabelItem,
    PrelabelOptions,
    PrelabelResult,
    SegmentJob,
    SegmentResult,
    TrainJob,
    TrainResult,
)

log = logging.getLogger(__name__)

#: Images that may wait to be encoded ahead; more are dropped, for they cost only the time they would have saved.
MAX_EMBED_WAITING = 256

#: Images of a batch that one job holds: within it reading, model and masks overlap.
CHUNK = 8

M = TypeVar("M", bound=contract.Message)
_ANSWERS: dict[type[contract.Message], TypeAdapter[Any]] = {
    kind: TypeAdapter(kind | Failure)  # type: ignore[arg-type]  # a type form, unseen in a loop
    for kind in (SegmentResult, PrelabelResult, TrainResult)
}


class JobFailed(Exception):  # noqa: N818 (a name others catch)
    """A click that got no mask. `error`: what is wrong, `hint`: what to do, `status`: HTTP status, `retry_after`: s."""

    def __init__(self, error: str, hint: str, status: int = 500, retry_after: int | None = None) -> None:
        super().__init__(f"{error} {hint}")
        self.error = error
        self.hint = hint
        self.status = status
        self.retry_after = retry_after


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


def make_runner(settings: Settings) -> Runner:
    """`RqRunner` where the settings name a Redis, else `InProcessRunner`."""
    if settings.redis_url:
        from ml_backend.rq_runner import RqRunner

        return RqRunner(settings.redis_url.get_secret_value(), max_waiting=settings.max_waiting)
    from ml_backend.in_process_runner import InProcessRunner

    return InProcessRunner(settings.runtime_options(), max_waiting=settings.max_waiting)


def image_key(image: ImageRef) -> str:
    """Short name of an image reference, the same in every process."""
    return hashlib.sha256(image.model_dump_json().encode()).hexdigest()[:16]


def _checked(kind: type[M], answer: Any) -> M:
    try:
        message = _ANSWERS[kind].validate_python(answer)
    except ValidationError as error:
        raise worker_failed(f"an answer that is no {kind.__name__} ({error.error_count()} errors)") from error
    if isinstance(message, Failure):
        raise JobFailed(message.error, message.hint, message.status)
    assert isinstance(message, kind)
    return message


def to_result(answer: Any) -> SegmentResult:
    """What `segment` returned, checked. Raises JobFailed for a Failure and for anything else."""
    return _checked(SegmentResult, answer)


def to_answers(answer: Any) -> list[PrelabelImage | PrelabelFailure]:
    """What `prelabel` returned, checked. Raises JobFailed for a Failure and for anything else."""
    message = _checked(PrelabelResult, answer)
    return [*message.images, *message.failed]


def to_train_result(answer: Any) -> TrainResult:
    """What `train` returned, checked. Raises JobFailed for a Failure and for anything else."""
    return _checked(TrainResult, answer)


def in_chunks(items: Iterable[PrelabelItem], size: int = CHUNK) -> Iterator[tuple[PrelabelItem, ...]]:
    """The items in groups of `size`, the last one smaller."""
    rest = iter(items)
    while chunk := tuple(itertools.islice(rest, size)):
        yield chunk


def worker_failed(reason: object, job_id: str | None = None) -> JobFailed:
    """The answer to what nobody foresaw: the client gets a name to look for, the log gets the reason."""
    job_id = job_id or uuid.uuid4().hex[:12]
    log.error("job %s failed: %s", job_id, reason)
    return JobFailed("The worker failed on this click.", f"The reason is in the worker's log; look for {job_id}.", 500)


def superseded() -> JobFailed:
    return JobFailed("This click was superseded by a later click.", "Nothing to do: the later click is answered.", 409)


def too_many(retry_after: int = 2) -> JobFailed:
    return JobFailed(
        "Too many clicks are waiting.", "Click again in a moment, or start more workers.", 503, retry_after
    )


def too_late(deadline_s: float) -> JobFailed:
    return JobFailed(
        f"No answer within {deadline_s:g} s.",
        "Click again; if it stays slow, use a smaller backbone, a GPU, or more workers.",
        504,
    )

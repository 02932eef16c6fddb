"""What a worker answered, checked."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from ml_backend.jobs.failures import JobFailed, worker_failed
from worker import contract
from worker.contract import Failure, PrelabelFailure, PrelabelImage, PrelabelResult, SegmentResult, TrainResult

M = TypeVar("M", bound=contract.Message)
_ANSWERS: dict[type[contract.Message], TypeAdapter[Any]] = {
    kind: TypeAdapter(kind | Failure)  # type: ignore[arg-type]  # a type form, unseen in a loop
    for kind in (SegmentResult, PrelabelResult, TrainResult)
}


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

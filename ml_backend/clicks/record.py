"""From what the model class knows of a click to the record of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ml_backend import regions
from ml_backend.arms import Arm
from ml_backend.clicks.events import AnsweredClick, LoggedPrompt, seen_regions
from ml_backend.prompts import Session
from worker.contract import SegmentJob, SegmentResult

#: Stages of a worker's timings that are parts of another stage.
_INNER = frozenset({"decode_image", "encode"})


def session_key(project: int, task: int, session: Session) -> str:
    """One object on one task by one annotator: ids of prompts are random, so the first one is enough for the last."""
    return f"{project}:{task}:{session.ids[0]}"


def record(
    task: Mapping[str, Any],
    session: Session,
    job: SegmentJob,
    arm: Arm,
    *,
    received: float,
    answered: float,
    head: str,
    result: SegmentResult | None = None,
    answer: Sequence[Mapping[str, Any]] = (),
    error: str | None = None,
    waited_ms: float = 0.0,
) -> AnsweredClick:
    """One answered click, or one that got `error`. `waited_ms`: what the runner took; the rest of it was the queue."""
    assert job.image.project is not None
    user, seen = seen_regions(task)
    timings = dict(result.timings) if result else {}
    if result:
        timings["queue"] = max(0.0, waited_ms - sum(ms for name, ms in timings.items() if name not in _INNER))
    proposal = result.proposal.model_dump() if result and result.proposal else None
    return AnsweredClick(
        session=session_key(job.image.project, task["id"], session),
        project=job.image.project,
        task=task["id"],
        mask_id=job.session,
        image=job.image.url,
        width=session.width,
        height=session.height,
        prompts=_prompts(session),
        received=received,
        answered=answered,
        arm=arm,
        radius_px=regions.RING_WIDTH / 100 * session.width,
        results=answer,
        proposal=proposal,
        stopped=result.stopped if result else None,
        strategy=proposal["strategy"] if proposal else job.strategy,
        model_version=result.model_version if result else "",
        head=head,
        predicted_iou=result.predicted_iou if result else None,
        area=result.area if result else None,
        timings=timings,
        user=user,
        seen=seen,
        error=error,
    )


def _prompts(session: Session) -> tuple[LoggedPrompt, ...]:
    box = session.prompts.box
    if box is not None:
        return (LoggedPrompt(session.ids[0], box.x0, box.y0, True, box.x1, box.y1),)
    found = zip(session.ids, session.prompts.clicks, strict=True)
    return tuple(LoggedPrompt(id_, click.x, click.y, click.positive) for id_, click in found)

"""Why a job came to nothing, in words for whoever clicked."""

from __future__ import annotations

import logging
import uuid

log = logging.getLogger(__name__)


class JobFailed(Exception):  # noqa: N818 (a name others catch)
    """A click that got no mask. `error`: what is wrong, `hint`: what to do, `status`: HTTP status, `retry_after`: s."""

    def __init__(self, error: str, hint: str, status: int = 500, retry_after: int | None = None) -> None:
        super().__init__(f"{error} {hint}")
        self.error = error
        self.hint = hint
        self.status = status
        self.retry_after = retry_after


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

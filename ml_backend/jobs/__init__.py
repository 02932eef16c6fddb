"""Jobs: one way to have a click answered (`runner`), two places to do it (`in_process_runner`, `rq_runner`)."""

from __future__ import annotations

from ml_backend.jobs.runner import Runner
from ml_backend.settings import Settings


def make_runner(settings: Settings) -> Runner:
    """`RqRunner` where the settings name a Redis, else `InProcessRunner`."""
    if settings.redis_url:
        from ml_backend.jobs.rq_runner import RqRunner

        return RqRunner(settings.redis_url.get_secret_value(), max_waiting=settings.max_waiting)
    from ml_backend.jobs.in_process_runner import InProcessRunner

    return InProcessRunner(settings.runtime_options(), max_waiting=settings.max_waiting)

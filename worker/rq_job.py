"""An RQ job whose work is one of the job functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import redis
from rq.job import Job

from worker.contract import LARGE_MASK, MASK_KEY, NotQuickError, outcome_of


class ModelJob(Job):
    """An RQ job without what else Redis may name in one: functions to call when it ends or is found lost by whoever
    cleans up, and addresses to post to. Ours have neither."""

    success_callback = failure_callback = stopped_callback = None

    #: What became of it, and the words for that; see `contract.JOBS_KEY`.
    outcome = ("failed", "the function is none that a worker may run")

    _attempted: Callable[[], Any] | None = None

    def send_webhooks(self, *_: Any, **__: Any) -> None:
        """Nothing is sent."""

    def attempt(self) -> None:
        """Do the work before RQ takes note of the job: `perform` then has it done. Raises NotQuickError where it is not
        quick; whatever else goes wrong, `perform` raises."""
        try:
            answer = self.func(*self.args, **self.kwargs)
        except NotQuickError:
            raise
        except Exception as error:
            self._attempted = partial(_raise, error)
        else:
            self._attempted = lambda: answer

    def perform(self) -> Any:
        try:
            answer = self._attempted() if self._attempted else super().perform()
        except BaseException as error:
            # Its words may hold anything; they are in the log.
            self.outcome = ("failed", f"{type(error).__name__}; the worker's log has {self.id}.")
            raise
        self.outcome = outcome_of(answer)
        return self._with_mask_beside(answer)

    def _with_mask_beside(self, answer: Any) -> Any:
        """The answer; a large mask of it is put into Redis by itself, see `contract.MASK_KEY`."""
        rle = answer.get("rle") if isinstance(answer, dict) else None
        if not isinstance(rle, str) or len(rle) <= LARGE_MASK or not self.result_ttl:
            return answer
        try:
            self.connection.set(MASK_KEY + self.id, rle, ex=self.result_ttl)
        except redis.RedisError:
            return answer
        return {**answer, "rle": None}


def _raise(error: Exception) -> NoReturn:
    raise error

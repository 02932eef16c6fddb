"""Results of RQ jobs, read from the streams that workers write them to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import redis
from rq.results import Result
from rq.serializers import JSONSerializer

from worker.contract import MASK_KEY

Fields = Mapping[bytes, bytes]


def result_key(job_id: str) -> str:
    """The stream that holds the results of a job."""
    return str(Result.get_key(job_id))  # type: ignore[no-untyped-call]


def read_results(client: redis.Redis, job_ids: Iterable[str], block_ms: int) -> list[tuple[str, Fields]]:
    """(job id, fields of its first result) for the jobs that have one; waits at most `block_ms` for the first of them.

    Raises redis.ConnectionError or redis.TimeoutError when Redis is away.
    """
    keys = {result_key(job_id): job_id for job_id in job_ids}
    response: Any = client.xread(dict.fromkeys(keys, "0-0"), count=1, block=block_ms)
    found: list[tuple[str, Fields]] = []
    for key, entries in response.items() if isinstance(response, dict) else response or []:
        entry = entries[0]
        while not isinstance(entry[1], dict):  # redis-py nests entries differently under the two protocols
            entry = entry[0]
        found.append((keys[key.decode()], entry[1]))
    return found


def restore(client: redis.Redis, job_id: str, fields: Fields) -> Result:
    """What the fields say, as RQ's own type."""
    return Result.restore(job_id, "0-0", dict(fields), connection=client, serializer=JSONSerializer)


def with_mask(client: redis.Redis, job_id: str, answer: Any) -> Any:
    """What a job returned, with the mask that the worker has put beside it, if any, which is taken away; None where
    that is gone. Raises redis.ConnectionError or redis.TimeoutError when Redis is away."""
    if not isinstance(answer, dict) or answer.get("rle", "") is not None:
        return answer
    with client.pipeline(transaction=False) as pipe:
        pipe.get(MASK_KEY + job_id)
        pipe.delete(MASK_KEY + job_id)
        rle, _ = pipe.execute()
    return {**answer, "rle": rle.decode()} if isinstance(rle, bytes) else None


def reason(result: Result) -> str:
    """The last line of a failed job's traceback."""
    return str((result.exc_string or "no reason given").strip().rpartition("\n")[2])

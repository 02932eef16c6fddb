"""Which head each project uses, as the web process needs to know it: for the model version that Label Studio shows.

`worker.head.registry` writes it, into a file of the data directory and, where there is a Redis, there too.
"""

from __future__ import annotations

import logging
import threading
import time
from functools import lru_cache

import redis
from pydantic import ValidationError
from redis.backoff import NoBackoff
from redis.retry import Retry

from ml_backend.settings import Settings
from worker.contract import HEADS_IN_USE_FILE, HEADS_IN_USE_KEY, HeadsInUse

log = logging.getLogger(__name__)

#: Redis is asked this often, seconds; after it did not answer, less often, for a request waits for it.
LOOK_EVERY_S = 1.0
AFTER_OUTAGE_S = 15.0


class HeadsReader:
    """Reads the choice; never raises. May be used from many threads."""

    def __init__(self, settings: Settings) -> None:
        self._file = settings.data_dir / HEADS_IN_USE_FILE
        self._redis: redis.Redis | None = None
        if settings.redis_url is not None:
            self._redis = redis.Redis.from_url(
                settings.redis_url.get_secret_value(),
                socket_connect_timeout=0.3,
                socket_timeout=0.3,
                retry=Retry(NoBackoff(), 0),
            )
        self._known, self._again, self._stamp = HeadsInUse(), 0.0, (0, 0)
        self._lock = threading.Lock()

    def in_use(self) -> HeadsInUse:
        """The choice of all projects; with Redis up to a second old."""
        with self._lock:
            try:
                if self._redis is None:
                    self._read_file()
                elif time.monotonic() >= self._again:
                    self._again = time.monotonic() + LOOK_EVERY_S
                    self._take(self._redis.get(HEADS_IN_USE_KEY))
            except redis.RedisError as error:
                log.debug("Redis does not say which heads are in use: %s", type(error).__name__)
                self._again = time.monotonic() + AFTER_OUTAGE_S
            except (OSError, ValidationError) as error:
                log.debug("which heads are in use cannot be read: %s", error)
            return self._known

    def _read_file(self) -> None:
        status = self._file.stat()
        stamp = (status.st_mtime_ns, status.st_ino)
        if stamp != self._stamp:
            self._stamp = stamp
            self._take(self._file.read_bytes())

    def _take(self, content: object) -> None:
        if isinstance(content, bytes):
            self._known = HeadsInUse.model_validate_json(content)


@lru_cache(maxsize=8)
def reader(settings: Settings) -> HeadsReader:
    """The reader of these settings, made once."""
    return HeadsReader(settings)


def model_version(settings: Settings, project: int | None = None) -> str:
    """What Label Studio shows as the version of this backend in a project: backbone, and the head that it learnt.

    A head that the settings name is used by every project, so its name is shown instead.
    """
    version = f"bald-sam-{settings.backbone}"
    if settings.head != "default":
        return f"{version}-{settings.head.rpartition('/')[2].removesuffix('.safetensors')}"
    choice = reader(settings).in_use().of(project)
    fits = choice.backbone.startswith(f"{settings.backbone}-")
    return f"{version}-{choice.head}" if choice.head is not None and fits else version


def model_versions(settings: Settings) -> list[str]:
    """The versions that projects have now, the one of projects without a head of their own first."""
    projects = [int(scope) for scope in reader(settings).in_use().choices if scope.isdigit()]
    return list(dict.fromkeys(model_version(settings, project) for project in [None, *sorted(projects)]))

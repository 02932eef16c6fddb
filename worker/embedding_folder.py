"""Embeddings in a folder: they outlast every process, and any number of processes share them."""

from __future__ import annotations

import logging
import os
import uuid
from contextlib import suppress
from pathlib import Path
from threading import Lock

log = logging.getLogger(__name__)

SUFFIX = ".safetensors"
#: When the folder is full, the least recently used files go until this share of the limit is left.
KEEP = 0.9


class EmbeddingFolder:
    """Files by key, at most `max_bytes` of them. A disk that is full or a file that is gone only costs time."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path, self._max_bytes = path, max_bytes
        self._size: int | None = None
        self._lock = Lock()

    def get(self, key: str) -> bytes | None:
        """What was kept under a key, which becomes the most recently used one, or None."""
        file = self._file(key)
        try:
            data = file.read_bytes()
            os.utime(file)
        except OSError:
            return None
        return data

    def put(self, key: str, data: bytes) -> None:
        """Keep `data`: the whole file appears at once, or nothing."""
        file = self._file(key)
        draft = file.with_name(f".{uuid.uuid4().hex}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(data)
            draft.replace(file)
        except OSError as error:
            log.warning("An embedding could not be kept in %s (%s); going on without.", self._path, error)
            with suppress(OSError):
                draft.unlink(missing_ok=True)
            return
        with self._lock:
            self._size = len(data) + (self._size if self._size is not None else self._measure())
            if self._size > self._max_bytes:
                self._shrink()

    def drop(self, key: str) -> None:
        """Forget one, if it is there."""
        with suppress(OSError):
            self._file(key).unlink(missing_ok=True)

    def _file(self, key: str) -> Path:
        digest, _, backbone = key.partition(":")
        return self._path / backbone / digest[:2] / f"{digest}{SUFFIX}"

    def _files(self) -> list[tuple[float, int, Path]]:
        """(time of last use, bytes, path) of each."""
        found = []
        for path in self._path.rglob(f"*{SUFFIX}"):
            with suppress(OSError):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        return found

    def _measure(self) -> int:
        return sum(size for _, size, _ in self._files())

    def _shrink(self) -> None:
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= KEEP * self._max_bytes:
                break
            with suppress(OSError):
                path.unlink()
                total -= size
        self._size = total

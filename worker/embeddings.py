"""Where embeddings are kept: process memory, then Redis, then a folder; else the image is encoded."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Lock, Thread

import torch
from redis import Redis, RedisError
from safetensors import SafetensorError

from worker.backbones import Backbone
from worker.byte_lru import ByteLRU
from worker.embedding_folder import EmbeddingFolder
from worker.encode import Embedding, from_bytes, to_bytes
from worker.frame import Window
from worker.preemption import before_long_work

log = logging.getLogger(__name__)

#: Redis keeps an embedding for a working day, and forgets which image lies behind a URL sooner.
EMBEDDING_TTL_S = 8 * 3600
URL_TTL_S = 3600
#: Longest wait for another process that encodes the same image; after that this one encodes it too. Its claim ends by
#: itself when the process is killed: it is renewed as long as it encodes.
ENCODE_WAIT_S = 60.0
CLAIM_MS = 2000
RENEW_S = 0.5
PREFIX = "bald-sam:"


class EmbeddingCache:
    """Embeddings by content: key = SHA-256 of the image's bytes + ":" + the backbone's `embedding_id`.

    Memory is bounded in bytes; Redis (optional, shared by all workers) by time; a folder (optional) in bytes. What is
    broken or gone is computed again, and a Redis that does not answer only costs time. One image is encoded once,
    however many ask for it.
    """

    def __init__(self, max_bytes: int, redis: Redis | None = None, folder: EmbeddingFolder | None = None) -> None:
        self._folder = folder
        self._memory: ByteLRU[str, Embedding] = ByteLRU(max_bytes)
        self._urls: ByteLRU[str, tuple[str, float]] = ByteLRU(1 << 20)
        self._redis = redis
        self._flights: dict[str, tuple[Lock, int]] = {}
        self._flights_lock = Lock()

    @staticmethod
    def key(data: bytes, backbone: Backbone) -> str:
        """Key of an image file's content for this backbone."""
        return f"{hashlib.sha256(data).hexdigest()}:{backbone.embedding_id}"

    @property
    def size(self) -> int:
        """Bytes held in this process's memory."""
        return self._memory.size

    def usage(self) -> dict[str, int]:
        """How full this process's memory is, see `ByteLRU.usage`."""
        return self._memory.usage()

    def clear_memory(self) -> None:
        """Forget what this process holds; Redis keeps its own."""
        self._memory.clear()

    def key_of_url(self, url: str, backbone: Backbone) -> str | None:
        """The key of an image that was fetched from this URL within the last hour, or None."""
        name = f"{url} {backbone.embedding_id}"
        known = self._urls.get(name)
        if known is not None and known[1] > time.monotonic():
            return known[0]
        found = self._from_redis(_url_name(name))
        return found.decode(errors="replace") if found else None

    def remember_url(self, url: str, backbone: Backbone, key: str) -> None:
        """Note which image lies behind a URL, so that it need not be fetched again soon."""
        name = f"{url} {backbone.embedding_id}"
        self._urls.put(name, (key, time.monotonic() + URL_TTL_S), len(name) + len(key) + 200)
        self._to_redis(_url_name(name), key.encode(), URL_TTL_S)

    def get(self, key: str, device: torch.device, *, remember: bool = True) -> Embedding | None:
        """The embedding from memory, Redis or the folder, or None. What is read enters the memory if to `remember`."""
        embedding = self._memory.get(key)
        if embedding is not None:
            return embedding
        found = self._read(key, self._from_redis(PREFIX + "embedding:" + key), "Redis", self._drop_embedding)
        if found is None and self._folder is not None:
            found = self._read(key, self._folder.get(key), "the folder", self._folder.drop)
        if found is None:
            return None
        embedding = found.to(device)
        if remember:
            self._memory.put(key, embedding, embedding.size)
        return embedding

    @staticmethod
    def _read(key: str, data: bytes | None, where: str, drop: Callable[[str], None]) -> Embedding | None:
        if data is None:
            return None
        try:
            return from_bytes(data)
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            log.warning("Dropped a broken embedding from %s (%s: %s); it is computed again.", where, key[:12], error)
            drop(key)
            return None

    def _drop_embedding(self, key: str) -> None:
        self._drop_from_redis(PREFIX + "embedding:" + key)

    def put(self, key: str, embedding: Embedding, *, remember: bool = True) -> None:
        """Keep an embedding in memory (unless not to `remember`), in Redis and in the folder."""
        if remember:
            self._memory.put(key, embedding, embedding.size)
        if self._redis is not None or self._folder is not None:
            data = to_bytes(embedding)
            self._to_redis(PREFIX + "embedding:" + key, data, EMBEDDING_TTL_S)
            if self._folder is not None:
                self._folder.put(key, data)

    def get_or_encode(self, key: str, device: torch.device, compute: Callable[[], Embedding]) -> Embedding:
        """The embedding, computed by `compute` if nobody has it; concurrent callers for one key share one call. Raises
        NotQuickError where it is not in memory and only quick work is let through."""
        embedding = self._memory.get(key)
        if embedding is not None:
            return embedding
        before_long_work()
        with self._flight(key):
            embedding = self.get(key, device) or self._wait_for_other_process(key, device)
            if embedding is None:
                try:
                    with self._renewing(key):
                        embedding = compute()
                    self.put(key, embedding)
                finally:
                    self._drop_from_redis(PREFIX + "encoding:" + key)
            return embedding

    def window_or_encode(self, key: str, window: Window, compute: Callable[[], Embedding | None]) -> Embedding | None:
        """The embedding of a part of the image under `key`, as `get_or_encode`, but in this process's memory alone: it
        is of use for one object. None where `compute` finds that it cannot be had."""
        part = f"{key}@{window.x0},{window.y0},{window.x1},{window.y1}"
        embedding = self._memory.get(part)
        if embedding is not None:
            return embedding
        before_long_work()
        with self._flight(part):
            embedding = self._memory.get(part)
            if embedding is None:
                embedding = compute()
                if embedding is not None:
                    self._memory.put(part, embedding, embedding.size)
            return embedding

    def _wait_for_other_process(self, key: str, device: torch.device) -> Embedding | None:
        """Claim the encoding of an image in Redis, or wait for the process that has; None: this process encodes."""
        deadline = time.monotonic() + ENCODE_WAIT_S
        while self._redis is not None and time.monotonic() < deadline:
            try:
                if self._redis.set(PREFIX + "encoding:" + key, b"1", px=CLAIM_MS, nx=True):
                    return self.get(key, device)
            except RedisError as error:
                _say_redis_failed(error)
                return None
            time.sleep(0.02)
            embedding = self.get(key, device)
            if embedding is not None:
                return embedding
        return None

    @contextmanager
    def _renewing(self, key: str) -> Iterator[None]:
        """Keep the claim on an image during the block."""
        if self._redis is None:
            yield
            return
        client, done = self._redis, Event()

        def renew() -> None:
            while not done.wait(RENEW_S):
                with suppress(RedisError):
                    client.pexpire(PREFIX + "encoding:" + key, CLAIM_MS)

        Thread(target=renew, name="bald-sam-claim", daemon=True).start()
        try:
            yield
        finally:
            done.set()

    @contextmanager
    def _flight(self, key: str) -> Iterator[None]:
        with self._flights_lock:
            lock, users = self._flights.get(key, (Lock(), 0))
            self._flights[key] = (lock, users + 1)
        try:
            with lock:
                yield
        finally:
            with self._flights_lock:
                lock, users = self._flights[key]
                if users == 1:
                    del self._flights[key]
                else:
                    self._flights[key] = (lock, users - 1)

    def _from_redis(self, name: str) -> bytes | None:
        try:
            data = self._redis.get(name) if self._redis is not None else None
            return data if isinstance(data, bytes) else None
        except RedisError as error:
            _say_redis_failed(error)
            return None

    def _to_redis(self, name: str, value: bytes, ttl_s: int) -> None:
        try:
            if self._redis is not None:
                self._redis.set(name, value, ex=ttl_s)
        except RedisError as error:
            _say_redis_failed(error)

    def _drop_from_redis(self, name: str) -> None:
        try:
            if self._redis is not None:
                self._redis.delete(name)
        except RedisError as error:
            _say_redis_failed(error)


def _url_name(name: str) -> str:
    return PREFIX + "url:" + hashlib.sha256(name.encode()).hexdigest()


def _say_redis_failed(error: Exception) -> None:
    log.warning("Redis did not answer the embedding cache (%s); going on without it.", error)

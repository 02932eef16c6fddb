"""A least-recently-used cache that is bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class ByteLRU(Generic[K, V]):
    """Values with their sizes in bytes; when the sum exceeds `max_bytes` the least recently used go. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._bytes = 0
        self._hits = self._misses = 0
        self._lock = Lock()

    def get(self, key: K) -> V | None:
        """The value, which becomes the most recently used one, or None."""
        with self._lock:
            if key not in self._entries:
                self._misses += 1
                return None
            self._hits += 1
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def put(self, key: K, value: V, size: int) -> None:
        """Keep a value of `size` bytes; one that is larger than the whole cache is not kept."""
        with self._lock:
            self._drop(key)
            if size > self.max_bytes:
                return
            self._entries[key] = (value, size)
            self._bytes += size
            while self._bytes > self.max_bytes:
                self._drop(next(iter(self._entries)))

    def drop(self, key: K) -> None:
        """Forget one value, if it is there."""
        with self._lock:
            self._drop(key)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    @property
    def size(self) -> int:
        """Sum of the sizes of what is kept."""
        return self._bytes

    def usage(self) -> dict[str, int]:
        """`bytes` of `max_bytes`, `entries`, and how often something was found (`hits`) and not (`misses`)."""
        with self._lock:
            return {
                "bytes": self._bytes,
                "max_bytes": self.max_bytes,
                "entries": len(self._entries),
                "hits": self._hits,
                "misses": self._misses,
            }

    def __len__(self) -> int:
        return len(self._entries)

    def _drop(self, key: K) -> None:
        if key in self._entries:
            self._bytes -= self._entries.pop(key)[1]

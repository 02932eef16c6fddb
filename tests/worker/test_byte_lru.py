from __future__ import annotations

from worker.byte_lru import ByteLRU


def test_lru_is_bounded_in_bytes() -> None:
    cache: ByteLRU[str, int] = ByteLRU(10)
    for name in "abc":
        cache.put(name, 1, 4)
    assert (cache.get("a"), cache.get("b"), cache.size, len(cache)) == (None, 1, 8, 2)
    cache.put("d", 1, 4)  # b was used last, so c goes
    assert (cache.get("b"), cache.get("c")) == (1, None)
    cache.put("b", 2, 11)  # larger than everything: not kept, and the old value is gone
    assert (cache.get("b"), cache.size) == (None, 4)

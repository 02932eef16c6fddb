from __future__ import annotations

import logging
import threading
import time

import pytest
import redis
import torch
from redis.backoff import NoBackoff
from redis.retry import Retry

from worker.backbones import Backbone
from worker.embeddings import PREFIX, EmbeddingCache
from worker.encode import Embedding, to_bytes

CPU = torch.device("cpu")


def _embedding(value: float = 1.0) -> Embedding:
    return Embedding(torch.full((1, 4, 8, 8), value), torch.zeros(3, 32, 32, dtype=torch.uint8), (30, 40), (288, 384))


def test_redis_serves_another_process(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        EmbeddingCache(1 << 20, client).put("key", _embedding(3.0))
        found = EmbeddingCache(1 << 20, client).get("key", CPU)
        assert found is not None
        assert torch.equal(found.features, _embedding(3.0).features)
        assert 0 < client.ttl(PREFIX + "embedding:key") <= 8 * 3600  # type: ignore[operator]


@pytest.mark.parametrize("damage", [b"", b"garbage", "cut", "other"])
def test_broken_entry_is_dropped_and_computed_again(
    redis_url: str, damage: bytes | str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = to_bytes(_embedding())
    data = whole[:-100] if damage == "cut" else whole.replace(b"features", b"creature") if damage == "other" else damage
    with redis.Redis.from_url(redis_url) as client, caplog.at_level(logging.WARNING):
        client.set(PREFIX + "embedding:key", data)
        found = EmbeddingCache(1 << 20, client).get_or_encode("key", CPU, lambda: _embedding(2.0))
        assert torch.equal(found.features, _embedding(2.0).features)
        assert "broken embedding" in caplog.text
        assert client.get(PREFIX + "embedding:key") == to_bytes(_embedding(2.0))


def test_a_dead_redis_costs_nothing_but_a_log_line(caplog: pytest.LogCaptureFixture, backbone: Backbone) -> None:
    with (
        redis.Redis(port=1, socket_connect_timeout=0.2, retry=Retry(NoBackoff(), 1)) as client,
        caplog.at_level(logging.WARNING),
    ):
        cache = EmbeddingCache(1 << 20, client)
        cache.remember_url("http://a/b.png", backbone, "key")
        assert cache.key_of_url("http://a/b.png", backbone) == "key"
        assert cache.get_or_encode("key", CPU, _embedding).original_size == (30, 40)
    assert "Redis did not answer" in caplog.text


@pytest.mark.parametrize("processes", [1, 2])
def test_one_encode_for_many_callers(redis_url: str, processes: int) -> None:
    """Threads on one cache, and on two caches that share only Redis, as two worker processes do."""
    calls: list[int] = []

    def compute() -> Embedding:
        calls.append(1)
        time.sleep(0.3)
        return _embedding()

    with redis.Redis.from_url(redis_url) as client:
        caches = [EmbeddingCache(1 << 20, client) for _ in range(processes)]
        found: list[Embedding] = []
        threads = [
            threading.Thread(target=lambda c=cache: found.append(c.get_or_encode("key", CPU, compute)))
            for cache in caches * 4
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 4 * processes
    assert len(calls) == 1


def test_a_failed_encode_does_not_block_the_next(redis_url: str) -> None:
    def fail() -> Embedding:
        raise ValueError("no")

    with redis.Redis.from_url(redis_url) as client:
        cache = EmbeddingCache(1 << 20, client)
        with pytest.raises(ValueError, match="no"):
            cache.get_or_encode("key", CPU, fail)
        assert cache.get_or_encode("key", CPU, _embedding).original_size == (30, 40)


def test_urls_are_remembered_by_backbone(redis_url: str, backbone: Backbone) -> None:
    with redis.Redis.from_url(redis_url) as client:
        EmbeddingCache(1 << 20, client).remember_url("http://a/b.png", backbone, "key")
        other = EmbeddingCache(1 << 20, client)
        assert other.key_of_url("http://a/b.png", backbone) == "key"
        assert other.key_of_url("http://a/c.png", backbone) is None

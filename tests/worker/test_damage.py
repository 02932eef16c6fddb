"""Damaged caches and heads: the mask is the right one all the same, or the annotator is told. With `tiny`."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import torch
from PIL import Image

from worker import runtime, tasks
from worker.contract import RuntimeOptions
from worker.embeddings import CLAIM_MS, PREFIX, RENEW_S, EmbeddingCache
from worker.encode import Embedding
from worker.head.registry import HeadRegistry
from worker.head.store import SHIPPED

torch.set_num_threads(1)
HEIGHT, WIDTH = 90, 120


@pytest.fixture
def picture(tmp_path: Path) -> str:
    rows, cols = np.mgrid[:HEIGHT, :WIDTH]
    image = np.full((HEIGHT, WIDTH, 3), 60, np.uint8)
    image[(rows - 45) ** 2 + (cols - 60) ** 2 < 25**2] = (210, 60, 40)
    Image.fromarray(image).save(tmp_path / "disc.png")
    return str(tmp_path / "disc.png")


def start(folder: Path, **changes: Any) -> None:
    """A worker that has just been started."""
    runtime._runtime = None
    runtime.configure(RuntimeOptions(data_dir=folder, device="cpu", local_roots=(folder,), **changes))


def click(url: str) -> dict[str, Any]:
    prompts = {"clicks": [{"x": 60.0, "y": 45.0, "positive": True}]}
    return tasks.segment({"image": {"url": url}, "width": WIDTH, "height": HEIGHT, "prompts": prompts, "session": "s"})


def test_one_flipped_bit_in_a_cached_embedding_is_no_other_mask(
    picture: str, tmp_path: Path, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    start(tmp_path, redis_url=redis_url)
    right = click(picture)
    with redis.Redis.from_url(redis_url) as client:
        (name,) = client.keys(PREFIX + "embedding:*")
        entry = bytearray(client.get(name))
        whole = bytes(entry)
        entry[len(entry) // 2] ^= 0x40
        client.set(name, bytes(entry), ex=3600)
        start(tmp_path, redis_url=redis_url)
        with caplog.at_level(logging.WARNING):
            assert click(picture)["rle"] == right["rle"]
        assert "broken embedding" in caplog.text
        assert client.get(name) == whole, "the entry is mended"


def test_the_claim_of_a_killed_worker_ends_by_itself(redis_url: str) -> None:
    """A worker that encodes an image keeps others from it only as long as it lives."""
    with redis.Redis.from_url(redis_url) as client:
        left = []

        def encode_slowly() -> Embedding:
            for _ in range(4):
                left.append(client.pttl(PREFIX + "encoding:key"))
                time.sleep(CLAIM_MS / 1000 * 0.4)
            left.append(client.pttl(PREFIX + "encoding:key"))
            return Embedding(torch.ones(1, 4, 8, 8), torch.zeros(3, 32, 32, dtype=torch.uint8), (30, 40), (288, 384))

        cache = EmbeddingCache(1 << 20, client)
        cache.get_or_encode("key", torch.device("cpu"), encode_slowly)
        assert all(0 < ms <= CLAIM_MS for ms in left), left
        assert RENEW_S * 1000 < CLAIM_MS / 2
        assert not client.exists(PREFIX + "encoding:key")


def test_a_damaged_head_of_a_project_is_passed_over(
    picture: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start(tmp_path)
    right = click(picture)
    registry = HeadRegistry(tmp_path)
    folder = registry.folder / registry.new_name("team")
    for suffix in (".safetensors", ".json"):
        (folder / f"head{suffix}").write_bytes(SHIPPED.with_suffix(suffix).read_bytes())
    registry.use(folder.name)
    start(tmp_path)
    learnt = click(picture)
    assert "team" in learnt["model_version"] or learnt["model_version"] != right["model_version"]
    (folder / "head.safetensors").write_bytes(b"\0" * 100)
    start(tmp_path)
    with caplog.at_level(logging.ERROR):
        answer = click(picture)
    assert (answer["rle"], answer["model_version"]) == (right["rle"], right["model_version"])
    assert "passed over" in caplog.text


def test_a_damaged_head_of_the_settings_is_told_and_heals(picture: str, tmp_path: Path) -> None:
    head = tmp_path / "own.safetensors"
    head.write_bytes(b"\0" * 100)
    head.with_suffix(".json").write_bytes(SHIPPED.with_suffix(".json").read_bytes())
    start(tmp_path, head=str(head))
    answer = click(picture)
    assert (answer["kind"], answer["status"]) == ("failure", 503)
    assert str(head) in answer["error"]
    head.write_bytes(SHIPPED.read_bytes())
    assert click(picture)["kind"] == "segment"

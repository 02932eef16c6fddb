from __future__ import annotations

import os
from pathlib import Path

from worker.embedding_folder import EmbeddingFolder

KEY = "ab" * 32 + ":tiny-1"


def key(number: int) -> str:
    return f"{number:064x}:tiny-1"


def test_what_is_put_is_found_by_another_process(tmp_path: Path) -> None:
    EmbeddingFolder(tmp_path, 1000).put(KEY, b"data")
    folder = EmbeddingFolder(tmp_path, 1000)
    assert folder.get(KEY) == b"data"
    assert folder.get(key(1)) is None
    folder.drop(KEY)
    folder.drop(KEY)
    assert folder.get(KEY) is None


def test_the_least_recently_used_go(tmp_path: Path) -> None:
    folder = EmbeddingFolder(tmp_path, 1000)
    for number in range(9):
        folder.put(key(number), bytes(100))
        (file,) = tmp_path.rglob(f"{number:064x}.safetensors")
        os.utime(file, (number, number))
    assert folder.get(key(0)) is not None  # used just now
    for number in range(9, 12):
        folder.put(key(number), bytes(100))
    assert folder.get(key(0)) is not None
    assert folder.get(key(1)) is None
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) <= 1000


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = EmbeddingFolder(tmp_path / "file", 1000)
    folder.put(KEY, b"data")
    assert folder.get(KEY) is None

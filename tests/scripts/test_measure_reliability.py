"""Kills and restarts under load, small: `scripts/measure_reliability.py` does the same fifty times."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def measure() -> Any:
    sys.path.append(str(SCRIPTS))
    return importlib.import_module("measure_reliability")


@pytest.fixture(scope="module")
def shared(measure: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """Two workers with `tiny`, and the pictures that the annotators click on."""
    folder = tmp_path_factory.mktemp("service")
    pictures = measure.Pictures(folder, 2, (120, 160))
    with measure.Service(folder, workers=2) as service:
        pictures.learn(service.url)
        yield service, pictures


def good(found: dict[str, Any]) -> None:
    """Every request was answered right or refused in words, and every annotator got on."""
    assert found["answered"] > 0
    assert found["strange"] == []
    assert found["wrong masks"] == []
    assert found["stuck sessions"] == []
    assert found["left in the queue"] == 0


def test_kills_under_load(measure: Any, shared: tuple[Any, Any]) -> None:
    found = measure.kills(*shared, count=3, people=3, every_s=1.0, seed=1)
    good(found)
    assert found["kills"] == 3


def test_redis_restarted_under_load(measure: Any, shared: tuple[Any, Any]) -> None:
    found = measure.restarts(*shared, count=2, people=3, every_s=1.0, seed=2)
    good(found)
    assert found["no process started again"]


def test_embedded_mode_never_notices_redis(measure: Any, tmp_path: Path) -> None:
    pictures = measure.Pictures(tmp_path, 1, (120, 160))
    with measure.Service(tmp_path, workers=0) as service:
        pictures.learn(service.url)
        found = measure.restarts(service, pictures, count=2, people=2, every_s=0.5, seed=3)
    good(found)
    assert found["refused in words"] == {}


def test_a_wrong_mask_would_be_seen(measure: Any, shared: tuple[Any, Any]) -> None:
    service, pictures = shared
    right = dict(pictures.right)
    pictures.right = dict.fromkeys(right, "another")
    try:
        found = measure.restarts(service, pictures, count=0, people=1, every_s=0.5, seed=4)
    finally:
        pictures.right = right
    assert len(found["wrong masks"]) == found["answered"] > 0

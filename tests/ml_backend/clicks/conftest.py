"""Clicks as the server would log them, and what Label Studio would send afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Engine

from ml_backend.app import create_app
from ml_backend.arms import Arm
from ml_backend.clicks import AnsweredClick, LoggedPrompt
from ml_backend.clicks.schema import make_engine, migrate
from ml_backend.settings import Settings
from worker import brush_rle

WIDTH, HEIGHT = 120, 80
SHOWN, HIDDEN = Arm("show", "mixed", "object", 0), Arm("hide", "mixed", "object", 0)

_ticks = itertools.count(1_800_000_000)


def disc(radius: float, x: float = 60, y: float = 40) -> np.ndarray:
    """bool (80, 120): a disc about (x, y), pixels."""
    rows, columns = np.ogrid[:HEIGHT, :WIDTH]
    return (columns + 0.5 - x) ** 2 + (rows + 0.5 - y) ** 2 < radius**2


def region(mask: np.ndarray, id_: str, label: str = "Cat") -> dict[str, Any]:
    """A brush region as the server answers it and Label Studio saves it."""
    return {
        "id": id_,
        "type": "brushlabels",
        "from_name": "brush",
        "to_name": "image",
        "original_width": WIDTH,
        "original_height": HEIGHT,
        "image_rotation": 0,
        "value": {"format": "rle", "rle": brush_rle.encode(mask), "brushlabels": [label]},
    }


def answer(
    prompts: Sequence[tuple[str, float, float] | tuple[str, float, float, bool]],
    mask: np.ndarray | None = None,
    *,
    task: int = 4,
    proposal: tuple[float, float, bool] | None = None,
    arm: Arm = SHOWN,
    received: float | None = None,
    took: float = 0.25,
    **more: Any,
) -> AnsweredClick:
    """One answered click of project 3; the object is named by its first prompt. Requests are a second apart."""
    received = float(next(_ticks)) if received is None else received
    first = prompts[0][0]
    mask = disc(20) if mask is None else mask
    results: list[dict[str, Any]] = [] if more.get("error") else [region(mask, f"mask-{first}")]
    if proposal is not None and arm.shows:
        results.append({"id": "ring", "dynamic": True, "type": "keypointlabels", "from_name": "next", "value": {}})
    point = proposal and {"x": proposal[0], "y": proposal[1], "positive": proposal[2], "score": 0.3, "strategy": "bald"}
    fields: dict[str, Any] = {
        "session": f"3:{task}:{first}",
        "project": 3,
        "task": task,
        "mask_id": f"mask-{first}",
        "image": f"/data/upload/3/{task}.jpg",
        "width": WIDTH,
        "height": HEIGHT,
        "prompts": tuple(LoggedPrompt(*prompt) for prompt in prompts),
        "received": received,
        "answered": received + took,
        "arm": arm,
        "radius_px": 3.0,
        "results": results,
        "proposal": point,
        "strategy": "bald",
        "model_version": "tiny-0",
        "head": "default",
        "predicted_iou": 0.8,
        "area": int(mask.sum()),
        "timings": {"queue": 4.0, "encode": 20.0, "decode": 9.0},
    }
    return AnsweredClick(**(fields | more))


def webhook(
    result: Sequence[dict[str, Any]],
    *,
    annotation: int = 9,
    task: int = 4,
    action: str = "ANNOTATION_CREATED",
    updated_at: str = "2026-11-22T13:34:23.197684Z",
    user: int | None = 1,
    **more: Any,
) -> dict[str, Any]:
    """An annotation event with the fields that the click log reads."""
    return {
        "action": action,
        "annotation": {
            "id": annotation,
            "task": task,
            "project": 3,
            "result": list(result),
            "completed_by": user,
            "lead_time": 6.5,
            "was_cancelled": False,
            "created_at": updated_at,
            "updated_at": updated_at,
        }
        | more,
        "project": {"id": 3},
        "task": {"id": task},
    }


@pytest.fixture
def engine(data_dir: Path) -> Iterator[Engine]:
    """An empty click log in SQLite."""
    made = make_engine(None, data_dir)
    migrate(made)
    yield made
    made.dispose()


@pytest.fixture
def table(engine: Engine) -> Callable[[str], list[dict[str, Any]]]:
    """All rows of a table, in the order of their ids."""

    def read(name: str) -> list[dict[str, Any]]:
        with engine.connect() as connection:
            rows = connection.exec_driver_sql(f"SELECT * FROM {name} ORDER BY 1").mappings()
            return [dict(row) for row in rows]

    return read


@pytest.fixture
def served(data_dir: Path, runner: Any) -> Iterator[Callable[..., Any]]:
    """Makes an app with settings; its click log is closed in the end."""
    settings = Settings(_env_file=None, data_dir=data_dir)
    made = []

    def make(**changes: Any):
        made.append(create_app(settings.model_copy(update=changes), runner))
        client = made[-1].test_client()
        # A server closes each response when it has sent it; the test client reads it and then closes it.
        post = client.post
        client.post = lambda *args, **kwargs: post(*args, buffered=True, **kwargs)
        return client, made[-1].extensions["bald_sam_clicks"]

    yield make
    for app in made:
        if app.extensions["bald_sam_clicks"] is not None:
            app.extensions["bald_sam_clicks"].close()

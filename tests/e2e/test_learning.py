"""A project in a real Label Studio learns: its button, the events, and the version that it shows, without a restart."""

from __future__ import annotations

import io
import json
import subprocess
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image

from ml_backend import connect
from ml_backend.labeling_config import recommended_config
from ml_backend.settings import Settings
from tests.e2e.conftest import COMMAND, Backend, Studio
from tests.ml_backend.test_learning import until
from worker import brush_rle

pytestmark = pytest.mark.e2e
IMAGES = 9


def region(truth: np.ndarray, number: int) -> dict[str, Any]:
    return {
        "id": f"mask{number:06d}",
        "type": "brushlabels",
        "from_name": "brush",
        "to_name": "image",
        "original_width": 80,
        "original_height": 60,
        "image_rotation": 0,
        "value": {"format": "rle", "rle": brush_rle.encode(truth), "brushlabels": ["Object"]},
    }


@pytest.fixture
def project(studio: Studio) -> int:
    """Nine pictures, each with a submitted mask and a leftover prompt."""
    config = recommended_config(["Object"])
    number = int(studio.api.call("POST", "/api/projects/", json={"title": "learn", "label_config": config})["id"])
    for n in range(IMAGES):
        pixels, truth = np.full((60, 80, 3), 90, np.uint8), np.zeros((60, 80), dtype=bool)
        pixels[15 : 35 + n, 20:50], truth[15 : 35 + n, 20:50] = (200, 60, 40), True
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        studio.api.call("POST", f"/api/projects/{number}/import", files={"file": (f"{n}.png", file.getvalue())})
    leftover = {"type": "keypoint", "from_name": "kp", "to_name": "image", "original_width": 80, "original_height": 60}
    for n, task in enumerate(studio.api.tasks(number)):
        truth = np.zeros((60, 80), dtype=bool)
        truth[15 : 35 + n, 20:50] = True
        point = {**leftover, "id": f"point{n}", "value": {"x": 40.0, "y": 40.0, "width": 0.5}}
        body = {"result": [region(truth, n), point], "lead_time": 1.0}
        studio.api.call("POST", f"/api/tasks/{task['id']}/annotations/", json=body)
    return number


def test_the_button_trains_and_the_version_follows(studio: Studio, backend: Backend, project: int) -> None:
    list(connect.connect(studio.api, project, backend.url, Settings()))
    entry = studio.api.call("GET", f"/api/ml?project={project}")[0]
    studio.api.call("POST", f"/api/ml/{entry['id']}/train", json={})

    def record() -> dict[str, Any]:
        found = requests.get(f"{backend.url}/training", timeout=10).json()["projects"]
        return dict(found.get(str(project), {"state": "idle"}))

    until(lambda: record()["state"] in ("done", "failed"), 240)
    assert record()["state"] == "done", record()
    result = record()["result"]
    assert result["head"] == f"project-{project}-v1"
    assert result["objects"] == result["held_out"] == IMAGES and not result["skipped"]

    redis = ["--redis-url", backend.redis_url] if backend.redis_url else []
    used = subprocess.run(
        [COMMAND, "heads", "use", result["head"], "--project", str(project), *redis],
        env=backend.environment, cwd=backend.folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f"Project {project} uses {result['head']}" in used.stdout
    version = f"bald-sam-tiny-{result['head']}"
    until(lambda: studio.api.call("GET", f"/api/ml?project={project}")[0]["model_version"] == version, 60)
    assert version in studio.api.call("GET", f"/api/ml/{entry['id']}/versions")["versions"]
    listed = subprocess.run(
        [COMMAND, "heads", "list", "--json", *redis],
        env=backend.environment, cwd=backend.folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(listed.stdout)["in_use"][str(project)]["head"] == result["head"]

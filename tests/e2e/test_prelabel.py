"""Pre-labelling in a real Label Studio: each task one prediction of a version, whoever is killed, whatever is lost."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import requests
from PIL import Image

from ml_backend import label_studio, labeling_config, processes
from ml_backend.label_studio_api import LabelStudioApi
from ml_backend.labeling_config import recommended_config
from ml_backend.prefetch import UNCERTAINTY, Prefetch
from ml_backend.prelabel.upload import Uploader, settle, tasks_with
from ml_backend.settings import Settings
from tests.e2e.conftest import COMMAND, EMAIL, PASSWORD

pytestmark = pytest.mark.e2e
VERSION = "bald-sam-tiny"
SIDE = 64


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    command = label_studio.ensure_environment(label_studio.default_environment(Path.cwd()))
    folder = tmp_path_factory.mktemp("label-studio")
    port = processes.free_port()
    with label_studio.LabelStudioServer(command, data_dir=folder, port=port, email=EMAIL, password=PASSWORD) as server:
        yield server.url, label_studio.personal_access_token(server.url, EMAIL, PASSWORD)


@pytest.fixture
def api(studio: tuple[str, str]) -> LabelStudioApi:
    return LabelStudioApi(*studio)


def picture(number: int) -> bytes:
    pixels = np.full((SIDE, SIDE, 3), 30, np.uint8)
    pixels[16:48, 16:48] = (200, number % 200, 60)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def project_of(api: LabelStudioApi, count: int) -> tuple[int, list[int]]:
    """A project with uploaded pictures, each with a rectangle of another model."""
    config = recommended_config(["Cell", "Other"])
    project = api.call("POST", "/api/projects/", json={"title": "Pre-labels", "label_config": config})["id"]
    files = {f"f{n}": (f"p{n}.png", picture(n), "image/png") for n in range(count)}
    api.call("POST", f"/api/projects/{project}/import", files=files)
    tasks = [task["id"] for task in api.tasks(project, regions=False)]
    assert len(tasks) == count
    rectangle = {
        "id": "rectangle1",
        "from_name": "rect",
        "to_name": "image",
        "type": "rectangle",
        "original_width": SIDE,
        "original_height": SIDE,
        "value": {"x": 20, "y": 20, "width": 60, "height": 60, "rotation": 0},
    }
    made = [{"task": task, "result": [rectangle], "score": 0.5, "model_version": "detector"} for task in tasks]
    assert api.create_predictions(project, made) == count
    return project, tasks


def ours(api: LabelStudioApi, project: int) -> dict[int, list[dict[str, Any]]]:
    """Predictions of ours by task."""
    return {
        task["id"]: [one for one in task["predictions"] if one["model_version"].startswith("bald-sam-")]
        for task in api.tasks(project)
    }


def environment(studio: tuple[str, str], folder: Path, **more: str) -> dict[str, str]:
    own = {"BALD_SAM_DATA_DIR": str(folder / "data"), "LABEL_STUDIO_URL": studio[0], "LABEL_STUDIO_API_KEY": studio[1]}
    return os.environ | own | more


def test_a_project_killed_repeated_replaced_ordered(
    studio: tuple[str, str], api: LabelStudioApi, tmp_path: Path
) -> None:
    project, tasks = project_of(api, 24)
    command = [str(COMMAND), "prelabel", "--project", str(project), "--json"]
    with subprocess.Popen(command, env=environment(studio, tmp_path), stdout=subprocess.PIPE) as process:
        while process.poll() is None and not tasks_with(api, project, VERSION):
            time.sleep(0.1)
        process.kill()
    api.create_prediction(tasks[-1], [], score=0.1, model_version="bald-sam-old")
    done = subprocess.run(
        [*command, "--replace"], env=environment(studio, tmp_path), check=True, capture_output=True, text=True
    )
    summary = json.loads(done.stdout)
    assert summary["done"] + summary["already_done"] == 24
    assert summary["failed"] == {}
    found = ours(api, project)
    assert all([one["model_version"] for one in predictions] == [VERSION] for predictions in found.values())
    assert all(len(predictions) == 1 for predictions in found.values())
    assert {one["value"]["brushlabels"][0] for one in found[tasks[0]][0]["result"] if one["type"] == "brushlabels"} == {
        "Cell"
    }
    assert api.project(project)["model_version"] == VERSION
    scores = {task: predictions[0]["score"] for task, predictions in found.items()}
    listed = [task["id"] for task in api.tasks(project, regions=False, ordering="tasks:predictions_score")]
    assert [scores[task] for task in listed] == sorted(scores.values())


def test_lost_answers_and_doubles(
    studio: tuple[str, str], api: LabelStudioApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Label Studio stores, but its answers are lost; and another process has stored the same."""
    project, tasks = project_of(api, 6)
    lost = {"POST": 2}
    request = api._session.request

    def loses_answers(method: str, url: str, **kwargs: Any) -> requests.Response:
        answer = request(method, url, **kwargs)
        if "/import/predictions" in url and lost["POST"]:
            lost["POST"] -= 1
            raise requests.ConnectionError("the answer is lost")
        return answer

    monkeypatch.setattr(api._session, "request", loses_answers)
    monkeypatch.setattr("ml_backend.prelabel.upload.RETRY_AFTER_S", (0.1, 0.1, 0.1))
    done: list[int] = []
    failed: dict[int, str] = {}
    with Uploader(api, project, VERSION, done=done.append, failed=failed.__setitem__) as uploader:
        for task in [*tasks, 10**9]:
            uploader.put(task, {"result": [], "score": 0.5, "model_version": VERSION})
    assert sorted(done) == tasks
    assert failed == {10**9: "The task was deleted."}
    assert {task: len(found) for task, found in ours(api, project).items()} == dict.fromkeys(tasks, 1)

    for version in (VERSION, VERSION, f"{VERSION}-longer", "bald-sam-old"):
        api.create_prediction(tasks[0], [], score=0.5, model_version=version)
    assert tasks_with(api, project, VERSION) == set(tasks)
    assert settle(api, project, VERSION, tasks, replace=False) == 2
    assert Counter(one["model_version"] for one in ours(api, project)[tasks[0]]) == Counter(
        [VERSION, f"{VERSION}-longer", "bald-sam-old"]
    )
    assert settle(api, project, VERSION, tasks, replace=True) == 2
    assert [one["model_version"] for one in ours(api, project)[tasks[0]]] == [VERSION]


def test_retrieve_predictions(studio: tuple[str, str], api: LabelStudioApi, tmp_path: Path) -> None:
    """The server is killed within the request, and again behind it; the next ones do the rest, each task once."""
    project, _ = project_of(api, 30)
    port = processes.free_port()
    url = f"http://127.0.0.1:{port}"
    settings = environment(studio, tmp_path, BALD_SAM_RETRIEVE_BUDGET_S="2")

    def serve() -> subprocess.Popen[bytes]:
        process = processes.start(
            [COMMAND, "serve", "--port", str(port)], env=settings, cwd=tmp_path, log=tmp_path / "log"
        )
        until(lambda: requests.get(f"{url}/health", timeout=2).ok)
        return process

    server = serve()
    try:
        api.call("POST", "/api/ml", json={"url": url, "title": "bald-sam", "is_interactive": True, "project": project})
        action = f"/api/dm/actions?project={project}&id=retrieve_tasks_predictions"
        everything = {"selectedItems": {"all": True, "excluded": []}, "filters": {"conjunction": "and", "items": []}}
        api.call("POST", action, json=everything)
        server.kill()
        server.wait()
        server = serve()
        until(lambda: len(tasks_with(api, project, VERSION)) > 3)
        server.kill()
        server.wait()
        server = serve()
        until(lambda: [one["state"] for one in requests.get(f"{url}/jobs", timeout=5).json()["jobs"]] == ["finished"])
    finally:
        server.kill()
        server.wait()
    assert set(map(len, ours(api, project).values())) == {1}


def test_outlines_from_a_field_of_the_tasks(studio: tuple[str, str], api: LabelStudioApi, tmp_path: Path) -> None:
    project, tasks = project_of(api, 3)
    polygons = '<PolygonLabels name="outline" toName="image" smart="false"><Label value="Cell"/></PolygonLabels>'
    config = api.project(project)["label_config"].rstrip().removesuffix("</View>") + polygons + "</View>"
    api.call("PATCH", f"/api/projects/{project}/", json={"label_config": config})
    for task, boxes in zip(
        tasks, ([[14, 14, 50, 50]], [{"bbox": [14, 14, 36, 36], "label": "Cell"}], "no list"), strict=True
    ):
        data = (api.task(task) or {})["data"] | {"boxes": boxes}
        api.call("PATCH", f"/api/tasks/{task}/", json={"data": data})
    command = [str(COMMAND), "prelabel", "--project", str(project), "--json"]
    command += ["--prompts", "field:boxes", "--format", "polygon", "--no-proposal"]
    done = subprocess.run(command, env=environment(studio, tmp_path), check=False, capture_output=True, text=True)
    assert done.returncode == 1, "one task failed"
    summary = json.loads(done.stdout)
    assert (summary["done"], summary["regions"]) == (2, 2)
    assert list(summary["failed"]) == [str(tasks[2])]
    assert "no list of boxes" in summary["failed"][str(tasks[2])]
    found = ours(api, project)
    assert found[tasks[2]] == []
    for task in tasks[:2]:
        (region,) = found[task][0]["result"]
        assert (region["from_name"], region["type"]) == ("outline", "polygonlabels")
        assert region["value"]["polygonlabels"] == ["Cell"]
        corners = np.array(region["value"]["points"])
        assert len(corners) >= 4
        assert np.abs(corners.mean(0) - 50).max() < 10
        assert np.ptp(corners, axis=0).min() > 35, "the square takes half the picture"


def test_embeddings_of_a_project(studio: tuple[str, str], api: LabelStudioApi, tmp_path: Path, redis_url: str) -> None:
    """Into a folder by the command itself, and into Redis by a worker."""
    project, tasks = project_of(api, 3)
    api.call("POST", f"/api/tasks/{tasks[0]}/annotations/", json={"result": []})
    settings = environment(studio, tmp_path, BALD_SAM_EMBEDDINGS_DIR=str(tmp_path / "embeddings"))
    command = [str(COMMAND), "embed", "--project", str(project), "--json"]

    def summary(*more: str) -> dict[str, Any]:
        done = subprocess.run([*command, *more], env=settings, check=True, capture_output=True, text=True)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    assert summary("--estimate")["images"] == 3
    assert not list((tmp_path / "embeddings").rglob("*.safetensors"))
    assert summary("--unlabelled")["done"] == 2
    assert len(list((tmp_path / "embeddings").rglob("*.safetensors"))) == 2

    del settings["BALD_SAM_EMBEDDINGS_DIR"]
    worker = processes.start(
        [COMMAND, "worker", "--redis-url", redis_url], env=settings, cwd=tmp_path, log=tmp_path / "worker"
    )
    try:
        done = summary("--redis-url", redis_url)
    finally:
        processes.stop(worker)
    assert (done["done"], done["failed"]) == (3, {})
    with redis.Redis.from_url(redis_url) as client:
        assert len(list(client.scan_iter("*embedding:*"))) == 3


def test_the_next_tasks_are_encoded_before_they_are_opened(
    studio: tuple[str, str], api: LabelStudioApi, tmp_path: Path
) -> None:
    project, tasks = project_of(api, 6)
    api.call("POST", f"/api/tasks/{tasks[1]}/annotations/", json={"result": []})
    config = api.project(project)["label_config"]
    port, folder = processes.free_port(), tmp_path / "embeddings"
    settings = environment(studio, tmp_path, BALD_SAM_PREFETCH="2", BALD_SAM_EMBEDDINGS_DIR=str(folder))
    server = processes.start([COMMAND, "serve", "--port", str(port)], env=settings, cwd=tmp_path, log=tmp_path / "log")
    try:
        url = f"http://127.0.0.1:{port}"
        until(lambda: requests.get(f"{url}/health", timeout=2).ok)
        opened = {"tasks": [api.task(tasks[0])], "project": f"{project}.1", "label_config": config, "params": {}}
        assert requests.post(f"{url}/predict", json=opened, timeout=60).ok
        until(lambda: len(list(folder.rglob("*.safetensors"))) == 3)
        time.sleep(3)
        kept = {path.stem for path in folder.rglob("*.safetensors")}
    finally:
        processes.stop(server)
    # The task that was opened, and the two behind it that nobody has annotated.
    assert kept == {hashlib.sha256(picture(number)).hexdigest() for number in (0, 2, 3)}

    ahead = Prefetch(Settings(_env_file=None, prefetch=2), None, api)  # type: ignore[arg-type]
    for task, score in zip(tasks, (0.9, 0.1, 0.8, 0.2, 0.7, 0.3), strict=True):
        api.create_prediction(task, [], score=score, model_version=VERSION)
    api.call("PATCH", f"/api/projects/{project}/", json={"model_version": VERSION, "sampling": UNCERTAINTY})
    following = [one.task for one in ahead.following(project, tasks[3], labeling_config.parse(config))]
    assert following == [tasks[5], tasks[4]], "the least sure of the others that nobody has annotated"


def until(condition: Any, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except requests.RequestException:
            pass
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.3)

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ml_backend.errors import RequestError
from ml_backend.model import BaldSamBackend, project_id


@pytest.mark.parametrize(
    ("value", "expected"),
    [("11.1795354867", 11), ("11", 11), (11, 11), ("", None), (None, None), (True, None), ("x.1", None), ("²", None)],
)
def test_project_id(value: Any, expected: int | None) -> None:
    assert project_id(value) == expected


def test_the_config_of_setup_is_used_where_none_is_given(settings: Any, runner: Any, capture: Any) -> None:
    body = capture("predict_interactive_plain_keypoint_3_prompts")
    backend = BaldSamBackend(label_config=body["label_config"], settings=settings, runner=runner)
    (answer,) = backend.predict(body["tasks"], context=body["params"]["context"], login=None, password=None)
    assert len(answer["result"]) == 2
    assert runner.jobs[0].image.project == 11
    with pytest.raises(RequestError):
        BaldSamBackend(settings=settings, runner=runner).predict(body["tasks"], context=None)


def test_pages_are_chosen_by_the_prompt(settings: Any, runner: Any, capture: Any) -> None:
    body = capture("predict_interactive_plain_keypoint_3_prompts")
    body["tasks"][0]["data"]["image"] = ["a.jpg", "b.jpg"]
    context = body["params"]["context"]
    context["result"] = [entry | {"item_index": 1} for entry in context["result"]]
    backend = BaldSamBackend(label_config=body["label_config"], settings=settings, runner=runner)
    (answer,) = backend.predict(body["tasks"], context=context)
    assert runner.jobs[0].image.url == "b.jpg"
    assert all(region["item_index"] == 1 for region in answer["result"])
    context["result"][-1]["item_index"] = 2
    with pytest.raises(RequestError):
        backend.predict(body["tasks"], context=context)


@pytest.mark.parametrize("args", [(), ((),), ("ANNOTATION_CREATED", {})])
def test_fit_takes_the_calls_of_both_servers(settings: Any, runner: Any, args: tuple[Any, ...]) -> None:
    backend = BaldSamBackend(settings=settings, runner=runner)
    assert backend.fit(*args, job_id="1", workdir="x", **({} if args[1:] else {"event": "A", "data": {}})) == {}


def test_the_base_of_2_x_gets_its_arguments(monkeypatch: pytest.MonkeyPatch, settings: Any, runner: Any) -> None:
    """2.x makes the model with a project id and a config; ours keeps its own arguments from that base."""
    seen: dict[str, Any] = {}

    def init(self: Any, project_id: str | None = None, label_config: str | None = None) -> None:
        seen.update(project_id=project_id, label_config=label_config)

    monkeypatch.setattr(BaldSamBackend.__mro__[1], "__init__", init)
    BaldSamBackend(project_id="3", label_config="<View/>", settings=settings, runner=runner)
    assert seen == {"project_id": "3", "label_config": "<View/>"}


SERVER = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from conftest import FakeRunner, load_capture
from ml_backend import model
from ml_backend.settings import Settings
runner = FakeRunner()
model._shared = (Settings(), runner)
client = model.init_app(Path(sys.argv[2])).test_client()
body = load_capture("predict_interactive_plain_keypoint_3_prompts")
seen = {}
if sys.argv[3] == "setup":
    answer = client.post("/setup", json={"project": body["project"], "schema": body["label_config"]})
    seen["setup"] = answer.status_code
answer = client.post("/predict", json=body)
seen["predict"] = answer.status_code
seen["ids"] = [r["id"] for r in answer.get_json()["results"][0]["result"]]
body["label_config"] = body["label_config"].replace('"brush"', '"other"')
seen["edited"] = client.post("/predict", json=body).get_json()["results"][0]["result"][0]["from_name"]
seen["batch"] = client.post("/predict", json=load_capture("predict_batch")).get_json()["results"][0]["result"]
seen["embedded"] = len(runner.embedded)
seen["torch"] = "torch" in sys.modules
print(json.dumps(seen))
"""


def serve_with_label_studio_ml(tmp_path: Path, mode: str) -> dict[str, Any]:
    """What a new process with label-studio-ml's own server answers."""
    command = [sys.executable, "-c", SERVER, str(Path(__file__).parent), str(tmp_path), mode]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_under_label_studio_ml_1_0_9_over_a_restart(tmp_path: Path) -> None:
    first = serve_with_label_studio_ml(tmp_path, "setup")
    restarted = serve_with_label_studio_ml(tmp_path, "restarted")
    assert first.pop("setup") == 200
    assert first == restarted
    assert first["predict"] == 200
    assert len(first["ids"]) == 2
    # The config of the request counts, not that of the last /setup.
    assert first["edited"] == "other"
    assert first["batch"] == []
    assert first["embedded"] == 1
    assert first["torch"] is False

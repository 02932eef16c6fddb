"""The whole way in a real browser: clicks, the proposed click, two objects, Submit, and what is saved."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from ml_backend.demo_pictures import PHOTOGRAPHS, sample_pictures
from ml_backend.labeling_config import recommended_config
from worker import brush_rle

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

PHOTOGRAPH = PHOTOGRAPHS[0]


@pytest.fixture
def project(studio, recorder, tmp_path) -> dict[str, Any]:
    """A project with one photograph and the backend connected; Label Studio adds the webhook."""
    picture = next(path for path in sample_pictures(tmp_path / "pictures") if path.name == PHOTOGRAPH)
    made = studio.api.call("POST", "/api/projects", json={"title": "Cats", "label_config": recommended_config(["Cat"])})
    with picture.open("rb") as content:
        studio.api.call("POST", f"/api/projects/{made['id']}/import", files={"file": (picture.name, content)})
    connection = {"url": recorder.url, "title": "bald-sam", "is_interactive": True, "project": made["id"]}
    assert studio.api.call("POST", "/api/ml", json=connection)["state"] == "CO"
    with Image.open(picture) as image:
        width, height = image.size
    return {"id": made["id"], "task": next(studio.api.tasks(made["id"]))["id"], "width": width, "height": height}


def mask_of(region: dict[str, Any]) -> np.ndarray:
    """bool H x W of a brush result."""
    return brush_rle.decode(region["value"]["rle"], region["original_height"], region["original_width"])


def covers(region: dict[str, Any], x: float, y: float) -> bool:
    """Whether the mask has the pixel under (x, y), percent."""
    mask = mask_of(region)
    height, width = mask.shape
    return bool(mask[int(y / 100 * height), int(x / 100 * width)])


def test_clicks_proposal_two_objects_and_submit(studio, backend, recorder, annotator, project):
    annotator.open(project["id"], project["task"])
    annotator.take_the_prompt_tool()

    first = annotator.click(40, 38)
    mask, proposal = first.region("brushlabels"), first.region("keypointlabels")
    assert covers(mask, 40, 38)
    assert proposal is not None, "the first click of an object gets a proposal"
    assert {mask["id"], proposal["id"]} <= set(annotator.suggestions()), "mask and ring are shown as suggestions"
    assert [region["type"] for region in annotator.regions()] == ["keypoint"]
    annotator.picture("1-first-click")

    if backend.workers:
        backend.kill_one_worker()
    else:
        backend.restart()

    at = proposal["value"]["x"], proposal["value"]["y"]
    second = annotator.click(*at)
    assert len(second.prompts) == 2
    prompt = second.prompts[1]["value"]
    assert (prompt["x"], prompt["y"]) == pytest.approx(at, abs=0.3), "a click on the ring is a click on the proposal"
    assert second.prompts[1]["is_positive"] is True
    assert second.region("brushlabels")["id"] == mask["id"], "one object, one mask id"
    assert covers(second.region("brushlabels"), *at)
    annotator.picture("2-click-on-the-ring")

    backend.restart()

    third = annotator.click(92, 90, negative=True)
    assert [prompt["is_positive"] for prompt in third.prompts] == [True, True, False]
    last = third.region("brushlabels")
    assert last["id"] == mask["id"]
    assert not covers(last, 92, 90)
    assert covers(last, 40, 38)
    annotator.picture("3-alt-click")

    annotator.accept()
    assert [(region["id"], region["type"]) for region in annotator.regions()] == [(last["id"], "brushlabels")]
    annotator.picture("4-accepted")

    # On a mask Label Studio selects it.
    beside = next(at for at in ((80, 12), (95, 12), (95, 60), (3, 4)) if not covers(last, *at))
    other = annotator.click(*beside)
    assert len(other.prompts) == 1, "prompts of the accepted object are gone"
    other_mask = other.region("brushlabels")
    assert other_mask["id"] != mask["id"], "the next object has its own id"
    annotator.picture("5-second-object")
    annotator.accept()
    annotator.submit()
    annotator.picture("6-submitted")

    saved = studio.api.call("GET", f"/api/tasks/{project['task']}/annotations/")
    assert len(saved) == 1
    result = saved[0]["result"]
    assert [region["type"] for region in result] == ["brushlabels", "brushlabels"], "only masks are saved"
    assert {region["id"] for region in result} == {last["id"], other_mask["id"]}
    by_id = {region["id"]: region for region in result}
    for answered in (last, other_mask):
        region = by_id[answered["id"]]
        assert (region["original_width"], region["original_height"]) == (project["width"], project["height"])
        assert mask_of(region).any()
        np.testing.assert_array_equal(mask_of(region), mask_of(answered))

    hooks = recorder.webhooks("ANNOTATION_CREATED")
    assert [hook.status for hook in hooks] == [201]
    assert all(one.status in {200, 201} for one in recorder.exchanges), [
        (one.path, one.status, one.answer) for one in recorder.exchanges if one.status not in {200, 201}
    ]

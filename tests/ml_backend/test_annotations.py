from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ml_backend.annotations import gather
from ml_backend.arms import Arm
from ml_backend.clicks import AnsweredClick, LoggedPrompt
from ml_backend.clicks.events import answer_event, unpack_rle
from ml_backend.clicks.schema import make_engine, migrate
from ml_backend.clicks.store import apply
from ml_backend.labeling_config import recommended_config
from worker import brush_rle
from worker.contract import Box, Click, Prompts

CONFIG = recommended_config(["Object"])


class Studio:
    """A project's tasks as the API gives them."""

    def __init__(self, *tasks: dict[str, Any]) -> None:
        self.found = tasks

    def project(self, project: int) -> dict[str, Any]:
        return {"id": project, "label_config": CONFIG}

    def tasks(self, project: int, *, filters: Sequence[Mapping[str, Any]] = ()) -> Iterator[dict[str, Any]]:
        assert filters[0]["filter"] == "filter:tasks:total_annotations"
        yield from self.found


def mask(name: str, left: int = 2, **changes: Any) -> dict[str, Any]:
    truth = np.zeros((8, 10), dtype=bool)
    truth[2:6, left : left + 4] = True
    return {
        "id": name,
        "type": "brushlabels",
        "from_name": "brush",
        "to_name": "image",
        "original_width": 10,
        "original_height": 8,
        "value": {"format": "rle", "rle": brush_rle.encode(truth), "brushlabels": ["Object"]},
        **changes,
    }


def annotation(number: int, *result: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"id": number, "result": list(result), "updated_at": f"2026-01-0{number}T00:00:00Z", **changes}


def task(number: int, *annotations: dict[str, Any]) -> dict[str, Any]:
    return {"id": number, "data": {"image": f"/data/upload/{number}.png"}, "annotations": list(annotations)}


def names(studio: Studio, **options: Any) -> list[tuple[int | None, str]]:
    return [(one.image.task, one.region) for one in gather(studio, 3, **options).objects]


def test_a_mask_is_what_the_annotator_drew() -> None:
    found = gather(Studio(task(1, annotation(1, mask("a")))), 3)
    (one,) = found.objects
    assert (one.width, one.height, one.image.url, one.image.project) == (10, 8, "/data/upload/1.png", 3)
    packed = list(unpack_rle(base64.b64decode(one.mask)))
    assert brush_rle.decode(packed, 8, 10).sum() == 16
    assert (found.masks, found.images) == (1, 1)


def test_leftovers_of_prompts_and_proposals_are_no_masks() -> None:
    point = {"id": "p", "type": "keypoint", "from_name": "kp", "to_name": "image", "value": {"x": 1, "y": 1}}
    proposal = {"id": "n", "type": "keypointlabels", "from_name": "next", "to_name": "image", "value": {"x": 1, "y": 1}}
    # Label Studio saves a mask twice when the label of a prompt was selected at the tick.
    twice = mask("a", type="keypointlabels", from_name="kp")
    other = mask("b", from_name="another-brush")
    studio = Studio(task(1, annotation(1, point, proposal, twice, mask("a"), mask("a"), other)))
    assert names(studio) == [(1, "a")]
    assert gather(studio, 3).left_out["not of the brush control"] == 1


def test_one_annotation_of_a_task_counts() -> None:
    studio = Studio(
        task(1, annotation(1, mask("old")), annotation(2, mask("new"))),
        task(2, annotation(1, mask("true"), ground_truth=True), annotation(2, mask("later"))),
        task(3, annotation(1, mask("kept")), annotation(2, mask("skipped"), was_cancelled=True)),
        task(4, annotation(1, mask("never"), was_cancelled=True)),
        task(5),
    )
    assert sorted(names(studio)) == [(1, "new"), (2, "true"), (3, "kept")]


@pytest.mark.parametrize(
    "damage",
    [{"original_width": None}, {"value": {"rle": "x"}}, {"value": {"rle": [300]}}, {"original_height": 0}],
)
def test_a_damaged_region_is_left_out(damage: dict[str, Any]) -> None:
    found = gather(Studio(task(1, annotation(1, mask("bad", **damage), mask("good")))), 3)
    assert [one.region for one in found.objects] == ["good"]
    assert found.left_out == {"damaged": 1}


def test_a_choice_takes_from_every_image_first_and_is_always_the_same() -> None:
    tasks = [task(n, annotation(1, *(mask(f"{n}-{i}", i % 5) for i in range(6)))) for n in range(1, 9)]
    chosen = names(Studio(*tasks), most=12)
    assert len(chosen) == 12
    assert {number for number, _ in chosen} == set(range(1, 9))
    assert sorted(names(Studio(*reversed(tasks)), most=12)) == sorted(chosen)
    found = gather(Studio(*tasks), 3, most=12)
    assert (found.masks, found.images) == (48, 8)


def test_the_digest_changes_with_the_masks_alone() -> None:
    first = gather(Studio(task(1, annotation(1, mask("a"))), task(2, annotation(1, mask("b")))), 3)
    again = gather(Studio(task(2, annotation(2, mask("b"))), task(1, annotation(2, mask("a")))), 3)
    edited = gather(Studio(task(1, annotation(1, mask("a", 4))), task(2, annotation(1, mask("b")))), 3)
    deleted = gather(Studio(task(1, annotation(1, mask("a")))), 3)
    assert first.digest == again.digest
    assert len({first.digest, edited.digest, deleted.digest}) == 3


def test_logged_clicks_come_with_their_mask(tmp_path: Path) -> None:
    engine = make_engine(None, tmp_path)
    migrate(engine)

    def click(number: int, *prompts: LoggedPrompt, error: str | None = None, project: int = 3) -> dict[str, Any]:
        arm = Arm("show", "show", "object", 0)
        return json.loads(
            json.dumps(
                answer_event(
                    AnsweredClick(
                        session=f"{project}:1:p1", project=project, task=1, mask_id="a", image="x.png", width=10,
                        height=8, prompts=prompts, received=float(number), answered=number + 0.5, arm=arm,
                        radius_px=1.0, error=error,
                    )
                )
            )
        )  # fmt: skip

    one, two = LoggedPrompt("p1", 3.0, 4.0), LoggedPrompt("p2", 9.0, 1.0, positive=False)
    box = LoggedPrompt("b", 1.0, 1.0, x1=7.0, y1=6.0)
    apply(
        engine,
        [
            click(3, one, two),
            click(1, one),
            click(2, one, error="No answer"),
            click(4, one, two),
            click(5, box),
            click(1, two, project=4),
        ],
    )
    found = gather(Studio(task(1, annotation(1, mask("a"), mask("b")))), 3, engine=engine)
    states = {one.region: one.states for one in found.objects}
    first = Click(x=3.0, y=4.0)
    assert states["a"] == (
        Prompts(clicks=(first,)),
        Prompts(clicks=(first, Click(x=9.0, y=1.0, positive=False))),
        Prompts(box=Box(x0=1.0, y0=1.0, x1=7.0, y1=6.0)),
    )
    assert states["b"] == ()

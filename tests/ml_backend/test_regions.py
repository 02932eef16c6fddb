from __future__ import annotations

from typing import Any

import pytest

from ml_backend.labeling_config import parse as parse_config
from ml_backend.labeling_config import recommended_config
from ml_backend.prompts import Session
from ml_backend.regions import build, mask_id
from worker.contract import Click, Prompts, Proposal, SegmentResult

CONFIG = parse_config(recommended_config(["Car", "Wheel"]))


def session(**fields: Any) -> Session:
    values: dict[str, Any] = {
        "prompts": Prompts(clicks=(Click(x=1, y=2),)),
        "ids": ("first",),
        "from_name": "kp",
        "label": "Car",
        "width": 800,
        "height": 400,
    }
    return Session(**values | fields)


def result(proposal: Proposal | None) -> SegmentResult:
    return SegmentResult(
        width=800, height=400, rle=[1, 2, 3], area=3, predicted_iou=0.9, proposal=proposal, model_version="tiny"
    )


RING = Proposal(x=200, y=300, positive=False, score=0.42, strategy="bald")


def test_mask_and_ring() -> None:
    mask, ring = build(result(RING), session(), CONFIG, "0123456789")
    assert mask == {
        "id": "0123456789",
        "from_name": "brush",
        "to_name": "image",
        "type": "brushlabels",
        "original_width": 800,
        "original_height": 400,
        "image_rotation": 0,
        "value": {"format": "rle", "rle": [1, 2, 3], "brushlabels": ["Car"]},
        "score": 0.9,
    }
    assert ring["dynamic"] is True
    assert (ring["from_name"], ring["type"], ring["score"]) == ("next", "keypointlabels", 0.42)
    assert ring["value"] == {"x": 25.0, "y": 75.0, "width": 0.8, "keypointlabels": ["Next click: outside?"]}


def test_no_ring_when_stopped_or_without_a_control() -> None:
    assert len(build(result(None), session(), CONFIG, "m")) == 1
    bare = parse_config(
        '<View><Image name="image" value="$image"/><BrushLabels name="brush" toName="image"><Label value="Car"/>'
        '</BrushLabels><KeyPoint name="kp" toName="image"/></View>'
    )
    assert len(build(result(RING), session(), bare, "m")) == 1


def test_a_mask_keeps_its_id_for_one_object_only() -> None:
    first = mask_id(1, 2, session())
    assert first == mask_id(1, 2, session(ids=("first", "second")))
    others = [mask_id(1, 2, session(ids=("second",))), mask_id(1, 3, session()), mask_id(2, 2, session())]
    assert len({first, *others}) == 4
    assert len(first) == 10
    assert mask_id(1, 2, session(ids=("\ud800",)))


def test_each_click_has_its_own_ring() -> None:
    sessions = [
        session(),
        session(ids=("first", "second")),
        session(prompts=Prompts(clicks=(Click(x=1, y=2, positive=False),))),
    ]
    rings = [build(result(RING), s, CONFIG, "m")[1]["id"] for s in sessions]
    assert len(set(rings)) == 3
    assert rings[0] == build(result(RING), session(), CONFIG, "m")[1]["id"]


@pytest.mark.parametrize("page", [0, 3])
def test_the_page_of_an_image_is_kept(page: int) -> None:
    assert all(r["item_index"] == page for r in build(result(RING), session(item_index=page), CONFIG, "m"))


def test_a_plain_brush_has_no_label() -> None:
    config = parse_config(
        '<View><Image name="image" value="$image"/><Brush name="b" toName="image"/><KeyPoint name="kp" toName="image"/>'
        "</View>"
    )
    (mask,) = build(result(None), session(label=None), config, "m")
    assert mask["type"] == "brush"
    assert mask["value"] == {"format": "rle", "rle": [1, 2, 3]}

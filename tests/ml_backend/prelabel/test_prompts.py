from __future__ import annotations

import json
from pathlib import Path

import pytest

from ml_backend.errors import RequestError
from ml_backend.labeling_config import parse, recommended_config
from ml_backend.prelabel.prompts import read_coco, read_csv, read_prompts
from ml_backend.prelabel.task_prompts import TaskPrompts, checked_source, from_field, from_regions
from worker.contract import Box, Click

CONFIG = parse(recommended_config(["Car", "Wheel"]))


def test_rows_with_the_same_label_are_clicks_on_one_object() -> None:
    text = "image,x,y,positive,label\na.png,1,2,1,Car\na.png,3,4,0,Car\na.png,5,6,,Wheel\nb.png,7.5,8\n"
    found = read_csv(text, "p.csv")
    car, wheel = found.by_name["a.png"].objects
    assert car.label == "Car"
    assert car.prompts.clicks == (Click(x=1, y=2), Click(x=3, y=4, positive=False))
    assert (wheel.label, wheel.prompts.clicks) == ("Wheel", (Click(x=5, y=6),))
    assert found.by_name["b.png"].objects[0].label is None
    assert found.notes == []


def test_several_objects_of_one_label() -> None:
    text = "image,x,y,label\na.png,1,2,Cell\na.png,30,40,Cell\n"
    together = read_csv(text, "p.csv")
    assert len(together.by_name["a.png"].objects) == 1
    assert "--each-point" in together.notes[0]
    assert len(read_csv(text, "p.csv", each_point=True).by_name["a.png"].objects) == 2
    apart = read_csv("image,x,y,label,object\na.png,1,2,Cell,1\na.png,30,40,Cell,2\na.png,3,4,Cell,1\n", "p.csv")
    assert [len(one.prompts.clicks) for one in apart.by_name["a.png"].objects] == [2, 1]


def test_boxes_in_a_csv() -> None:
    found = read_csv("image,x0,y0,x1,y1,label\na.png,1,2,3,4,Car\na.png,5,6,7,8,Car\n", "p.csv")
    assert [one.prompts.box for one in found.by_name["a.png"].objects] == [
        Box(x0=1, y0=2, x1=3, y1=4),
        Box(x0=5, y0=6, x1=7, y1=8),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "columns none"),
        ("file,x,y\na,1,2\n", "first line must be"),
        ("image,x,y\na.png,left,2\n", "line 2: `x` is 'left'"),
        ("image,x,y\na.png,nan,2\n", "line 2: `x`"),
        ("image,x,y,positive\na.png,1,2,maybe\n", "`positive` is 'maybe'"),
        ("image,x,y\n,1,2\n", "`image` is empty"),
        ("image,x0,y0,x1,y1\na.png,5,5,1,1\n", "no area"),
    ],
)
def test_what_is_wrong_with_a_csv_is_said(text: str, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_csv(text, "p.csv")
    assert said in str(caught.value)


def test_coco() -> None:
    content = {
        "images": [{"id": 7, "file_name": "x/a.png", "width": 64, "height": 48}],
        "categories": [{"id": 2, "name": "Car"}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 2, "bbox": [10, 20, 5, 6]}],
    }
    found = read_coco(json.dumps(content), "c.json").by_name["x/a.png"]
    assert (found.width, found.height) == (64, 48)
    assert found.objects[0].label == "Car"
    assert found.objects[0].prompts.box == Box(x0=10, y0=20, x1=15, y1=26)
    for broken, said in ((dict(content, annotations=[{"bbox": [1, 2], "image_id": 7}]), "four numbers"), ([], "COCO")):
        with pytest.raises(RequestError) as caught:
            read_coco(json.dumps(broken), "c.json")
        assert said in str(caught.value)


def test_the_image_of_an_entry(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("\ufeffimage,x,y\na.png,1,2\nsub/b c.png,1,2\nother/b.png,1,2\nmore/b.png,3,4\n", encoding="utf-8")
    found = read_prompts(path)
    assert found.of("/data/upload/7/0a1b2c3d-a.png") is found.by_name["a.png"]
    assert found.of("/data/local-files/?d=images/sub/b%20c.png") is found.by_name["sub/b c.png"]
    assert found.of("x/b.png") is None  # two entries could be meant
    assert found.of("more/b.png") is found.by_name["more/b.png"]
    assert found.unused == ["other/b.png"]
    with pytest.raises(RequestError):
        read_prompts(tmp_path / "gone.csv")


def region(kind: str, from_name: str, value: dict[str, object], **more: object) -> dict[str, object]:
    size = {"original_width": 200, "original_height": 100}
    return {"type": kind, "from_name": from_name, "to_name": "image", "value": value, **size, **more}


def test_regions_on_a_task() -> None:
    rectangle = region("rectangle", "rect", {"x": 10, "y": 20, "width": 5, "height": 10, "rotation": 0})
    results = [
        rectangle,
        region("keypoint", "kp", {"x": 50, "y": 50}),
        region("keypoint", "kp", {"x": 50, "y": 50}, is_positive=False),
        region("keypointlabels", "next", {"x": 1, "y": 1, "keypointlabels": ["Next click: inside?"]}),
        region("brushlabels", "brush", {"rle": [1, 2], "brushlabels": ["Wheel"]}),
        region("polygonlabels", "poly", {"points": [[10, 10], [20, 10], [20, 30]], "polygonlabels": ["Wheel"]}),
        region("rectangle", "rect", {"x": "?"}),
        region("choices", "c", {"choices": ["a"]}),
        "no region",
    ]
    found = from_regions({"annotations": [{"result": results}]}, CONFIG)
    assert (found.width, found.height) == (200, 100)
    box, point, brush, polygon = found.objects
    assert (box.prompts.box, box.label) == (Box(x0=20, y0=20, x1=30, y1=30), "Car")
    assert point.prompts.clicks == (Click(x=100, y=50),)
    assert (brush.brush, brush.label) == ((1, 2), "Wheel")
    assert (polygon.prompts.box, polygon.label) == (Box(x0=20, y0=10, x1=40, y1=30), "Wheel")

    ours = {"id": 2, "model_version": "bald-sam-tiny", "result": [region("keypoint", "kp", {"x": 1, "y": 1})]}
    theirs = {"id": 1, "model_version": "detector", "result": [rectangle]}
    assert from_regions({"predictions": [ours, theirs]}, CONFIG).objects == (box,)
    assert from_regions({"predictions": [ours]}, CONFIG).objects == ()
    skipped = {"was_cancelled": True, "result": [rectangle]}
    assert from_regions({"annotations": [skipped], "drafts": [{"result": results[1:2]}]}, CONFIG).objects == (point,)


def test_fields_of_a_task() -> None:
    value = [[1, 2, 3, 4], [5, 6], {"bbox": [1, 2, 3, 4], "label": "Car"}, {"x": 1, "y": 2, "object": 1}]
    value.append({"x": 3, "y": 4, "object": 1, "positive": False})
    found = from_field(value, "boxes").objects
    assert [one.prompts.box for one in found[:3]] == [Box(x0=1, y0=2, x1=3, y1=4), None, Box(x0=1, y0=2, x1=4, y1=6)]
    assert len(found[3].prompts.clicks) == 2
    assert from_field(json.dumps(value), "boxes").objects == found
    for broken in ("text", [[1, 2, 3]], [{"x": 1}], [5]):
        with pytest.raises(RequestError):
            from_field(broken, "boxes")


@pytest.mark.parametrize(
    ("source", "everything", "objects"),
    [("regions", False, None), ("auto", True, None), ("everything", True, None), ("field:boxes", False, 1)],
)
def test_sources(source: str, everything: bool, objects: int | None) -> None:
    task = {"id": 3, "data": {"image": "a.png", "boxes": [[1, 2, 3, 4]]}}
    item = TaskPrompts(checked_source(source), label="Wheel").item(task, CONFIG, 1)
    if objects is None and not everything:
        assert item is None
        return
    assert item is not None
    assert item.key == "3"
    assert (item.everything is not None) == everything
    assert len(item.objects) == (objects or 0)
    assert (item.everything.label if item.everything else item.objects[0].label) == "Wheel"
    for wrong in ("", "field:", "magic"):
        with pytest.raises(ValueError, match="none of"):
            checked_source(wrong)

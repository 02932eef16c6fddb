"""Batches on drawn images: the masks of the click path, whatever the prompts are, and clicks in the middle of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from worker import batch, brush_rle, runtime, tasks
from worker.contract import (
    Box,
    Click,
    Everything,
    ImageRef,
    ObjectPrompts,
    PrelabelFailure,
    PrelabelImage,
    PrelabelItem,
    PrelabelOptions,
    Prompts,
    RuntimeOptions,
    SegmentResult,
)
from worker.head.store import save_head
from worker.preemption import letting_through
from worker.runtime import Runtime

HEIGHT, WIDTH = 203, 301
INSIDE = Click(x=150.0, y=100.0)
DISC = (np.mgrid[:HEIGHT, :WIDTH][0] - 100) ** 2 + (np.mgrid[:HEIGHT, :WIDTH][1] - 150) ** 2 < 50**2


@pytest.fixture(autouse=True)
def picture(tmp_path: Path) -> str:
    torch.set_num_threads(2)
    image = np.full((HEIGHT, WIDTH, 3), 60, np.uint8)
    image[DISC] = (210, 60, 40)
    Image.fromarray(image).save(tmp_path / "disc.png")
    return str(tmp_path / "disc.png")


@pytest.fixture
def current(tmp_path: Path) -> Iterator[Runtime]:
    runtime._runtime = None
    runtime.configure(RuntimeOptions(data_dir=tmp_path, device="cpu", local_roots=(tmp_path,)))
    yield runtime.runtime()
    runtime._runtime = None


def item(url: str, *objects: ObjectPrompts, key: str = "a", **changes: object) -> PrelabelItem:
    return PrelabelItem.model_validate({"key": key, "image": ImageRef(url=url), "objects": objects, **changes})


def one(items: list[PrelabelItem], current: Runtime, **options: object) -> PrelabelImage:
    (answer,) = batch.run(items, PrelabelOptions.model_validate(options), current)
    assert isinstance(answer, PrelabelImage), answer
    return answer


def mask_of(image: PrelabelImage, number: int = 0) -> np.ndarray:
    return brush_rle.decode(image.regions[number].rle, image.height, image.width)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize(
    "prompts",
    [
        Prompts(clicks=(INSIDE,)),
        Prompts(clicks=(INSIDE, Click(x=10, y=10, positive=False), Click(x=130, y=90))),
        Prompts(box=Box(x0=95, y0=45, x1=205, y1=155)),
    ],
    ids=["click", "clicks", "box"],
)
@pytest.mark.parametrize("zoom", [False, True])
def test_the_mask_is_that_of_the_click_path(picture: str, current: Runtime, prompts: Prompts, zoom: bool) -> None:
    current.backbone.zoom = zoom
    job = {"image": {"url": picture}, "width": WIDTH, "height": HEIGHT, "session": "s"}
    clicked = tasks.segment({**job, "prompts": prompts.model_dump()})
    found = one([item(picture, ObjectPrompts(prompts=prompts, label="Disc"))], current, zoom=True)
    assert ("zoom" in clicked["timings"]) == zoom
    assert np.array_equal(mask_of(found), brush_rle.decode(SegmentResult.model_validate(clicked).rle, HEIGHT, WIDTH))
    assert found.regions[0].label == "Disc"
    assert found.regions[0].predicted_iou == pytest.approx(clicked["predicted_iou"], abs=1e-5)
    asked = found.proposal and pytest.approx((found.proposal.x, found.proposal.y))
    also = clicked["proposal"] and (clicked["proposal"]["x"], clicked["proposal"]["y"])
    assert asked == also  # both none where the rule of the head in use stops


def test_a_project_is_pre_labelled_with_its_own_head(picture: str, current: Runtime) -> None:
    shipped = current.proposer.head
    generous = shipped.posterior.mean.clone()
    generous[shipped.posterior.names.index("bias")] += 3.0
    own = replace(shipped, posterior=replace(shipped.posterior, mean=generous), shows="head")
    save_head(own, current.heads.folder / "own" / "head.safetensors")
    current.heads.use("own", 7)
    prompts = Prompts(clicks=(INSIDE,))
    general, mine = (
        one(
            [item(picture, ObjectPrompts(prompts=prompts), image=ImageRef(url=picture, project=project))],
            current,
            zoom=True,
        )
        for project in (6, 7)
    )
    assert mine.regions[0].area > general.regions[0].area
    job = {"image": {"url": picture, "project": 7}, "width": WIDTH, "height": HEIGHT, "session": "s"}
    clicked = tasks.segment({**job, "prompts": prompts.model_dump()})
    assert np.array_equal(mask_of(mine), brush_rle.decode(SegmentResult.model_validate(clicked).rle, HEIGHT, WIDTH))


def test_many_objects_a_rough_mask_and_another_frame(picture: str, current: Runtime) -> None:
    rough = ObjectPrompts(brush=tuple(brush_rle.encode(DISC)), label="Rough")
    clicks = [ObjectPrompts(prompts=Prompts(clicks=(Click(x=140.0 + n, y=100.0),)), label=str(n)) for n in range(20)]
    found = one([item(picture, rough, *clicks, width=WIDTH, height=HEIGHT)], current)
    assert sorted(region.label or "" for region in found.regions) == sorted(["Rough", *map(str, range(20))])
    by_label = {region.label: brush_rle.decode(region.rle, HEIGHT, WIDTH) for region in found.regions}
    assert iou(by_label["Rough"], DISC) > 0.5
    assert found.confidence == pytest.approx(np.mean([region.expected_iou for region in found.regions]))

    twice = Prompts(clicks=(Click(x=300.0, y=200.0),))
    frame = one([item(picture, ObjectPrompts(prompts=twice), width=2 * WIDTH, height=2 * HEIGHT)], current)
    assert (frame.width, frame.height) == (2 * WIDTH, 2 * HEIGHT)
    same = one([item(picture, ObjectPrompts(prompts=Prompts(clicks=(INSIDE,))))], current)
    assert iou(mask_of(frame)[::2, ::2], mask_of(same)) > 0.97


def test_nothing_is_looked_at_from_near_unless_asked(picture: str, current: Runtime) -> None:
    near, far = (
        one([item(picture, ObjectPrompts(prompts=Prompts(clicks=(INSIDE,))))], current, zoom=zoom)
        for zoom in (True, False)
    )
    # The masks of so simple a picture may be the same: both borders are guided to where it has its own.
    assert near.regions[0].predicted_iou != far.regions[0].predicted_iou
    current.backbone.zoom = False
    assert one([item(picture, ObjectPrompts(prompts=Prompts(clicks=(INSIDE,))))], current, zoom=True) == far


def test_polygons_cover_the_mask(picture: str, current: Runtime) -> None:
    import cv2

    prompts = ObjectPrompts(prompts=Prompts(box=Box(x0=95, y0=45, x1=205, y1=155)))
    mask = mask_of(one([item(picture, prompts)], current))
    outlined = one([item(picture, prompts)], current, polygons=True).regions[0]
    assert outlined.rle == []
    drawn = np.zeros((HEIGHT, WIDTH), np.uint8)
    for ring in outlined.rings:
        points = np.array(ring) * [WIDTH / 100, HEIGHT / 100] - 0.5
        cv2.fillPoly(drawn, [np.round(points).astype(np.int32)], 1)
    assert iou(drawn.astype(bool), mask) > 0.95


def test_everything_without_prompts(picture: str, current: Runtime) -> None:
    wide = Everything(points_per_side=4, min_iou=0, min_stability=0, min_area=0, max_area=1, max_overlap=0.7, label="X")
    found = one([item(picture, everything=wide)], current)
    assert found.regions
    assert {region.label for region in found.regions} == {"X"}
    masks = [mask_of(found, number) for number in range(len(found.regions))]
    assert all(iou(a, b) < 0.85 for i, a in enumerate(masks) for b in masks[:i])
    assert len(one([item(picture, everything=wide.model_copy(update={"top": 1}))], current).regions) == 1
    nothing = one([item(picture, everything=wide.model_copy(update={"min_iou": 2.0}))], current)
    assert (nothing.regions, nothing.confidence, nothing.proposal) == ((), 0.0, None)


def test_each_failure_is_its_own_and_the_order_stays(picture: str, current: Runtime, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("no image")
    good = ObjectPrompts(prompts=Prompts(clicks=(INSIDE,)))
    items = [
        item(picture, good, key="1"),
        item(str(tmp_path / "bad.png"), good, key="2"),
        item(str(tmp_path / "gone.png"), good, key="3"),
        item(picture, ObjectPrompts(brush=(1, 2, 3)), key="4"),
        item(picture, ObjectPrompts(), key="5"),
        item(picture, good, key="6"),
    ]
    answers = list(batch.run(items, PrelabelOptions(), current))
    assert [answer.key for answer in answers] == list("123456")
    failed = {answer.key: answer.error for answer in answers if isinstance(answer, PrelabelFailure)}
    assert sorted(failed) == ["2", "3", "4", "5"]
    assert "not an image" in failed["2"]
    assert "brush region cannot be read" in failed["4"]
    result = batch.prelabel({"items": [one.model_dump(mode="json") for one in items], "options": {}})
    assert (len(result["images"]), len(result["failed"])) == (2, 4)


def test_a_click_is_answered_in_the_middle_of_an_image(picture: str, current: Runtime, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "other.png")
    answered: list[dict[str, object]] = []
    asked = 0

    def urgent() -> None:
        nonlocal asked
        asked += 1
        if asked == 2:  # an image that nobody has encoded, while another one is being encoded
            url = str(tmp_path / "other.png")
            prompts = {"clicks": [{"x": 30, "y": 30}]}
            job = {"image": {"url": url}, "width": 64, "height": 64, "session": "s", "prompts": prompts}
            answered.append(tasks.segment(job))

    alone = one([item(picture, ObjectPrompts(prompts=Prompts(clicks=(INSIDE,))))], current)
    with letting_through(urgent):
        found = one([item(picture, ObjectPrompts(prompts=Prompts(clicks=(INSIDE,))))], current)
    assert asked > 3
    assert answered[0]["kind"] == "segment"
    assert found == alone


def test_kept_embeddings_are_found_by_clicks(picture: str, tmp_path: Path) -> None:
    options = RuntimeOptions(
        data_dir=tmp_path, device="cpu", local_roots=(tmp_path,), embeddings_dir=tmp_path / "embeddings"
    )
    kept = one([item(picture)], Runtime(options), keep=True)
    assert kept.regions == ()
    runtime._runtime = None
    runtime.configure(options)
    job = {"image": {"url": picture}, "width": WIDTH, "height": HEIGHT, "session": "s"}
    result = tasks.segment({**job, "prompts": {"clicks": [{"x": 150, "y": 100}]}})
    assert "encode" not in result["timings"]
    (file,) = (tmp_path / "embeddings").rglob("*.safetensors")
    file.write_bytes(b"broken")
    runtime._runtime = None
    runtime.configure(options.model_copy(update={"cache_mb": 100}))
    again = tasks.segment({**job, "prompts": {"clicks": [{"x": 150, "y": 100}]}})
    assert "encode" in again["timings"]
    assert again["rle"] == result["rle"]
    runtime._runtime = None

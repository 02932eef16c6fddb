"""The prompts of a pre-labelling run on the tasks themselves: a field of their data, or the regions that are there."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from ml_backend.errors import RequestError
from ml_backend.labeling_config import BOX_TAGS, MASK_TAGS, POINT_TAGS, LabelingConfig
from ml_backend.prelabel_prompts import BOX_COLUMNS, ImagePrompts, box_of, objects_of
from worker.contract import Box, Click, ObjectPrompts, Prompts

POLYGON_TAGS = frozenset({"polygon", "polygonlabels"})


def from_field(value: Any, name: str) -> ImagePrompts:
    """Prompts in a field of the task's data, in pixels of the original image.

    The field is a list whose members are boxes `[x0, y0, x1, y1]`, points `[x, y]`, or objects with `x0,y0,x1,y1`, with
    `bbox` (x, y, width, height) or with `x,y,positive`, and `label`, `object`. Points with the same `object` are one
    object, others one each. Raises RequestError.
    """
    if isinstance(value, str):  # imports from CSV carry lists as text
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, list):
        raise RequestError(f"The field `{name}` of the task is no list of boxes or points.")
    found: dict[Any, tuple[str | None, list[Click], list[Box]]] = {}
    for number, one in enumerate(value):
        where = f"field `{name}`, entry {number}"
        try:
            label, which, clicks, boxes = _entry(one, number, where)
        except (TypeError, ValueError, KeyError) as error:
            raise RequestError(f"{where} is neither a box nor a point ({type(error).__name__}: {error}).") from error
        _, all_clicks, all_boxes = found.setdefault(which, (label, [], []))
        all_clicks += clicks
        all_boxes += boxes
    return ImagePrompts(objects_of(found.values()))


def _entry(one: Any, number: int, where: str) -> tuple[str | None, Any, list[Click], list[Box]]:
    if isinstance(one, list):
        values = [float(part) for part in one]
        if len(values) == 2:
            return None, number, [Click(x=values[0], y=values[1])], []
        return None, number, [], [box_of(values, where)]
    label = str(one["label"]) if one.get("label") is not None else None
    which = ("object", one["object"], label) if "object" in one else number
    if "bbox" in one:
        x, y, width, height = (float(part) for part in one["bbox"])
        return label, which, [], [box_of([x, y, x + width, y + height], where)]
    if "x0" in one:
        return label, which, [], [box_of([float(one[column]) for column in BOX_COLUMNS], where)]
    click = Click(x=float(one["x"]), y=float(one["y"]), positive=bool(one.get("positive", True)))
    return label, which, [click], []


def from_regions(task: Mapping[str, Any], config: LabelingConfig, *, skip_versions: frozenset[str]) -> ImagePrompts:
    """Prompts from what is on a task already: its annotations, else its drafts, else predictions of other models.

    Rectangles and polygons are boxes, keypoints a click each, brushes rough masks. The proposal's control is left out,
    and so are predictions of `skip_versions`, which are our own. The label is the region's where the mask has it.
    """
    for results in _layers(task, skip_versions):
        found = [one for region in results if (one := _from_region(region, config)) is not None]
        if found:
            (width, height) = found[0][1]
            return ImagePrompts(tuple(one for one, size in found if size == (width, height)), width, height)
    return ImagePrompts()


def _layers(task: Mapping[str, Any], skip_versions: frozenset[str]) -> Iterable[list[Any]]:
    for kind in ("annotations", "drafts"):
        yield [
            region
            for one in task.get(kind) or []
            if isinstance(one, dict) and not one.get("was_cancelled")
            for region in one.get("result") or []
        ]
    predictions = [one for one in task.get("predictions") or [] if isinstance(one, dict)]
    by_version: dict[Any, list[Any]] = {}
    for prediction in sorted(predictions, key=lambda one: one.get("id") or 0):
        if prediction.get("model_version") not in skip_versions:
            by_version[prediction.get("model_version")] = prediction.get("result") or []
    yield from reversed(by_version.values())


def _from_region(region: Any, config: LabelingConfig) -> tuple[ObjectPrompts, tuple[int, int]] | None:
    if not isinstance(region, dict) or region.get("to_name") != config.image:
        return None
    if config.proposal is not None and region.get("from_name") == config.proposal.name:
        return None
    width, height, value = region.get("original_width"), region.get("original_height"), region.get("value")
    if not isinstance(width, int) or not isinstance(height, int) or not isinstance(value, dict):
        return None
    try:
        found = _shape(region, value, width, height)
    except (KeyError, TypeError, ValueError, RequestError):
        found = None
    if found is None:
        return None
    return found.model_copy(update={"label": _label(region, value, config)}), (width, height)


def _shape(region: Mapping[str, Any], value: Mapping[str, Any], width: int, height: int) -> ObjectPrompts | None:
    """The prompts that a region stands for; None for another kind of region, and for a negative click alone."""
    kind = str(region.get("type"))
    if kind in POINT_TAGS and region.get("is_positive", True):
        click = Click(x=float(value["x"]) * width / 100, y=float(value["y"]) * height / 100)
        return ObjectPrompts(prompts=Prompts(clicks=(click,)))
    if kind in BOX_TAGS:
        return ObjectPrompts(prompts=Prompts(box=_box_around(_corners(value, width, height))))
    if kind in POLYGON_TAGS:
        corners = [(float(x) * width / 100, float(y) * height / 100) for x, y in value["points"]]
        return ObjectPrompts(prompts=Prompts(box=_box_around(corners)))
    if kind in MASK_TAGS and value.get("rle"):
        return ObjectPrompts(brush=tuple(value["rle"]))
    return None


def _corners(value: Mapping[str, Any], width: int, height: int) -> list[tuple[float, float]]:
    """Corners of a rectangle, which Label Studio turns clockwise about its top left corner; pixels."""
    left, top = float(value["x"]) * width / 100, float(value["y"]) * height / 100
    across, down = float(value["width"]) * width / 100, float(value["height"]) * height / 100
    angle = math.radians(float(value.get("rotation") or 0))
    cos, sin = math.cos(angle), math.sin(angle)
    offsets = [(0.0, 0.0), (across, 0.0), (0.0, down), (across, down)]
    return [(left + dx * cos - dy * sin, top + dx * sin + dy * cos) for dx, dy in offsets]


def _box_around(corners: list[tuple[float, float]]) -> Box:
    xs, ys = [x for x, _ in corners], [y for _, y in corners]
    return box_of([min(xs), min(ys), max(xs), max(ys)], "region")


def _label(region: Mapping[str, Any], value: Mapping[str, Any], config: LabelingConfig) -> str | None:
    names = value.get(str(region.get("type"))) or value.get("labels")
    chosen = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    controls = {control.name: control for control in (*config.points, *config.boxes, config.mask)}
    control = controls.get(str(region.get("from_name")))
    if control is not None:
        return config.label_of(control, chosen)
    return config.mask.label(chosen) if chosen else None

"""The prompts of a pre-labelling run on the tasks themselves: a field of their data, or the regions that are there."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ml_backend.errors import RequestError
from ml_backend.labeling_config import BOX_TAGS, MASK_TAGS, POINT_TAGS, LabelingConfig
from ml_backend.prelabel.prompts import BOX_COLUMNS, ImagePrompts, PromptFile, box_of, objects_of
from ml_backend.prelabel.results import VERSION_PREFIX
from ml_backend.task_image import image_of
from worker.contract import Box, Click, Everything, ObjectPrompts, PrelabelItem, Prompts

#: Where the prompts of a task may come from; `field:NAME` beside them.
REGIONS, EVERYTHING, AUTO = "regions", "everything", "auto"
FIELD = "field:"
POLYGON_TAGS = frozenset({"polygon", "polygonlabels"})


@dataclass(frozen=True)
class TaskPrompts:
    """Where the prompts of tasks come from: `regions` on them, `field:NAME` of their data, `everything` that is on the
    image, `auto` (regions where there are any, else everything), or a file. `label`: for objects that have none."""

    source: str
    everything: Everything = field(default_factory=Everything)
    file: PromptFile | None = None
    label: str | None = None

    @property
    def needs_regions(self) -> bool:
        """Whether tasks must be asked for with their annotations and predictions."""
        return self.file is None and self.source in (REGIONS, AUTO)

    def item(self, task: Mapping[str, Any], config: LabelingConfig, project: int) -> PrelabelItem | None:
        """A task to pre-label, its id the key; None where there is no prompt. Raises RequestError."""
        image = image_of(task, config, project)
        key = str(task["id"])
        if self.file is not None:
            found = self.file.of(image.url, str(task.get("storage_filename") or ""))
        elif self.source.startswith(FIELD):
            name = self.source.removeprefix(FIELD)
            value = (task.get("data") or {}).get(name)
            found = from_field(value, name) if value is not None else None
        elif self.source == EVERYTHING:
            found = None
        else:
            found = from_regions(task, config)
        if found is not None and found.objects:
            objects = tuple(self._labelled(one) for one in found.objects)
            return PrelabelItem(key=key, image=image, objects=objects, width=found.width, height=found.height)
        if self.source in (EVERYTHING, AUTO) and self.file is None:
            everything = self.everything.model_copy(update={"label": self.label})
            return PrelabelItem(key=key, image=image, everything=everything)
        return None

    def _labelled(self, one: ObjectPrompts) -> ObjectPrompts:
        return one if one.label is not None else one.model_copy(update={"label": self.label})


def checked_source(source: str) -> str:
    """`source` if it is one. Raises ValueError."""
    if source in (REGIONS, EVERYTHING, AUTO) or (source.startswith(FIELD) and source != FIELD):
        return source
    raise ValueError(f"{source} is none of {REGIONS}, {EVERYTHING}, {AUTO} and {FIELD}NAME")


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
        except (AttributeError, TypeError, ValueError, KeyError) as error:
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


def from_regions(task: Mapping[str, Any], config: LabelingConfig) -> ImagePrompts:
    """Prompts from what is on a task already: its annotations, else its drafts, else predictions of other models.

    Rectangles and polygons are boxes, keypoints a click each, brushes rough masks. The proposal's control is left out,
    and so are predictions of our own. The label is the region's where the mask has it.
    """
    for results in _layers(task):
        found = [one for region in results if (one := _from_region(region, config)) is not None]
        if found:
            (width, height) = found[0][1]
            return ImagePrompts(tuple(one for one, size in found if size == (width, height)), width, height)
    return ImagePrompts()


def _layers(task: Mapping[str, Any]) -> Iterable[list[Any]]:
    for kind in ("annotations", "drafts"):
        yield [
            region
            for one in _list(task.get(kind))
            if isinstance(one, dict) and not one.get("was_cancelled")
            for region in _list(one.get("result"))
        ]
    predictions = [one for one in _list(task.get("predictions")) if isinstance(one, dict)]
    by_version: dict[str, list[Any]] = {}
    for prediction in sorted(predictions, key=lambda one: one["id"] if isinstance(one.get("id"), int) else 0):
        version = str(prediction.get("model_version") or "")
        if not version.startswith(VERSION_PREFIX):
            by_version[version] = _list(prediction.get("result"))
    yield from reversed(by_version.values())


def _list(value: Any) -> list[Any]:
    """A list of a request; empty where it holds something else."""
    return value if isinstance(value, list) else []


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

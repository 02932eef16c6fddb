"""From the context of a smart click to prompts in pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ml_backend.errors import RequestError
from ml_backend.labeling_config import BOX_TAGS, POINT_TAGS, Control, LabelingConfig
from worker.contract import Box, Click, Prompts

#: Longest side that a page may report, pixels.
MAX_SIDE = 65_535

_HINT = "Reload the page and click again; if it comes back, report the request."


@dataclass(frozen=True)
class Session:
    """The prompts of one object, in the order in which they were given, and what the answer needs to know about them.

    `ids`: the page's ids of the prompts, the first names the object; `width`, `height`: pixels of the original image;
    `item_index`: page of a multi-page image; `label`: brush label of the answer.
    """

    prompts: Prompts
    ids: tuple[str, ...]
    from_name: str
    label: str | None
    width: int
    height: int
    item_index: int | None = None


def image_name(context: Any) -> str | None:
    """Name of the image control that the newest prompt is on; None where there is no prompt."""
    for entry in reversed(_entries(context)):
        if isinstance(entry, dict) and ("is_positive" in entry or str(entry.get("type")) in BOX_TAGS):
            name = entry.get("to_name")
            return name if isinstance(name, str) else None
    return None


def parse(context: Any, config: LabelingConfig, max_prompts: int = 500) -> Session | None:
    """Keep what the annotator gave for the current object; None if nothing of it is a prompt.

    Kept are keypoints with `is_positive` and rectangles, of the prompt controls of `config`, on its image. The newest
    prompt decides: of several prompt controls only its own counts (each class has its own), and of several rectangles
    the newest is the box. Percent of the image become pixels. Raises RequestError (422) in plain sentences, also for
    more than `max_prompts` regions: more than anybody gives one object.
    """
    entries = _entries(context)
    if len(entries) > max_prompts:
        raise RequestError(
            f"{len(entries)} regions in one context; at most {max_prompts} are read.",
            "Accept or delete the mask on screen and start the object again, or raise BALD_SAM_MAX_PROMPTS.",
        )
    controls = {c.name: c for c in (*config.points, *config.boxes)}
    kept = [e for e in entries if isinstance(e, dict) and _is_prompt(e, config, controls)]
    if not kept:
        return None
    newest = kept[-1]
    control = controls[newest["from_name"]]
    page = _item_index(newest)
    kept = [e for e in kept if e["from_name"] == control.name and _item_index(e) == page]
    if control in config.boxes:
        # A floating tick leaves older rectangles behind; their masks are done.
        kept = [newest]
    width, height = _size(newest)
    ids = tuple(_id(e) for e in kept)
    if control in config.boxes:
        prompts = Prompts(box=_box(newest, width, height))
    else:
        prompts = Prompts(clicks=tuple(_click(e, width, height) for e in kept))
    return Session(
        prompts=prompts,
        ids=ids,
        from_name=control.name,
        label=config.label_of(control, _chosen_label(newest, control)),
        width=width,
        height=height,
        item_index=page,
    )


def _entries(context: Any) -> list[Any]:
    if context is None:
        return []
    if not isinstance(context, dict):
        raise RequestError("`params.context` must be an object or null.", _HINT)
    entries = context.get("result")
    if entries is None:
        return []
    if not isinstance(entries, list):
        raise RequestError("`params.context.result` must be a list of regions.", _HINT)
    return entries


def _is_prompt(entry: dict[str, Any], config: LabelingConfig, controls: dict[str, Control]) -> bool:
    from_name = entry.get("from_name")
    control = controls.get(from_name) if isinstance(from_name, str) else None
    if control is None or entry.get("to_name") != config.image:
        return False
    kind = str(entry.get("type"))
    if control in config.boxes:
        return kind in BOX_TAGS
    # Keypoints accepted earlier and those of plain tools come along without `is_positive`.
    return kind in POINT_TAGS and "is_positive" in entry


def _item_index(entry: dict[str, Any]) -> int | None:
    index = entry.get("item_index")
    if index is None:
        return None
    if not isinstance(index, int) or isinstance(index, bool) or index < 0:
        raise RequestError("`item_index` of a prompt must be a page number from 0.", _HINT)
    return index


def _id(entry: dict[str, Any]) -> str:
    value = entry.get("id")
    if not isinstance(value, str) or not value:
        raise RequestError("A prompt has no `id`.", _HINT)
    return value


def _size(entry: dict[str, Any]) -> tuple[int, int]:
    width, height = entry.get("original_width"), entry.get("original_height")
    for name, value in (("original_width", width), ("original_height", height)):
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_SIDE:
            raise RequestError(f"`{name}` of a prompt must be a number of pixels from 1 to {MAX_SIDE}.", _HINT)
    assert isinstance(width, int)
    assert isinstance(height, int)
    return width, height


def _numbers(entry: dict[str, Any], *names: str) -> list[float]:
    value = entry.get("value")
    if not isinstance(value, dict):
        raise RequestError("A prompt has no `value`.", _HINT)
    numbers = []
    for name in names:
        number = value.get(name)
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise RequestError(f"`value.{name}` of a prompt must be a number.", _HINT)
        # Compared before conversion: JSON integers may be too long for a float. NaN fails every comparison.
        if not -1000 <= number <= 1000:
            raise RequestError(f"`value.{name}` of a prompt is {number!s:.20}, which is no place on an image.", _HINT)
        numbers.append(float(number))
    return numbers


def _click(entry: dict[str, Any], width: int, height: int) -> Click:
    if not isinstance(entry["is_positive"], bool):
        raise RequestError("`is_positive` of a prompt must be true or false.", _HINT)
    x, y = _numbers(entry, "x", "y")
    return Click(x=_clamp(x * width / 100, width), y=_clamp(y * height / 100, height), positive=entry["is_positive"])


def _box(entry: dict[str, Any], width: int, height: int) -> Box:
    """The box around the rectangle, which Label Studio turns clockwise about its top left corner, in degrees."""
    x, y, w, h = _numbers(entry, "x", "y", "width", "height")
    angle = math.radians(_numbers(entry, "rotation")[0]) if "rotation" in entry["value"] else 0.0
    left, top, across, down = x * width / 100, y * height / 100, w * width / 100, h * height / 100
    cos, sin = math.cos(angle), math.sin(angle)
    corners = [(0.0, 0.0), (across, 0.0), (0.0, down), (across, down)]
    xs = [_clamp(left + dx * cos - dy * sin, width) for dx, dy in corners]
    ys = [_clamp(top + dx * sin + dy * cos, height) for dx, dy in corners]
    box = Box(x0=min(xs), y0=min(ys), x1=max(xs), y1=max(ys))
    if box.x0 == box.x1 or box.y0 == box.y1:
        raise RequestError("The rectangle has no area on the image.", "Draw it around the object.")
    return box


def _clamp(value: float, limit: int) -> float:
    return min(max(value, 0.0), float(limit))


def _chosen_label(entry: dict[str, Any], control: Control) -> str | None:
    value = entry.get("value")
    labels = value.get(control.tag) or value.get("labels") if isinstance(value, dict) else None
    if isinstance(labels, list) and labels and isinstance(labels[0], str):
        return labels[0]
    return None

"""The prompts of a pre-labelling run in a file: CSV or COCO."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from ml_backend.errors import RequestError
from worker.contract import Box, Click, ObjectPrompts, Prompts

#: Label Studio puts eight hexadecimal digits before the name of an uploaded file.
UPLOAD_PREFIX = re.compile(r"^[0-9a-f]{8}-")
COLUMNS = ("image", "x", "y", "positive", "label")
BOX_COLUMNS = ("x0", "y0", "x1", "y1")
_TRUE, _FALSE = frozenset({"1", "true", "yes", "y", "t", "+", ""}), frozenset({"0", "false", "no", "n", "f", "-"})


@dataclass(frozen=True)
class ImagePrompts:
    """The objects of one image, in pixels of a `width` x `height` image, or of the image itself without these."""

    objects: tuple[ObjectPrompts, ...] = ()
    width: int | None = None
    height: int | None = None


@dataclass
class PromptFile:
    """The prompts of a file by the image's name in it. `notes`: what somebody should know about how it was read."""

    by_name: dict[str, ImagePrompts]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._by_last: dict[str, list[str]] = {}
        for name in self.by_name:
            self._by_last.setdefault(PurePosixPath(name).name, []).append(name)
        self._used: set[str] = set()

    def of(self, *names: str) -> ImagePrompts | None:
        """The prompts of the image that one of `names` (paths, addresses, most exact first) means.

        An exact match counts first, then the last part of the path if only one entry has it, without the digits that
        Label Studio puts before the name of an upload.
        """
        for name in names:
            if name in self.by_name:
                self._used.add(name)
                return self.by_name[name]
        for name in names:
            last = file_name(name)
            for candidate in (last, UPLOAD_PREFIX.sub("", last)):
                found = self._by_last.get(candidate, [])
                if len(found) == 1:
                    self._used.add(found[0])
                    return self.by_name[found[0]]
        return None

    def label_all(self, label: str) -> None:
        """Give every object without a label this one."""
        for name, entry in self.by_name.items():
            objects = tuple(
                one if one.label is not None else one.model_copy(update={"label": label}) for one in entry.objects
            )
            self.by_name[name] = replace(entry, objects=objects)

    @property
    def unused(self) -> list[str]:
        """Entries that no image asked for."""
        return [name for name in self.by_name if name not in self._used]


def file_name(address: str) -> str:
    """Last part of a path or URL; for Label Studio's local files of the path in `?d=`."""
    parts = urlsplit(address)
    inner = parse_qs(parts.query).get("d")
    return PurePosixPath(inner[0] if inner else unquote(parts.path)).name


def read_prompts(path: Path, *, each_point: bool = False) -> PromptFile:
    """Read a CSV or a COCO file. Raises RequestError that names line and column of what is wrong."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise RequestError(f"The prompts in {path} cannot be read: {reason}.") from error
    return read_coco(text, path.name) if path.suffix.lower() == ".json" else read_csv(text, path.name, each_point)


def read_csv(text: str, name: str, each_point: bool = False) -> PromptFile:
    """`image,x,y,positive,label` or `image,x0,y0,x1,y1,label`, pixels of the original image; a header names them.

    Rows with the same image and label are clicks on one object; a column `object` tells several apart, `each_point`
    makes every row an object of its own. `positive` and `label` may be missing or empty.
    """
    reader = csv.DictReader(text.splitlines())
    columns = [column.strip().lower() for column in reader.fieldnames or []]
    reader.fieldnames = columns
    points, boxes = {"x", "y"} <= set(columns), set(BOX_COLUMNS) <= set(columns)
    if "image" not in columns or not (points or boxes):
        raise RequestError(
            f"{name} has the columns {', '.join(columns) or 'none'}.",
            f"The first line must be {','.join(COLUMNS)} (or image,{','.join(BOX_COLUMNS)},label for boxes).",
        )
    groups: dict[str, dict[Any, tuple[str | None, list[Click], list[Box]]]] = {}
    for row in reader:
        line = f"{name}, line {reader.line_num}"
        image = (row.get("image") or "").strip()
        if not image:
            raise RequestError(f"{line}: the column `image` is empty.", "Write the name of the image file.")
        label = (row.get("label") or "").strip() or None
        which: Any = reader.line_num if each_point else (label, (row.get("object") or "").strip())
        _, clicks, outlines = groups.setdefault(image, {}).setdefault(which, (label, [], []))
        if boxes and (row.get("x0") or "").strip():
            outlines.append(box_of([_number(row, column, line) for column in BOX_COLUMNS], line))
        if points and (row.get("x") or "").strip():
            clicks.append(Click(x=_number(row, "x", line), y=_number(row, "y", line), positive=_sign(row, line)))
    found = PromptFile({image: ImagePrompts(objects_of(things.values())) for image, things in groups.items()})
    if "object" not in columns and not each_point:
        several = sum(
            any(sum(click.positive for click in clicks) > 1 for _, clicks, _ in things.values())
            for things in groups.values()
        )
        if several:
            found.notes.append(
                f"{several} images have several positive clicks with the same label: they were taken as clicks on one "
                "object. If each is an object of its own, give --each-point, or tell them apart in a column `object`."
            )
    return found


def objects_of(groups: Iterable[tuple[str | None, list[Click], list[Box]]]) -> tuple[ObjectPrompts, ...]:
    """Objects of (label, clicks, boxes)."""
    found = []
    for label, clicks, boxes in groups:
        # One box is the frame of the clicks with the same label; several are so many objects.
        if len(boxes) > 1:
            found += [ObjectPrompts(prompts=Prompts(box=box), label=label) for box in boxes]
        elif clicks or boxes:
            prompts = Prompts(clicks=tuple(clicks), box=boxes[0] if boxes else None)
            found.append(ObjectPrompts(prompts=prompts, label=label))
    return tuple(found)


def _number(row: Mapping[str, Any], column: str, line: str) -> float:
    text = (row.get(column) or "").strip()
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RequestError(f"{line}: `{column}` is {text!r}.", "It must be a number of pixels.")
    return value


def _sign(row: Mapping[str, Any], line: str) -> bool:
    text = (row.get("positive") or "").strip().lower()
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    raise RequestError(f"{line}: `positive` is {text!r}.", "Write 1 for a click inside the object and 0 outside.")


def box_of(corners: list[float], where: str) -> Box:
    """The box of x0, y0, x1, y1. Raises RequestError, which says `where`, when it has no area."""
    x0, y0, x1, y1 = corners
    if not (x0 < x1 and y0 < y1):
        raise RequestError(f"{where}: the box {x0:g},{y0:g},{x1:g},{y1:g} has no area.", "x0 < x1 and y0 < y1.")
    return Box(x0=x0, y0=y0, x1=x1, y1=y1)


def read_coco(text: str, name: str) -> PromptFile:
    """A COCO file: each annotation's `bbox` (x, y, width, height in pixels) is a box prompt, its category the label."""
    try:
        content = json.loads(text)
        images = {image["id"]: image for image in content["images"]}
        labels = {category["id"]: str(category["name"]) for category in content.get("categories", [])}
        annotations = content["annotations"]
    except (ValueError, TypeError, KeyError) as error:
        raise RequestError(
            f"{name} is not a COCO file ({type(error).__name__}: {error}).",
            "It must have `images`, `annotations` with `bbox`, and `categories`.",
        ) from error
    objects: dict[Any, list[ObjectPrompts]] = {image: [] for image in images}
    for number, annotation in enumerate(annotations):
        where = f"{name}, annotation {annotation.get('id', number) if isinstance(annotation, dict) else number}"
        try:
            x, y, width, height = (float(value) for value in annotation["bbox"])
            mine = objects[annotation["image_id"]]
            label = labels.get(annotation.get("category_id"))
        except (ValueError, TypeError, KeyError) as error:
            raise RequestError(
                f"{where} has no `bbox` of four numbers or an unknown `image_id` ({type(error).__name__}: {error})."
            ) from error
        mine.append(ObjectPrompts(prompts=Prompts(box=box_of([x, y, x + width, y + height], where)), label=label))
    return PromptFile(
        {
            str(image["file_name"]): ImagePrompts(
                tuple(objects[key]), image.get("width") or None, image.get("height") or None
            )
            for key, image in images.items()
        }
    )

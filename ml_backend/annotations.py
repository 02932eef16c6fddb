"""The masks that a project's annotators submitted, and the clicks that led to them, as something to learn from."""

from __future__ import annotations

import base64
import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sqlalchemy import Engine, select

from ml_backend import labeling_config
from ml_backend.clicks.derive import in_order, read_prompts
from ml_backend.clicks.events import LoggedPrompt, pack_rle
from ml_backend.clicks.schema import answers, objects
from ml_backend.clicks.store import fetch
from ml_backend.errors import BackendError
from ml_backend.label_studio_api import where
from ml_backend.task_image import image_of
from worker.contract import Box, Click, LabelledObject, Prompts

#: Objects that are learnt from at most; more cost time and say little that is new.
MOST_OBJECTS = 400
#: States of a logged session that are handed on.
MOST_STATES = 20


class Tasks(Protocol):
    """What is needed of Label Studio; `LabelStudioApi` has it."""

    def project(self, project: int) -> dict[str, Any]: ...

    def tasks(self, project: int, *, filters: Sequence[Mapping[str, Any]] = ()) -> Iterator[dict[str, Any]]: ...


@dataclass(frozen=True)
class Gathered:
    """What was found. `objects`: chosen to learn from; `left_out`: reason -> how many regions."""

    objects: tuple[LabelledObject, ...]
    masks: int
    images: int
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """The same for the same masks: whether there is anything new to learn from."""
        parts = sorted(f"{one.image.task}:{one.region}:{one.mask}" for one in self.objects)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def gather(api: Tasks, project: int, *, engine: Engine | None = None, most: int = MOST_OBJECTS) -> Gathered:
    """Submitted masks of a project: of each task those of one annotation, see `submitted`; at most `most`, from as many
    images as there are. `engine`: of the click log, for the clicks that made them.

    Only results of the brush control count: prompts and proposals that were left behind are none, and a mask that Label
    Studio saved a second time under the prompt's label is one. Raises ConfigError, LabelStudioError.
    """
    label_config = api.project(project)["label_config"]
    left_out: Counter[str] = Counter()
    kept: list[tuple[int, int, int, LabelledObject]] = []
    masks = images = 0
    for task in api.tasks(project, filters=[where("total_annotations", "greater", 0)]):
        found = list(_objects(task, label_config, project, left_out))
        masks, images = masks + len(found), images + bool(found)
        # A heap of the least: first objects of all images come before second ones, in an order that never changes.
        for place, one in enumerate(sorted(found, key=_order)):
            entry = (-place, -_order(one), -masks - place, one)
            if len(kept) < most:
                heapq.heappush(kept, entry)
            else:
                heapq.heappushpop(kept, entry)
    chosen = [one for *_, one in sorted(kept, reverse=True)]
    if engine is not None:
        states = logged_states(engine, project, {one.region for one in chosen})
        chosen = [one.model_copy(update={"states": states.get((one.image.task, one.region), ())}) for one in chosen]
    return Gathered(tuple(chosen), masks, images, dict(left_out))


def submitted(task: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The annotation of a task to learn from: one marked as ground truth, else the newest. Skipped ones never count."""
    found = [one for one in task.get("annotations") or [] if not one.get("was_cancelled")]
    return max(
        found,
        key=lambda one: (bool(one.get("ground_truth")), str(one.get("updated_at") or ""), one.get("id") or 0),
        default=None,
    )


def logged_states(engine: Engine, project: int, regions: Iterable[str]) -> dict[tuple[int | None, str], Any]:
    """(task, mask id) -> the prompts after each answered click of the sessions that made these masks, oldest first."""
    wanted = sorted(regions)
    sessions: dict[tuple[int | None, str], tuple[Prompts, ...]] = {}
    with engine.connect() as connection:
        for start in range(0, len(wanted), 500):
            mine = objects.c.mask_id.in_(wanted[start : start + 500])
            keys = {
                row["id"]: (row["task"], row["mask_id"])
                for row in fetch(
                    connection,
                    select(objects.c.id, objects.c.task, objects.c.mask_id).where(objects.c.project == project, mine),
                )
            }
            rows = fetch(connection, select(answers).where(answers.c.object.in_(keys), answers.c.error.is_(None)))
            for number, key in keys.items():
                given = [_prompts(read_prompts(row)) for row in in_order([r for r in rows if r["object"] == number])]
                states = [state for state, before in zip(given, [None, *given], strict=False) if state != before]
                sessions[key] = tuple(state for state in states if state is not None)[:MOST_STATES]
    return sessions


def _objects(
    task: Mapping[str, Any], label_config: str, project: int, left_out: Counter[str]
) -> Iterator[LabelledObject]:
    annotation = submitted(task)
    seen: set[str] = set()
    for region in (annotation or {}).get("result") or []:
        value = region.get("value")
        if not isinstance(value, dict) or "rle" not in value:
            continue
        config = labeling_config.parse(label_config, region.get("to_name"))
        if (region.get("from_name"), region.get("type")) != (config.mask.name, config.mask.tag):
            left_out["not of the brush control"] += region.get("type") not in labeling_config.POINT_TAGS
            continue
        name = str(region.get("id"))
        if name in seen:
            continue
        seen.add(name)
        try:
            yield LabelledObject(
                image=image_of(dict(task), config, project, region.get("item_index")),
                region=name,
                width=region["original_width"],
                height=region["original_height"],
                mask=base64.b64encode(pack_rle(value["rle"])).decode(),
            )
        except (KeyError, TypeError, ValueError, BackendError):
            left_out["damaged"] += 1


def _order(one: LabelledObject) -> int:
    return int.from_bytes(hashlib.sha256(f"{one.image.task}:{one.region}".encode()).digest()[:6], "big")


def _prompts(given: Sequence[LoggedPrompt]) -> Prompts | None:
    """Logged prompts as the model got them; None where a log holds none that can be used."""
    clicks = tuple(Click(x=one.x, y=one.y, positive=one.positive) for one in given if one.x1 is None)
    boxes = [
        Box(x0=one.x, y0=one.y, x1=one.x1, y1=one.y1) for one in given if one.x1 is not None and one.y1 is not None
    ]
    return Prompts(clicks=clicks, box=boxes[-1] if boxes else None) if clicks or boxes else None

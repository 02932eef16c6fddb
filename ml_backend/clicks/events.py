"""What the web process hands to the click log, and its form in the journal (one JSON object a line)."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from uuid import uuid4

from ml_backend.arms import Arm
from ml_backend.clicks.clock import now

Json = dict[str, Any]

#: Webhook actions that the click log reads.
ANNOTATION_ACTIONS = frozenset({"ANNOTATION_CREATED", "ANNOTATION_UPDATED", "ANNOTATIONS_DELETED"})


@dataclass(frozen=True, slots=True)
class LoggedPrompt:
    """One prompt of a request: its id in the page, (x, y) in pixels of the original image; a box has (x1, y1) too."""

    id: str
    x: float
    y: float
    positive: bool = True
    x1: float | None = None
    y1: float | None = None


@dataclass(frozen=True, slots=True)
class AnsweredClick:
    """One /predict with prompts and its answer, or the `error` that was sent instead. Times: seconds since 1970, UTC.

    `results`: the regions as sent to Label Studio (the one with `value.rle` is the mask, its id is `mask_id`).
    `proposal`: x, y (pixels), positive, score, strategy; given even where the arm hides it.
    `radius_px`: radius of the ring on screen, in pixels of the original image.
    `user`, `seen`: who has drafts on this task, and the ids of the regions in them (see `seen_regions`).
    """

    session: str
    project: int
    task: int
    mask_id: str
    image: str
    width: int
    height: int
    prompts: tuple[LoggedPrompt, ...]
    received: float
    answered: float
    arm: Arm
    radius_px: float
    results: Sequence[Mapping[str, Any]] = ()
    proposal: Mapping[str, Any] | None = None
    stopped: str | None = None
    strategy: str = ""
    model_version: str = ""
    head: str = ""
    predicted_iou: float | None = None
    area: int | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    user: str | None = None
    seen: tuple[str, ...] = ()
    error: str | None = None
    event: str = field(default_factory=lambda: uuid4().hex)

    @property
    def shown(self) -> bool:
        """Whether a proposal went to the page with this answer."""
        return self.proposal is not None and self.arm.shows


def seen_regions(task: Mapping[str, Any]) -> tuple[str | None, tuple[str, ...]]:
    """(user, region ids) of the drafts in the task of a request. Label Studio shows each caller their own drafts."""
    drafts = _objects(task.get("drafts"))
    ids = tuple(str(region["id"]) for draft in drafts for region in _objects(draft.get("result")) if "id" in region)
    users = [str(draft["user"]) for draft in drafts if draft.get("user")]
    return (users[-1] if users else None), ids


def _objects(value: Any) -> list[Mapping[str, Any]]:
    """The objects of a list; nothing where a request holds something else."""
    return [each for each in value if isinstance(each, Mapping)] if isinstance(value, list) else []


def pack_rle(rle: Sequence[int]) -> bytes:
    """Brush RLE (bytes as ints) to a compact blob."""
    return zlib.compress(bytes(rle), 1)


def unpack_rle(blob: bytes) -> bytes:
    """The brush RLE that `pack_rle` packed, as bytes."""
    return zlib.decompress(blob)


def answer_event(click: AnsweredClick) -> Json:
    """The journal's form of an answer: the mask packed, the regions reduced to what recovery needs."""
    mask = next((r for r in click.results if "rle" in (r.get("value") or {})), None)
    proposal_region = next((r for r in click.results if r.get("dynamic")), None)
    event = asdict(replace(click, results=(), timings=dict(click.timings)))
    del event["results"]
    event["proposal"] = dict(click.proposal) if click.proposal else None
    event["shown"] = click.shown
    event["proposal_control"] = proposal_region["from_name"] if proposal_region else None
    event["region"] = _without_rle(mask) if mask else None
    event["rle"] = _text(pack_rle(mask["value"]["rle"])) if mask else None
    return {"kind": "answer", **event}


def webhook_event(body: Mapping[str, Any]) -> Json | None:
    """The journal's form of an annotation webhook; None for an action that the click log does not read."""
    action = body.get("action")
    if action not in ANNOTATION_ACTIONS:
        return None
    base = {"kind": "annotation", "event": uuid4().hex, "action": action, "received": now()}
    if action == "ANNOTATIONS_DELETED":
        return base | {"deleted": [int(item["id"]) for item in body.get("annotations") or []]}
    annotation = body["annotation"]
    task, project = body.get("task") or {}, body.get("project") or {}
    return base | {
        "annotation": int(annotation["id"]),
        "task": int(annotation.get("task") or task["id"]),
        "project": int(annotation.get("project") or project["id"]),
        "user_id": annotation.get("completed_by") if isinstance(annotation.get("completed_by"), int) else None,
        "lead_time": annotation.get("lead_time"),
        "cancelled": bool(annotation.get("was_cancelled")),
        "created_at": annotation.get("created_at"),
        "updated_at": annotation.get("updated_at"),
        "result_sha256": result_digest(annotation.get("result") or []),
        "result": [_packed_region(region) for region in annotation.get("result") or []],
    }


def packed_mask(region: Mapping[str, Any]) -> bytes | None:
    """The packed RLE of a region in an `annotation` event, None for a region without a mask."""
    return base64.b64decode(region["packed"]) if "packed" in region else None


def result_digest(result: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 of an annotation's result, to see later whether it was edited since."""
    return hashlib.sha256(json.dumps(list(result), sort_keys=True, default=str).encode()).hexdigest()


def dump(event: Json) -> str:
    """One line of the journal, in ASCII: half a surrogate pair in a request must not stop the file."""
    return json.dumps(event, separators=(",", ":")) + "\n"


def _without_rle(region: Mapping[str, Any]) -> Json:
    return {**region, "value": {key: value for key, value in region["value"].items() if key != "rle"}}


def _packed_region(region: Mapping[str, Any]) -> Json:
    rle = (region.get("value") or {}).get("rle")
    return {**_without_rle(region), "packed": _text(pack_rle(rle))} if isinstance(rle, list) and rle else dict(region)


def _text(blob: bytes) -> str:
    return base64.b64encode(blob).decode("ascii")

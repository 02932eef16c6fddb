"""From the answers of one object to its clicks: what was placed, moved and deleted, and what was proposed before.

Label Studio reports no undo, move or deletion: they are the difference between one request's prompts and the next's.
A pure function of the answers, so the order in which they reach the database does not matter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import hypot
from typing import Any

from ml_backend.clicks.events import LoggedPrompt

Row = dict[str, Any]

PLACED, MOVED, DELETED = "placed", "moved", "deleted"
HUMAN, SUGGESTED = "human", "suggested"
LEVELS = (85, 90, 95)

#: Columns of `clicks` that describe the answer to the click; empty for a click that got no answer of its own.
MEASURED = ("predicted_iou", "area", "changed_px", "iou_to_final", "queue_ms", "encode_ms", "decode_ms")


def in_order(answers: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Answers in the order in which their requests arrived."""
    return sorted(answers, key=lambda answer: (answer["received"], answer["event"]))


def read_prompts(answer: Mapping[str, Any]) -> list[LoggedPrompt]:
    """The prompts of an answer's request, in the order in which the annotator gave them."""
    return [LoggedPrompt(**prompt) for prompt in json.loads(answer["prompts"])]


def derive(answers: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows of `clicks` (without `id` and `object`) for all answers of one object, any order.

    A request that changes several prompts (a click that was dropped for a newer one, an undo before a click) gives
    several rows; the answer belongs to the last of them that is not a deletion.
    """
    rows: list[Row] = []
    numbers: dict[str, int] = {}
    before: dict[str, LoggedPrompt] = {}
    earlier: list[Mapping[str, Any]] = []
    iou: float | None = 0.0
    for answer in in_order(answers):
        now = {prompt.id: prompt for prompt in read_prompts(answer)}
        on_screen = _on_screen(earlier, answer["received"])
        changes: list[tuple[str, LoggedPrompt]] = [
            (DELETED, prompt) for id_, prompt in before.items() if id_ not in now
        ]
        for id_, prompt in now.items():
            if id_ not in before:
                numbers.setdefault(id_, len(numbers) + 1)
                changes.append((PLACED, prompt))
            elif prompt != before[id_]:
                changes.append((MOVED, prompt))
        changes.sort(key=lambda change: change[0] != DELETED)
        for position, (kind, prompt) in enumerate(changes):
            row = _row(kind, prompt, answer, on_screen)
            row |= {"seq": len(rows) + 1, "click": numbers[prompt.id]}
            if kind == MOVED:
                row |= {"from_x": before[prompt.id].x, "from_y": before[prompt.id].y}
            if position == len(changes) - 1:
                row |= _measured(answer, iou)
            rows.append(row)
        if answer["error"] is None:
            iou = answer["iou_to_final"]
        before = now
        earlier.append(answer)
    return rows


def summary(answers: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> Row:
    """Columns of `objects` that follow from its answers and clicks.

    `clicks` counts prompts placed or moved; `clicks_85` is that count when the mask first had an IoU of 0.85 with the
    submitted one, `seconds_85` the time from the first request to that answer.
    """
    ordered = in_order(answers)
    first, last = ordered[0], ordered[-1]
    good = [answer for answer in ordered if answer["error"] is None] or [last]
    found: Row = {
        "last": last["answered"],
        "clicks": sum(row["kind"] != DELETED for row in rows),
        "seconds": max(answer["answered"] for answer in ordered) - first["received"],
        "strategy": first["strategy"],
        "model_version": good[-1]["model_version"],
        "head": good[-1]["head"],
        "last_iou": good[-1]["iou_to_final"],
        "final_predicted_iou": good[-1]["predicted_iou"],
    }
    if users := [answer["user_email"] for answer in ordered if answer["user_email"]]:
        found["user_email"] = users[-1]  # otherwise another object's draft may have told who it is
    for level in LEVELS:
        there = next((a for a in ordered if (a["iou_to_final"] or 0.0) >= level / 100), None)
        count = sum(row["kind"] != DELETED and row["time"] <= there["received"] for row in rows) if there else None
        found[f"clicks_{level}"] = count
        found[f"seconds_{level}"] = there["answered"] - first["received"] if there else None
    return found


def _on_screen(earlier: Sequence[Mapping[str, Any]], moment: float) -> Mapping[str, Any] | None:
    """The newest answer that had left before `moment`; after an error the page shows nothing."""
    return next((answer for answer in reversed(earlier) if answer["answered"] <= moment), None)


def _row(kind: str, prompt: LoggedPrompt, answer: Mapping[str, Any], on_screen: Mapping[str, Any] | None) -> Row:
    row: Row = {
        "kind": kind,
        "prompt": prompt.id,
        "answer": None,
        "time": answer["received"],
        "think_s": answer["received"] - on_screen["answered"] if on_screen else None,
        "x": prompt.x,
        "y": prompt.y,
        "positive": prompt.positive,
        "x1": prompt.x1,
        "y1": prompt.y1,
        "from_x": None,
        "from_y": None,
        "origin": HUMAN,
        "proposal_x": None,
        "proposal_y": None,
        "proposal_positive": None,
        "proposal_score": None,
        "proposal_shown": False,
        "distance_px": None,
        "followed": None,
        "sign_matched": None,
        "strategy": answer["strategy"],
        "model_version": answer["model_version"],
        "delta_iou": None,
        "answer_ms": None,
        **dict.fromkeys(MEASURED),
    }
    if kind == DELETED or on_screen is None or on_screen["proposal_x"] is None:
        return row
    distance = None  # a box is never the answer to a proposed click
    if prompt.x1 is None:
        distance = hypot(prompt.x - on_screen["proposal_x"], prompt.y - on_screen["proposal_y"])
    # A thousandth of a pixel: percentages lose that much on their way through the page.
    followed = distance is not None and distance <= on_screen["radius_px"] + 1e-3
    matched = bool(prompt.positive) == bool(on_screen["proposal_positive"])
    shown = bool(on_screen["proposal_shown"])
    return row | {
        "origin": SUGGESTED if shown and followed and matched else HUMAN,
        "proposal_x": on_screen["proposal_x"],
        "proposal_y": on_screen["proposal_y"],
        "proposal_positive": bool(on_screen["proposal_positive"]),
        "proposal_score": on_screen["proposal_score"],
        "proposal_shown": shown,
        "distance_px": distance,
        "followed": followed,
        "sign_matched": matched,
        "strategy": on_screen["proposal_strategy"] or answer["strategy"],
    }


def _measured(answer: Mapping[str, Any], iou_before: float | None) -> Row:
    iou = answer["iou_to_final"]
    return {
        **{name: answer[name] for name in MEASURED},
        "answer": answer["id"],
        "answer_ms": (answer["answered"] - answer["received"]) * 1000,
        "delta_iou": None if iou is None or iou_before is None else iou - iou_before,
    }

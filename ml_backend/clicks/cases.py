"""Single clicks where people disagreed with a proposal, with the masks before and at the end."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, select
from sqlalchemy.exc import NoResultFound

from ml_backend.clicks import charts
from ml_backend.clicks.events import unpack_rle
from ml_backend.clicks.filter import Filter
from ml_backend.clicks.schema import answers, clicks, final_masks, masks, objects
from ml_backend.clicks.store import fetch
from worker import brush_rle

#: Of each kind.
CASES = 6


def find_cases(connection: Connection, chosen: Filter) -> list[dict[str, Any]]:
    """Clicks made elsewhere than at a shown proposal that changed most: `best` gained, `worst` lost."""
    found: list[dict[str, Any]] = []
    of_click = (
        "object",
        "click",
        "time",
        "x",
        "y",
        "positive",
        "proposal_x",
        "proposal_y",
        "delta_iou",
        "iou_to_final",
    )
    of_object = ("width", "height", "label", "task", "project")
    for kind, order in (("gained", clicks.c.delta_iou.desc()), ("lost", clicks.c.delta_iou.asc())):
        sign = clicks.c.delta_iou > 0.01 if kind == "gained" else clicks.c.delta_iou < -0.01
        query = select(*(clicks.c[name] for name in of_click)).where(
            clicks.c.proposal_shown.is_(True), clicks.c.followed.is_(False), sign
        )
        if conditions := chosen.conditions():
            query = query.join(objects, objects.c.id == clicks.c.object).where(*conditions)
        for click in fetch(connection, query.order_by(order).limit(CASES)):
            mine = objects.c.id == click["object"]
            thing = fetch(connection, select(*(objects.c[name] for name in of_object)).where(mine))[0]
            found_case = {**click, **thing}
            picture = _picture(connection, found_case)
            if picture is not None:
                found.append({"kind": kind, "picture": picture, **found_case})
    return found


def _picture(connection: Connection, case: dict[str, Any]) -> str | None:
    """The mask before a click and the submitted one; None where one of them cannot be had."""
    final_query = select(final_masks.c.rle).where(final_masks.c.object == case["object"])
    before_query = (
        select(masks.c.rle)
        .join(answers, answers.c.id == masks.c.answer)
        .where(answers.c.object == case["object"], answers.c.received < case["time"])
        .order_by(answers.c.received.desc())
        .limit(1)
    )
    size = case["height"], case["width"]
    try:
        before, final = (
            brush_rle.decode(unpack_rle(connection.execute(query).scalar_one()), *size)
            for query in (before_query, final_query)
        )
    except (ValueError, NoResultFound):
        return None
    return charts.silhouettes(before, final)

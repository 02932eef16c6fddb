"""Single clicks where people disagreed with a proposal, with the masks before and at the end."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, select
from sqlalchemy.exc import NoResultFound

from ml_backend.clicks import charts
from ml_backend.clicks.events import unpack_rle
from ml_backend.clicks.filter import Filter
from ml_backend.clicks.schema import answers, clicks, final_masks, masks, objects
from ml_backend.clicks.store import fetch
from worker import brush_rle

Mask = NDArray[np.bool_]

#: Of each kind.
CASES = 6


def find_cases(connection: Connection, chosen: Filter) -> list[dict[str, Any]]:
    """Clicks made elsewhere than at a shown proposal that changed most.

    Each with its `kind` (`gained` or `lost`), `view`: the (x, y, width, height) to look at, and its `picture`, all in
    pixels of the image.
    """
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
            case = click | fetch(connection, select(*(objects.c[name] for name in of_object)).where(mine))[0]
            found_masks = _masks(connection, case)
            if found_masks is not None:
                view = x, y, width, height = _view(found_masks[0] | found_masks[1], case)
                left, top = max(0, int(x)), max(0, int(y))
                before, final = (mask[top : int(y + height) + 1, left : int(x + width) + 1] for mask in found_masks)
                picture = {"href": charts.silhouettes(before, final), "x": left, "y": top}
                picture |= {"width": before.shape[1], "height": before.shape[0]}
                found.append({"kind": kind, "picture": picture, "view": view, **case})
    return found


def _masks(connection: Connection, case: dict[str, Any]) -> tuple[Mask, Mask] | None:
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
    return before, final


def _view(either: Mask, case: dict[str, Any]) -> tuple[float, float, float, float]:
    """The part of the image, 4 : 3, that shows both masks, the click and the proposal, with some air."""
    rows, columns = np.flatnonzero(either.any(1)), np.flatnonzero(either.any(0))
    xs = [case["x"], case["proposal_x"], *columns[[0, -1]].tolist()] if columns.size else [0.0, case["width"]]
    ys = [case["y"], case["proposal_y"], *rows[[0, -1]].tolist()] if rows.size else [0.0, case["height"]]
    width = max(1.3 * (max(xs) - min(xs)), 1.3 * (max(ys) - min(ys)) * 4 / 3, 48.0)
    height = width * 3 / 4
    return (max(xs) + min(xs) - width) / 2, (max(ys) + min(ys) - height) / 2, width, height

"""How far each intermediate mask was from the one that was submitted. Runs behind the writer, never in an answer."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Engine, select, update

from ml_backend.clicks.derive import in_order
from ml_backend.clicks.events import unpack_rle
from ml_backend.clicks.schema import answers, final_masks, masks, objects
from ml_backend.clicks.store import fetch, rederive
from worker import brush_rle

log = logging.getLogger(__name__)

#: Objects measured between two looks at the journal, so that new clicks never wait long.
AT_ONCE = 20


def measure_pending(engine: Engine, limit: int = AT_ONCE) -> int:
    """Measure objects with new answers or a new final mask; return how many were found (0: all is up to date)."""
    with engine.connect() as connection:
        ids = list(
            connection.scalars(
                select(objects.c.id).where(objects.c.stale.is_(True)).order_by(objects.c.id).limit(limit)
            )
        )
    for object_id in ids:
        measure(engine, object_id)
    return len(ids)


def measure(engine: Engine, object_id: int) -> None:
    """Fill in `changed_px` (pixels that differ from the mask before) and `iou_to_final` of one object's answers.

    The IoU is taken at full size between the mask as answered and as submitted, edits with the brush included.
    """
    with engine.connect() as connection:
        thing = fetch(connection, select(objects).where(objects.c.id == object_id))[0]
        final_blob = connection.scalar(select(final_masks.c.rle).where(final_masks.c.object == object_id))
        with_masks = select(answers.c.id, answers.c.event, answers.c.received, masks.c.rle).join(masks)
        found = fetch(connection, with_masks.where(answers.c.object == object_id))
    size = thing["height"], thing["width"]
    final = _decode(final_blob, size)
    before = np.zeros(size, np.bool_)
    measured = []
    for answer in in_order(found):
        mask = _decode(answer["rle"], size)
        if mask is None:
            continue
        measured.append(
            {
                "id": answer["id"],
                "changed_px": int(np.count_nonzero(mask ^ before)),
                "iou_to_final": None if final is None else iou(mask, final),
            }
        )
        before = mask
    with engine.begin() as connection:
        # Written first: it takes the lock. A final mask that came in meanwhile leaves the object stale.
        unchanged = objects.c.annotated.is_not_distinct_from(thing["annotated"])
        values = {"stale": False, "final_area": None if final is None else int(np.count_nonzero(final))}
        connection.execute(update(objects).where(objects.c.id == object_id, unchanged).values(values))
        for row in measured:
            connection.execute(update(answers).where(answers.c.id == row["id"]).values(row))
        rederive(connection, [object_id])
        late = select(answers.c.id).where(
            answers.c.object == object_id, answers.c.error.is_(None), answers.c.changed_px.is_(None)
        )
        if set(connection.scalars(late.where(answers.c.id.in_(select(masks.c.answer))))) - {row["id"] for row in found}:
            connection.execute(update(objects).where(objects.c.id == object_id).values(stale=True))


def iou(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Intersection over union of two masks of one shape; 1.0 for two empty ones."""
    union = np.count_nonzero(a | b)
    return float(np.count_nonzero(a & b) / union) if union else 1.0


def _decode(blob: bytes | None, size: tuple[int, int]) -> NDArray[np.bool_] | None:
    if blob is None:
        return None
    try:
        return brush_rle.decode(unpack_rle(blob), *size)
    except ValueError as error:  # an annotator's tool may have written what cannot be read: no outcome, no failure
        log.warning("A mask of the click log cannot be read: %s", error)
        return None

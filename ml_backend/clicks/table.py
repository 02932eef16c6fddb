"""The click log as a table: the columns of an export, and its rows in chunks of some thousand objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, select

from ml_backend.clicks.derive import LEVELS
from ml_backend.clicks.filter import Filter
from ml_backend.clicks.people import People
from ml_backend.clicks.rows import stream
from ml_backend.clicks.schema import clicks, objects

#: What is in memory at a time.
OBJECTS_AT_ONCE = 5_000

#: Columns of an export, in order, and their kind; docs/click-log.md says what each means.
COLUMNS = {
    "session": "text",
    "project": "int",
    "task": "int",
    "user": "text",
    "arm": "text",
    "click": "int",
    "time": "time",
    "x": "float",
    "y": "float",
    "positive": "bool",
    "origin": "text",
    "proposal_x": "float",
    "proposal_y": "float",
    "proposal_positive": "bool",
    "proposal_score": "float",
    "distance_px": "float",
    "strategy": "text",
    "model_version": "text",
    "predicted_iou": "float",
    "iou_to_final": "float",
    "delta_iou": "float",
    "answer_ms": "float",
    "kind": "text",
    "seq": "int",
    "prompt": "text",
    "proposal_shown": "bool",
    "followed": "bool",
    "sign_matched": "bool",
    "think_s": "float",
    "from_x": "float",
    "from_y": "float",
    "x1": "float",
    "y1": "float",
    "area": "int",
    "changed_px": "int",
    "queue_ms": "float",
    "encode_ms": "float",
    "decode_ms": "float",
    "image": "text",
    "width": "int",
    "height": "int",
    "label": "text",
    "mask_id": "text",
    "arm_mode": "text",
    "arm_unit": "text",
    "arm_seed": "int",
    "outcome": "text",
    "annotation": "int",
    "lead_time": "float",
    **{f"{what}_{level}": kind for level in LEVELS for what, kind in (("clicks", "int"), ("seconds", "float"))},
}

#: The columns of an export that are of the click; those before and after them are of its object.
OF_CLICK = tuple(name for name in COLUMNS if name in clicks.c)
HEAD = tuple(COLUMNS)[: list(COLUMNS).index(OF_CLICK[0])]
TAIL = tuple(COLUMNS)[len(HEAD) + len(OF_CLICK) :]


@dataclass
class Chunk:
    """Some thousand rows: for each the index of its object, the columns of the clicks, and the rows of the objects.

    `head`, `tail`: for each object the columns of an export before and after those of a click.
    """

    of: list[int]
    columns: dict[str, Sequence[Any]]
    head: list[tuple[Any, ...]]
    tail: list[tuple[Any, ...]]


def chunks(connection: Connection, chosen: Filter, people: People) -> Iterator[Chunk]:
    """All rows of an export in the order of objects and clicks. What all clicks of an object share is read once."""
    ids = connection.scalars(select(objects.c.id).where(*chosen.conditions()).order_by(objects.c.id)).all()
    of_object = [objects.c[name] for name in (*HEAD, *TAIL) if name != "user"]
    for start in range(0, len(ids), OBJECTS_AT_ONCE):
        mine = ids[start : start + OBJECTS_AT_ONCE]
        within = objects.c.id.between(mine[0], mine[-1])
        query = select(objects.c.id, objects.c.user_email, objects.c.user_id, *of_object)
        index: dict[int, int] = {}
        head: list[tuple[Any, ...]] = []
        tail: list[tuple[Any, ...]] = []
        for id_, email, user_id, *values in stream(connection, query.where(within, *chosen.conditions())):
            index[id_] = len(head)
            head.append((*values[:3], people.name(email, user_id), values[3]))
            tail.append(tuple(values[4:]))
        of_click = select(clicks.c.object, *(clicks.c[name] for name in OF_CLICK)).order_by(
            clicks.c.object, clicks.c.seq
        )
        rows = stream(connection, of_click.where(clicks.c.object.between(mine[0], mine[-1])))
        kept = [row for row in rows if row[0] in index]
        if kept:
            owners, *columns = zip(*kept, strict=True)
            of = [index[owner] for owner in owners]
            yield Chunk(of, dict(zip(OF_CLICK, columns, strict=True)), head, tail)

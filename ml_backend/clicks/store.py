"""Writing journal events into the database. Every function may be repeated with the same events: nothing doubles."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Engine, Select, Table, and_, delete, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from ml_backend.clicks.derive import derive, read_prompts, summary
from ml_backend.clicks.events import Json, packed_mask
from ml_backend.clicks.schema import annotation_events, answers, clicks, final_masks, masks, objects, recoveries

SUBMITTED, REJECTED, DELETED = "submitted", "rejected", "deleted"
PENDING = "pending"


def apply(engine: Engine, events: Sequence[Json]) -> None:
    """Write events, in order, in one transaction. Raises what SQLAlchemy raises; then nothing of it is written."""
    with engine.begin() as connection:
        batch: list[Json] = []
        for event in events:
            if event["kind"] == "answer":
                batch.append(event)
            else:
                _add_answers(connection, batch)
                batch = []
                _add_annotation(connection, event)
        _add_answers(connection, batch)


def fetch(connection: Connection, query: Select[Any]) -> list[dict[str, Any]]:
    """All rows of a query as dicts."""
    return [dict(row) for row in connection.execute(query).mappings()]


def rederive(connection: Connection, object_ids: Iterable[int]) -> None:
    """Make the clicks and the sums of these objects again from their answers."""
    for object_id in object_ids:
        found = fetch(connection, select(answers).where(answers.c.object == object_id))
        rows = derive(found)
        connection.execute(delete(clicks).where(clicks.c.object == object_id))
        if rows:
            connection.execute(insert(clicks), [row | {"object": object_id} for row in rows])
        connection.execute(update(objects).where(objects.c.id == object_id).values(summary(found, rows)))


def _add_answers(connection: Connection, events: Sequence[Json]) -> None:
    if not events:
        return
    _insert_new(connection, objects, [_object_row(event) for event in events], "session")
    sessions = sorted({event["session"] for event in events})
    # The lock lets two processes that answered clicks of one object derive one after the other (SQLite has one writer).
    locked = select(objects.c.session, objects.c.id).where(objects.c.session.in_(sessions)).order_by(objects.c.id)
    ids = {row[0]: row[1] for row in connection.execute(locked.with_for_update())}
    _insert_new(connection, answers, [_answer_row(event, ids[event["session"]]) for event in events], "event")
    names = [event["event"] for event in events]
    known = connection.execute(select(answers.c.event, answers.c.id).where(answers.c.event.in_(names)))
    answer_ids = {row[0]: row[1] for row in known}
    rows = [
        {"answer": answer_ids[event["event"]], "rle": base64.b64decode(event["rle"])}
        for event in events
        if event["rle"]
    ]
    _insert_new(connection, masks, rows, "answer")
    for event in events:
        values: Json = {"stale": True}
        if event["region"]:
            values |= {"region": json.dumps(event["region"])}
        if event["proposal_control"]:
            values |= {"proposal_control": event["proposal_control"]}
        connection.execute(update(objects).where(objects.c.id == ids[event["session"]]).values(values))
        if event["seen"]:
            accepted = and_(
                objects.c.project == event["project"],
                objects.c.task == event["task"],
                objects.c.mask_id.in_(event["seen"]),
                objects.c.accepted.is_(None),
            )
            values = {"accepted": event["received"]} | ({"user_email": event["user"]} if event["user"] else {})
            connection.execute(update(objects).where(accepted).values(values))
    rederive(connection, ids.values())


def _add_annotation(connection: Connection, event: Json) -> None:
    if event["action"] == "ANNOTATIONS_DELETED":
        rows = [
            _annotation_row(event, annotation, f"{event['event'][:20]}{i:012d}")
            for i, annotation in enumerate(event["deleted"])
        ]
        _insert_new(connection, annotation_events, rows, "event")
        gone = and_(objects.c.annotation.in_(event["deleted"]), objects.c.outcome == SUBMITTED)
        connection.execute(update(objects).where(gone).values(outcome=DELETED))
        return
    _insert_new(connection, annotation_events, [_annotation_row(event, event["annotation"], event["event"])], "event")
    regions = {str(region["id"]): region for region in reversed(event["result"]) if "packed" in region}
    ids = {str(region["id"]) for region in event["result"] if "id" in region}
    here = and_(objects.c.project == event["project"], objects.c.task == event["task"])
    columns = (
        objects.c.id,
        objects.c.mask_id,
        objects.c.annotation,
        objects.c.annotated,
        objects.c.outcome,
        objects.c.user_email,
        objects.c.started,
    )
    for known in fetch(connection, select(*columns).where(here).order_by(objects.c.id).with_for_update()):
        mine = objects.c.id == known["id"]
        region = regions.get(known["mask_id"])
        newest = known["annotation"] != event["annotation"] or (known["annotated"] or "") <= (event["updated_at"] or "")
        if region is not None and not event["cancelled"]:
            if newest:
                connection.execute(update(objects).where(mine).values(_submitted(event, region)))
                connection.execute(delete(final_masks).where(final_masks.c.object == known["id"]))
                connection.execute(insert(final_masks).values(object=known["id"], rle=packed_mask(region)))
        elif known["annotation"] == event["annotation"]:
            # It was in this annotation and has been removed, or the annotation was skipped.
            if newest:
                connection.execute(update(objects).where(mine).values(outcome=REJECTED, annotated=event["updated_at"]))
        elif known["outcome"] is None and _may_be_from(connection, known, event):
            if not event["cancelled"] and _left_behind(connection, known["id"], ids):
                _ask_recovery(connection, known["id"], event)
            else:
                connection.execute(update(objects).where(mine).values(outcome=REJECTED))


def _submitted(event: Json, region: Mapping[str, Any]) -> Json:
    value = region["value"]
    labels = next((value[key] for key in value if key.endswith("labels") and value[key]), None)
    return {
        "outcome": SUBMITTED,
        "annotation": event["annotation"],
        "annotated": event["updated_at"],
        "user_id": event["user_id"],
        "lead_time": event["lead_time"],
        "label": ", ".join(map(str, labels)) if labels else None,
        "stale": True,
    }


def _may_be_from(connection: Connection, known: Mapping[str, Any], event: Json) -> bool:
    """False if the object was made by somebody else than the annotation's user, as far as that is known."""
    if known["user_email"] is None or event["user_id"] is None:
        return True
    same_person = select(objects.c.user_id).where(
        objects.c.user_email == known["user_email"], objects.c.user_id.is_not(None)
    )
    users = set(connection.scalars(same_person.limit(100)))
    return not users or event["user_id"] in users


def _left_behind(connection: Connection, object_id: int, ids: set[str]) -> bool:
    """Whether prompts of this object were saved: the mask was pending, and Label Studio dropped it."""
    found = fetch(connection, select(answers).where(answers.c.object == object_id))
    return bool(found) and not ids.isdisjoint(prompt.id for answer in found for prompt in read_prompts(answer))


def _ask_recovery(connection: Connection, object_id: int, event: Json) -> None:
    row = {
        "object": object_id,
        "annotation": event["annotation"],
        "result_sha256": event["result_sha256"],
        "status": PENDING,
        "attempts": 0,
        "due": time.time(),
    }
    _insert_new(connection, recoveries, [row], "object", "annotation", "result_sha256")


def _insert_new(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]], *key: str) -> None:
    """Insert the rows whose key is not there yet."""
    if rows:
        dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
        connection.execute(dialect.insert(table).on_conflict_do_nothing(index_elements=key), rows)


def _object_row(event: Json) -> Json:
    arm = event["arm"]
    same = ("session", "project", "task", "mask_id", "image", "width", "height")
    return {name: event[name] for name in same} | {
        "arm": arm["name"],
        "arm_mode": arm["mode"],
        "arm_unit": arm["unit"],
        "arm_seed": arm["seed"],
        "started": event["received"],
        "stale": True,
    }


def _answer_row(event: Json, object_id: int) -> Json:
    proposal, timings = event["proposal"] or {}, event["timings"]
    same = (
        "event",
        "received",
        "answered",
        "radius_px",
        "stopped",
        "strategy",
        "model_version",
        "head",
        "predicted_iou",
        "area",
        "error",
    )
    return {name: event[name] for name in same} | {
        "object": object_id,
        "prompts": json.dumps(event["prompts"]),
        **{f"proposal_{name}": proposal.get(name) for name in ("x", "y", "positive", "score", "strategy")},
        "proposal_shown": event["shown"],
        "queue_ms": timings.get("queue"),
        "encode_ms": timings.get("encode"),
        "decode_ms": timings.get("decode"),
        "timings": json.dumps(timings),
        "user_email": event["user"],
    }


def _annotation_row(event: Json, annotation: int, name: str) -> Json:
    same = ("project", "task", "user_id", "lead_time", "cancelled", "updated_at")
    return {key: event.get(key) for key in same} | {
        "event": name,
        "action": event["action"],
        "annotation": annotation,
        "received": event["received"],
        "regions": len(event.get("result", ())),
    }

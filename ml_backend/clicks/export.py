"""The click log as files: Parquet, CSV, JSON lines, and one JSON file an image for prompting research."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import ColumnElement, Connection, Engine, select

from ml_backend.clicks.derive import LEVELS
from ml_backend.clicks.people import People
from ml_backend.clicks.schema import answers, clicks, objects

#: Rows in memory at a time.
CHUNK = 20_000

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


@dataclass(frozen=True)
class Filter:
    """Which objects: of these projects (all if empty), begun at or after `since` and before `until` (aware times)."""

    projects: tuple[int, ...] = ()
    since: datetime | None = None
    until: datetime | None = None

    def conditions(self) -> list[ColumnElement[bool]]:
        """For a query that has `objects` in it."""
        found: list[ColumnElement[bool]] = []
        if self.projects:
            found.append(objects.c.project.in_(self.projects))
        if self.since:
            found.append(objects.c.started >= self.since.timestamp())
        if self.until:
            found.append(objects.c.started < self.until.timestamp())
        return found


def export(engine: Engine, format_: str, out: Path, *, chosen: Filter, key: bytes | None) -> int:
    """Write the clicks to `out` (a file; a folder for `pointprompt`); return how many rows (or images) it holds.

    `key` None keeps the users' names, otherwise they become pseudonyms. A file appears only when it is complete.
    Raises ModuleNotFoundError if `parquet` is asked for without pyarrow, OSError if `out` cannot be written.
    """
    with engine.connect() as connection:
        people = People(connection, key)
        if format_ == "pointprompt":
            return _write_pointprompt(connection, out, chosen, people)
        part = out.with_name(out.name + ".part")
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            count = _WRITERS[format_](part, _chunks(connection, chosen, people))
            part.replace(out)
        finally:
            part.unlink(missing_ok=True)
    return count


Chunk = dict[str, Sequence[Any]]


def _chunks(connection: Connection, chosen: Filter, people: People) -> Iterator[Chunk]:
    """The columns of an export, some thousand rows at a time; `time` in seconds since 1970."""
    own = [clicks.c[name] if name in clicks.c else objects.c[name] for name in COLUMNS if name != "user"]
    query = (
        select(objects.c.user_email, objects.c.user_id, *own)
        .join_from(objects, clicks, clicks.c.object == objects.c.id)
        .where(*chosen.conditions())
        .order_by(objects.c.id, clicks.c.seq)
    )
    for rows in connection.execution_options(yield_per=CHUNK).execute(query).partitions():
        emails, ids, *values = zip(*rows, strict=True)
        chunk: Chunk = dict(zip((name for name in COLUMNS if name != "user"), values, strict=True))
        chunk["user"] = [people.name(email, user_id) for email, user_id in zip(emails, ids, strict=True)]
        yield {name: chunk[name] for name in COLUMNS}


def _write_parquet(out: Path, chunks: Iterator[Chunk]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {
        "text": pa.string(),
        "int": pa.int64(),
        "float": pa.float64(),
        "bool": pa.bool_(),
        "time": pa.timestamp("us", tz="UTC"),
    }
    schema = pa.schema([(name, types[kind]) for name, kind in COLUMNS.items()])
    count = 0
    with pq.ParquetWriter(out, schema, compression="zstd") as writer:
        for chunk in chunks:
            chunk["time"] = _microseconds(chunk["time"])
            columns = [pa.array(chunk[name], type=schema.field(name).type) for name in COLUMNS]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
            count += len(chunk["session"])
    return count


def _write_csv(out: Path, chunks: Iterator[Chunk]) -> int:
    count = 0
    with out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for chunk in chunks:
            for name, kind in COLUMNS.items():
                if kind == "bool":
                    chunk[name] = [None if value is None else "true" if value else "false" for value in chunk[name]]
            chunk["time"] = _iso(chunk["time"])
            writer.writerows(zip(*chunk.values(), strict=True))
            count += len(chunk["session"])
    return count


def _write_jsonl(out: Path, chunks: Iterator[Chunk]) -> int:
    count = 0
    encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False).encode
    with out.open("w", encoding="utf-8") as file:
        for chunk in chunks:
            chunk["time"] = _iso(chunk["time"])
            rows = zip(*chunk.values(), strict=True)
            file.writelines(encode(dict(zip(COLUMNS, row, strict=True))) + "\n" for row in rows)
            count += len(chunk["session"])
    return count


_WRITERS: dict[str, Callable[[Path, Iterator[Chunk]], int]] = {
    "parquet": _write_parquet,
    "csv": _write_csv,
    "jsonl": _write_jsonl,
}
FORMATS = (*_WRITERS, "pointprompt")


_OF_OBJECT = (
    *("id", "session", "project", "task", "mask_id", "image", "width", "height"),
    *("label", "arm", "outcome", "user_email", "user_id"),
)
_OF_ANSWER = (
    *("received", "event", "prompts", "predicted_iou", "iou_to_final"),
    *("proposal_x", "proposal_y", "proposal_positive", "proposal_score", "proposal_shown"),
)


def _write_pointprompt(connection: Connection, out: Path, chosen: Filter, people: People) -> int:
    """`out/<project>/<task>.json`: an image, its objects, and for each time step the points as the model got them."""
    names = (*_OF_OBJECT, *_OF_ANSWER)
    query = (
        select(*(objects.c[name] for name in _OF_OBJECT), *(answers.c[name] for name in _OF_ANSWER))
        .join_from(objects, answers, answers.c.object == objects.c.id)
        .where(*chosen.conditions(), answers.c.error.is_(None))
        .order_by(objects.c.project, objects.c.task)
    )
    rows = (
        dict(zip(names, row, strict=True))
        for part in connection.execution_options(yield_per=CHUNK).execute(query).partitions()
        for row in part
    )
    count = 0
    for (project, task), of_image in groupby(rows, key=itemgetter("project", "task")):
        things: dict[int, list[dict[str, Any]]] = {}
        for row in of_image:
            things.setdefault(row["id"], []).append(row)
        first = next(iter(things.values()))[0]
        image = {name: first[name] for name in ("project", "task", "image", "width", "height")}
        image["objects"] = [_point_object(steps, people) for _, steps in sorted(things.items())]
        folder = out / str(project)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{task}.json").write_text(json.dumps(image, separators=(",", ":")), encoding="utf-8")
        count += 1
    if not count:
        out.mkdir(parents=True, exist_ok=True)
    return count


def _point_object(steps: list[dict[str, Any]], people: People) -> dict[str, Any]:
    steps.sort(key=itemgetter("received", "event"))
    first = steps[0]
    return {
        "session": first["session"],
        "mask_id": first["mask_id"],
        "user": people.name(first["user_email"], first["user_id"]),
        **{name: first[name] for name in ("label", "arm", "outcome")},
        "steps": [_step(step, first["received"]) for step in steps],
    }


def _step(row: dict[str, Any], start: float) -> dict[str, Any]:
    prompts = json.loads(row["prompts"])
    points = [prompt for prompt in prompts if prompt["x1"] is None]
    step = {
        "seconds": round(row["received"] - start, 3),
        "positive": [[point["x"], point["y"]] for point in points if point["positive"]],
        "negative": [[point["x"], point["y"]] for point in points if not point["positive"]],
        "predicted_iou": row["predicted_iou"],
        "iou_to_final": row["iou_to_final"],
        "proposal": None,
    }
    boxes = [[prompt[name] for name in ("x", "y", "x1", "y1")] for prompt in prompts if prompt["x1"] is not None]
    if boxes:
        step["box"] = boxes[-1]
    if row["proposal_x"] is not None:
        step["proposal"] = {name: row[f"proposal_{name}"] for name in ("x", "y", "positive", "score", "shown")}
    return step


def parse_day(text: str) -> datetime:
    """`2026-11-23` (midnight UTC) or an ISO time; without a zone it is UTC. Raises ValueError."""
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _microseconds(seconds: Sequence[float]) -> Any:
    return np.round(np.asarray(seconds, np.float64) * 1e6).astype("datetime64[us]")


def _iso(seconds: Sequence[float]) -> list[str]:
    """UTC, to the millisecond."""
    milliseconds = np.round(np.asarray(seconds, np.float64) * 1e3).astype("datetime64[ms]")
    found: list[str] = np.datetime_as_string(milliseconds, timezone="UTC").tolist()
    return found

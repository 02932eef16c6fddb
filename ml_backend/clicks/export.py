"""The click log as files: Parquet, CSV, JSON lines, and one JSON file an image for prompting research."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from json.encoder import encode_basestring
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from sqlalchemy import ColumnElement, Connection, Engine, and_, select, tuple_

from ml_backend.clicks.derive import LEVELS
from ml_backend.clicks.people import People
from ml_backend.clicks.rows import many_rows, stream
from ml_backend.clicks.schema import answers, clicks, objects

#: What is in memory at a time.
OBJECTS_AT_ONCE = 5_000
IMAGES_AT_ONCE = 1_000

#: Floats in CSV and JSON lines: nine digits are a millionth of a pixel, and take half the time of seventeen. Parquet
#: keeps them as they are.
FLOAT = "%.9g"

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
    with many_rows(), engine.connect() as connection:
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


@dataclass
class Chunk:
    """Some thousand rows: for each the index of its object, the columns of the clicks, and the rows of the objects.

    `head`, `tail`: for each object the columns of an export before and after those of a click.
    """

    of: list[int]
    columns: dict[str, Sequence[Any]]
    head: list[tuple[Any, ...]]
    tail: list[tuple[Any, ...]]


_BOOL = {None: None, 0: False, 1: True}


def _chunks(connection: Connection, chosen: Filter, people: People) -> Iterator[Chunk]:
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
            index = pa.array(chunk.of)
            arrays = {}
            for names, rows in ((HEAD, chunk.head), (TAIL, chunk.tail)):
                for name, shared in zip(names, zip(*rows, strict=True), strict=True):
                    arrays[name] = pa.array(shared, type=schema.field(name).type).take(index)
            for name, values in chunk.columns.items():
                kind = COLUMNS[name]
                if kind == "time":
                    arrays[name] = pa.array(_microseconds(values), type=types[kind])
                elif kind == "bool":
                    arrays[name] = pa.array(map(_BOOL.__getitem__, values), type=types[kind], size=len(values))
                else:
                    arrays[name] = pa.array(values, type=types[kind])
            writer.write_table(pa.Table.from_arrays([arrays[name] for name in COLUMNS], schema=schema))
            count += len(chunk.of)
    return count


def _write_csv(out: Path, chunks: Iterator[Chunk]) -> int:
    words = {None: None, 0: "false", 1: "true"}
    count = 0
    with out.open("w", encoding="utf-8", newline="") as file:
        file.write(",".join(COLUMNS) + "\n")
        for chunk in chunks:
            head = [line + "," for line in _csv_lines(chunk.head)]
            tail = ["," + line + "\n" for line in _csv_lines(chunk.tail)]
            rows = _csv_lines(zip(*_texts(chunk.columns, words), strict=True))
            file.writelines(head[of] + row + tail[of] for of, row in zip(chunk.of, rows, strict=True))
            count += len(chunk.of)
    return count


def _csv_lines(rows: Iterable[tuple[Any, ...]]) -> list[str]:
    """Each row as a line of CSV without its end. What clicks share is put into words once."""
    lines: list[str] = []
    csv.writer(SimpleNamespace(write=lines.append), lineterminator="").writerows(rows)
    return lines


def _write_jsonl(out: Path, chunks: Iterator[Chunk]) -> int:
    line = ",".join(f'"{name}":%s' for name in OF_CLICK)
    count = 0
    with out.open("w", encoding="utf-8") as file:
        for chunk in chunks:
            head = ["{" + _fields(HEAD, row) + "," for row in chunk.head]
            tail = ["," + _fields(TAIL, row) + "}\n" for row in chunk.tail]
            columns = [_json_texts(name, values) for name, values in chunk.columns.items()]
            rows = zip(*columns, strict=True)
            file.writelines(head[of] + line % row + tail[of] for of, row in zip(chunk.of, rows, strict=True))
            count += len(chunk.of)
    return count


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _fields(names: Sequence[str], values: tuple[Any, ...]) -> str:
    """`"name":value,...` without braces."""
    return _encode(dict(zip(names, values, strict=True)))[1:-1]


def _json_texts(name: str, values: Sequence[Any]) -> list[str]:
    """A column in JSON. Column by column takes a third of the time of row by row."""
    kind = COLUMNS[name]
    if kind == "time":
        return [f'"{text}"' for text in _iso(values)]
    if kind in {"int", "float"}:
        form = FLOAT if kind == "float" else "%d"
        return ["null" if value is None else form % value for value in values]
    if kind == "text":
        return ["null" if value is None else encode_basestring(value) for value in values]
    words = {None: "null", 0: "false", 1: "true"}
    return [words[value] for value in values]


def _texts(columns: dict[str, Sequence[Any]], words: dict[int | None, Any]) -> list[Sequence[Any]]:
    """The columns of the clicks with times in ISO form, and truth in `words`."""
    found: list[Sequence[Any]] = []
    for name, column in columns.items():
        kind, values = COLUMNS[name], column
        if kind == "time":
            values = _iso(values)
        elif kind == "bool":
            values = [words[value] for value in values]
        elif kind == "float":
            values = [value if value is None else FLOAT % value for value in values]
        found.append(values)
    return found


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
    tasks = (objects.c.project, objects.c.task)
    found = connection.execute(select(*tasks).where(*chosen.conditions()).distinct().order_by(*tasks)).all()
    out.mkdir(parents=True, exist_ok=True)
    count = 0
    for start in range(0, len(found), IMAGES_AT_ONCE):
        first, last = found[start], found[min(start + IMAGES_AT_ONCE, len(found)) - 1]
        within = and_(
            tuple_(*tasks) >= (first[0], first[1]), tuple_(*tasks) <= (last[0], last[1]), *chosen.conditions()
        )
        things = {
            row[0]: dict(zip(_OF_OBJECT, row, strict=True))
            for row in stream(connection, select(*(objects.c[name] for name in _OF_OBJECT)).where(within))
        }
        steps: dict[int, list[tuple[Any, ...]]] = {id_: [] for id_ in things}
        of_answer = select(answers.c.object, *(answers.c[name] for name in _OF_ANSWER))
        for row in stream(connection, of_answer.where(answers.c.object.in_(things), answers.c.error.is_(None))):
            steps[row[0]].append(row[1:])
        images: dict[tuple[int, int], list[int]] = {}
        for id_, thing in sorted(things.items()):
            if steps[id_]:
                images.setdefault((thing["project"], thing["task"]), []).append(id_)
        for (project, task), ids in images.items():
            image = {name: things[ids[0]][name] for name in ("project", "task", "image", "width", "height")}
            image["objects"] = [_point_object(things[id_], steps[id_], people) for id_ in ids]
            folder = out / str(project)
            folder.mkdir(exist_ok=True)
            (folder / f"{task}.json").write_text(json.dumps(image, separators=(",", ":")), encoding="utf-8")
        count += len(images)
    return count


def _point_object(thing: dict[str, Any], steps: list[tuple[Any, ...]], people: People) -> dict[str, Any]:
    """`steps`: rows of `_OF_ANSWER`, which begin with when they came."""
    steps.sort()
    return {
        "session": thing["session"],
        "mask_id": thing["mask_id"],
        "user": people.name(thing["user_email"], thing["user_id"]),
        **{name: thing[name] for name in ("label", "arm", "outcome")},
        "steps": [_step(steps[0][0], *step) for step in steps],
    }


def _step(
    start: float,
    received: float,
    _event: str,
    prompts: str,
    predicted_iou: float | None,
    iou_to_final: float | None,
    x: float | None,
    y: float | None,
    positive: bool | None,
    score: float | None,
    shown: bool,
) -> dict[str, Any]:
    step: dict[str, Any] = {
        "seconds": round(received - start, 3),
        "positive": [],
        "negative": [],
        "predicted_iou": predicted_iou,
        "iou_to_final": iou_to_final,
        "proposal": None,
    }
    for prompt in json.loads(prompts):
        if prompt["x1"] is None:
            step["positive" if prompt["positive"] else "negative"].append([prompt["x"], prompt["y"]])
        else:
            step["box"] = [prompt[name] for name in ("x", "y", "x1", "y1")]
    if x is not None:
        step["proposal"] = {"x": x, "y": y, "positive": bool(positive), "score": score, "shown": bool(shown)}
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

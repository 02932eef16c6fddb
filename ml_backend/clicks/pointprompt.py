"""A layout for prompting research, as the PointPrompt data set has it: per image, the points at each time step."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, and_, select, tuple_

from ml_backend.clicks.filter import Filter
from ml_backend.clicks.people import People
from ml_backend.clicks.rows import stream
from ml_backend.clicks.schema import answers, objects

#: What is in memory at a time.
IMAGES_AT_ONCE = 1_000

_OF_IMAGE = ("project", "task", "image", "width", "height")
_OF_OBJECT = ("session", "mask_id", "label", "arm", "outcome", "user_email", "user_id")
_OF_ANSWER = (
    *("received", "event", "prompts", "predicted_iou", "iou_to_final"),
    *("proposal_x", "proposal_y", "proposal_positive", "proposal_score", "proposal_shown"),
)
_encode = json.JSONEncoder(separators=(",", ":")).encode
_decode = json.JSONDecoder().raw_decode


def write_pointprompt(connection: Connection, out: Path, chosen: Filter, people: People) -> int:
    """`out/<project>/<task>.json`: an image, its objects, and for each time step the points as the model got them.

    Returns how many images there are.
    """
    tasks = (objects.c.project, objects.c.task)
    found = connection.execute(select(*tasks).where(*chosen.conditions()).distinct().order_by(*tasks)).all()
    out.mkdir(parents=True, exist_ok=True)
    count = 0
    for start in range(0, len(found), IMAGES_AT_ONCE):
        first, last = found[start], found[min(start + IMAGES_AT_ONCE, len(found)) - 1]
        within = and_(
            tuple_(*tasks) >= (first[0], first[1]), tuple_(*tasks) <= (last[0], last[1]), *chosen.conditions()
        )
        columns = (objects.c.id, *(objects.c[name] for name in (*_OF_IMAGE, *_OF_OBJECT)))
        things = {row[0]: row[1:] for row in stream(connection, select(*columns).where(within).order_by(objects.c.id))}
        steps: dict[int, list[tuple[Any, ...]]] = {id_: [] for id_ in things}
        of_answer = select(answers.c.object, *(answers.c[name] for name in _OF_ANSWER))
        for row in stream(connection, of_answer.where(answers.c.object.in_(things), answers.c.error.is_(None))):
            steps[row[0]].append(row[1:])
        images: dict[tuple[int, int], list[int]] = {}
        for id_, thing in things.items():
            if steps[id_]:
                images.setdefault(thing[:2], []).append(id_)
        for project in {project for project, _ in images}:
            (out / str(project)).mkdir(exist_ok=True)
        for (project, task), ids in images.items():
            image = _encode(dict(zip(_OF_IMAGE, things[ids[0]], strict=False)))
            of_image = ",".join(_object(things[id_][len(_OF_IMAGE) :], steps[id_], people) for id_ in ids)
            _write(f"{out}/{project}/{task}.json", f'{image[:-1]},"objects":[{of_image}]}}'.encode())
        count += len(images)
    return count


def _write(path: str, content: bytes) -> None:
    """As `Path.write_bytes`, which takes twice the time for small files."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        written = os.write(file, content)
        while written < len(content):
            written += os.write(file, content[written:])
    finally:
        os.close(file)


# JSON text is put together here: for a million steps, dicts and an encoder take three times as long.


def _object(thing: tuple[Any, ...], steps: list[tuple[Any, ...]], people: People) -> str:
    """JSON of an object, `thing` as in `_OF_OBJECT`, and its steps, rows of `_OF_ANSWER`, which begin with when."""
    *values, email, user_id = thing
    known = _encode(dict(zip(_OF_OBJECT, values, strict=False)) | {"user": people.name(email, user_id)})
    steps.sort()
    return f'{known[:-1]},"steps":[{",".join(_steps(steps))}]}}'


def _steps(steps: list[tuple[Any, ...]]) -> Iterator[str]:
    """JSON of each step of an object, oldest first. The prompts of a step are most often those before and one more, so
    only what is new is parsed."""
    start, known = steps[0][0], ""
    positive = negative = box = ""
    for received, _event, prompts, predicted_iou, iou_to_final, x, y, expected, score, shown in steps:
        text = prompts[1:-1]
        if known and text.startswith(known):
            at = len(known) + len(", ")
        else:
            at = 0
            positive = negative = box = ""
        while at < len(text):
            prompt, end = _decode(text, at)
            at = end + len(", ")
            if prompt["x1"] is not None:
                box = _BOX % (prompt["x"], prompt["y"], prompt["x1"], prompt["y1"])
            elif prompt["positive"]:
                positive += _POINT % (prompt["x"], prompt["y"])
            else:
                negative += _POINT % (prompt["x"], prompt["y"])
        known = text
        yield _STEP % (
            received - start,
            positive[1:],
            negative[1:],
            box,
            "null" if predicted_iou is None else _FLOAT % predicted_iou,
            "null" if iou_to_final is None else _FLOAT % iou_to_final,
            "null"
            if x is None
            else _PROPOSAL % (x, y, _TRUTH[expected], "null" if score is None else _FLOAT % score, _TRUTH[shown]),
        )


_FLOAT = "%.9g"
_POINT = ",[%.9g,%.9g]"
_BOX = ',"box":[%.9g,%.9g,%.9g,%.9g]'
_PROPOSAL = '{"x":%.9g,"y":%.9g,"positive":%s,"score":%s,"shown":%s}'
_STEP = '{"seconds":%.3f,"positive":[%s],"negative":[%s]%s,"predicted_iou":%s,"iou_to_final":%s,"proposal":%s}'
_TRUTH = {None: "null", 0: "false", 1: "true"}

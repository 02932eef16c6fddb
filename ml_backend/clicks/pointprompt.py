"""A layout for prompting research, as the PointPrompt data set has it: per image, the points at each time step."""

from __future__ import annotations

import json
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
        for (project, task), ids in images.items():
            folder = out / str(project)
            folder.mkdir(exist_ok=True)
            image = _encode(dict(zip(_OF_IMAGE, things[ids[0]], strict=False)))
            of_image = ",".join(_object(things[id_][len(_OF_IMAGE) :], steps[id_], people) for id_ in ids)
            (folder / f"{task}.json").write_text(f'{image[:-1]},"objects":[{of_image}]}}', encoding="utf-8")
        count += len(images)
    return count


# JSON text is put together here: for a million steps, dicts and an encoder take three times as long.


def _object(thing: tuple[Any, ...], steps: list[tuple[Any, ...]], people: People) -> str:
    """JSON of an object, `thing` as in `_OF_OBJECT`, and its steps, rows of `_OF_ANSWER`, which begin with when."""
    *values, email, user_id = thing
    known = _encode(dict(zip(_OF_OBJECT, values, strict=False)) | {"user": people.name(email, user_id)})
    steps.sort()
    start = steps[0][0]
    return f'{known[:-1]},"steps":[{",".join([_step(start, *step) for step in steps])}]}}'


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
) -> str:
    points: dict[bool, list[str]] = {True: [], False: []}
    box = proposal = ""
    for prompt in json.loads(prompts):
        if prompt["x1"] is None:
            points[prompt["positive"]].append(_POINT % (prompt["x"], prompt["y"]))
        else:
            box = _BOX % tuple(prompt[name] for name in ("x", "y", "x1", "y1"))
    if x is not None:
        proposal = _PROPOSAL % (x, y, _TRUTH[positive], _number(score), _TRUTH[shown])
    return _STEP % (
        received - start,
        ",".join(points[True]),
        ",".join(points[False]),
        box,
        _number(predicted_iou),
        _number(iou_to_final),
        proposal or "null",
    )


_POINT = "[%.9g,%.9g]"
_BOX = ',"box":[%.9g,%.9g,%.9g,%.9g]'
_PROPOSAL = '{"x":%.9g,"y":%.9g,"positive":%s,"score":%s,"shown":%s}'
_STEP = '{"seconds":%.3f,"positive":[%s],"negative":[%s]%s,"predicted_iou":%s,"iou_to_final":%s,"proposal":%s}'
_TRUTH = {None: "null", 0: "false", 1: "true"}


def _number(value: float | None) -> str:
    return "null" if value is None else f"{value:.9g}"

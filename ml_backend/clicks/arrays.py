"""The click log as arrays, one pass over the database: what the sums of the report are taken of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, Connection, Select, and_, case, select

from ml_backend.clicks.derive import DELETED, MOVED, SUGGESTED
from ml_backend.clicks.filter import Filter
from ml_backend.clicks.people import People
from ml_backend.clicks.rows import parts
from ml_backend.clicks.schema import clicks, objects

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Codes = NDArray[np.int64]

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Log:
    """The click log as arrays: `o` has an entry for each object; `c`, `flag`, `number`, `at` for each click.

    `number`: of the click in its object, from 1. `at`: index of the click's object in `o`. `names`: by kind of group,
    codes of the objects and what they stand for. `ignored`: positions of clicks elsewhere than at a shown proposal.
    """

    o: dict[str, Floats]
    c: dict[str, Floats]
    flag: dict[str, Flags]
    number: Codes
    at: Codes
    names: dict[str, tuple[Codes, list[str]]]
    ignored: dict[str, Floats]


#: What is known of a click as one number: 64 times its number in the object, plus these. Fetching a million rows costs
#: by the value, so there is one column instead of seven.
FLAGS: dict[str, tuple[int, ColumnElement[bool]]] = {
    "moved": (1, clicks.c.kind == MOVED),
    "suggested": (2, clicks.c.origin == SUGGESTED),
    "shown": (4, clicks.c.proposal_shown.is_(True)),
    "hidden": (8, and_(clicks.c.proposal_shown.is_(False), clicks.c.proposal_x.is_not(None))),
    "followed": (16, clicks.c.followed.is_(True)),
    "matched": (32, clicks.c.sign_matched.is_(True)),
}
MEASURES = ("delta_iou", "iou_to_final", "answer_ms", "queue_ms", "encode_ms", "decode_ms")
POSITIONS = ("x", "y", "proposal_x", "proposal_y")
NUMBERS = ("id", "project", "task", "started", "clicks", "seconds", "clicks_90", "seconds_90", "width", "height")
TEXTS = ("arm", "arm_mode", "arm_unit", "strategy", "label", "outcome")


def read(connection: Connection, chosen: Filter, people: People) -> Log:
    """Objects and clicks of the filter."""
    conditions = chosen.conditions()
    o, names = _read_objects(connection, conditions, people)

    def of_clicks(*columns: ColumnElement[Any]) -> Select[Any]:
        query = select(clicks.c.object, *columns).where(clicks.c.kind != DELETED)
        return query.join(objects, objects.c.id == clicks.c.object).where(*conditions) if conditions else query

    code: ColumnElement[int] = clicks.c.click * 64
    for bit, condition in FLAGS.values():
        code = code + case((condition, bit), else_=0)
    c = _columns(connection, of_clicks(code, *(clicks.c[name] for name in MEASURES)), ("object", "code", *MEASURES))
    codes = c["code"].astype(np.int64)
    ignored_query = of_clicks(*(clicks.c[name] for name in POSITIONS)).where(
        clicks.c.proposal_shown.is_(True), clicks.c.followed.is_(False)
    )
    ignored = _columns(connection, ignored_query, ("object", *POSITIONS))
    return Log(
        o=o,
        c=c,
        flag={name: codes & bit > 0 for name, (bit, _) in FLAGS.items()},
        number=codes // 64,
        at=np.searchsorted(o["id"], c["object"]),
        names=names,
        ignored=ignored,
    )


def _read_objects(
    connection: Connection, conditions: Sequence[ColumnElement[bool]], people: People
) -> tuple[dict[str, Floats], dict[str, tuple[Codes, list[str]]]]:
    """Numbers of the objects in the order of their ids, and for each text (codes, what the codes stand for)."""
    columns = [objects.c[name] for name in (*NUMBERS, *TEXTS, "user_email", "user_id")]
    kinds: dict[tuple[Any, ...], int] = {}
    numbers, kind = [], []
    for rows in parts(connection, select(*columns).where(*conditions).order_by(objects.c.id)):
        *values, arm, mode, unit, strategy, label, outcome, email, user_id = zip(*rows, strict=True)
        numbers.append(np.array([np.array(column, np.float64) for column in values]))
        texts = zip(arm, mode, unit, strategy, label, outcome, email, user_id, strict=True)
        kind.append(np.array([kinds.setdefault(text, len(kinds)) for text in texts], np.int64))
    table = np.concatenate(numbers, axis=1) if numbers else np.empty((len(NUMBERS), 0))
    o = dict(zip(NUMBERS, table, strict=True))
    of_kind = np.concatenate(kind) if kind else np.empty(0, np.int64)
    names: dict[str, tuple[Codes, list[str]]] = {}
    for position, name in enumerate((*TEXTS, "user")):
        index: dict[str, int] = {}
        values_of = (people.name(*text[-2:]) if name == "user" else text[position] for text in kinds)
        codes = np.array([index.setdefault(value or UNKNOWN, len(index)) for value in values_of], np.int64)
        names[name] = codes[of_kind], list(index)
    weeks = np.floor((o["started"] / 86400 + 3) / 7)  # 1970-01-01 was a Thursday
    found, codes = np.unique(weeks, return_inverse=True)
    names["week"] = codes, [(date(1970, 1, 1) + timedelta(days=week * 7 - 3)).isoformat() for week in found]
    return o, names


def _columns(connection: Connection, query: Select[Any], names: Sequence[str]) -> dict[str, Floats]:
    """Columns of a query as float64; NULL is NaN."""
    found = [
        np.array([np.array(column, np.float64) for column in zip(*rows, strict=True)])
        for rows in parts(connection, query)
    ]
    table = np.concatenate(found, axis=1) if found else np.empty((len(names), 0))
    return dict(zip(names, table, strict=True))


def where(log: Log, name: str, value: str) -> Flags:
    codes, names = log.names[name]
    found: Flags = codes == (names.index(value) if value in names else -1)
    return found

"""The report: whether proposals are followed and whether they pay, as one HTML page that needs nothing else.

One pass over the click log into arrays, then sums. Intervals are 95 % normal intervals of means; the arms are compared
over the units that were randomised (objects, tasks or annotators), so that clicks of one object do not count as
independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, Connection, Engine, Select, and_, case, select
from sqlalchemy.exc import NoResultFound

from ml_backend.clicks import charts
from ml_backend.clicks.derive import DELETED, MOVED, SUGGESTED
from ml_backend.clicks.events import unpack_rle
from ml_backend.clicks.filter import Filter
from ml_backend.clicks.people import People
from ml_backend.clicks.rows import many_rows, parts
from ml_backend.clicks.schema import answers, clicks, final_masks, masks, objects
from ml_backend.clicks.store import SUBMITTED, fetch
from worker import brush_rle

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Codes = NDArray[np.int64]

Z95 = 1.959964
GRID = (24, 36)
CASES = 6
MOST_CLICKS = 8
UNKNOWN = "unknown"
#: Rows of a table of labels or annotators; the rest is summed up in a last row.
MOST_ROWS = 20


@dataclass(frozen=True)
class Mean:
    """A mean and its 95 % interval (normal approximation) from n values; NaN without values."""

    n: int
    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Floats) -> Mean:
        """Of the values that are not NaN."""
        values = values[~np.isnan(values)]
        if not values.size:
            return cls(0, np.nan, np.nan, np.nan)
        mean = float(values.mean())
        half = Z95 * float(values.std(ddof=1)) / values.size**0.5 if values.size > 1 else np.nan
        return cls(values.size, mean, mean - half, mean + half)


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


def render(engine: Engine, *, chosen: Filter, key: bytes | None) -> str:
    """The page. `key` None shows users by name, otherwise by pseudonym."""
    with many_rows(), engine.connect() as connection:
        people = People(connection, key)
        log = read(connection, chosen, people)
        page = summarise(log)
        page["cases"] = _cases(connection, chosen)
    page["chosen"] = chosen
    page["made"] = datetime.now(UTC)
    environment = Environment(loader=PackageLoader("ml_backend"), autoescape=True)
    environment.filters.update(number=_number, percent=_percent, interval=_interval)
    return environment.get_template("click_report.html").render(page)


# --- reading ----------------------------------------------------------------------------------------------------------


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


# --- sums -------------------------------------------------------------------------------------------------------------


def summarise(log: Log) -> dict[str, Any]:
    """All numbers and drawings of the page, by the names that its template uses."""
    c, started = log.c, log.o["started"]
    shown, suggested = log.flag["shown"], log.flag["suggested"]
    human = shown & ~suggested
    submitted = _is(log, "outcome", SUBMITTED)
    groups = (("human", human, "human"), ("suggested", suggested, "suggested"))
    return {
        "objects": started.size,
        "submitted": int(submitted.sum()),
        "clicks": log.at.size,
        "annotators": len(set(log.names["user"][1]) - {UNKNOWN}),
        "projects": np.unique(log.o["project"]).size,
        "first_day": datetime.fromtimestamp(started.min(), UTC) if started.size else None,
        "last_day": datetime.fromtimestamp(started.max(), UTC) if started.size else None,
        "following": {name: _following(log, log.flag[name]) for name in ("shown", "hidden")},
        "arms": _arms(log, submitted),
        "gain": {"human": Mean.of(c["delta_iou"][human]), "suggested": Mean.of(c["delta_iou"][suggested])},
        "gain_chart": _by_click("delta_iou", "gain of IoU", log, groups),
        "iou_chart": _iou_chart(log, submitted),
        "tables": [(title, _table(log, name, submitted)) for title, name in _TABLES if started.size],
        "heat": _heat(log) if log.ignored["x"].size else None,
        "latency": [(title, _percentiles(c[name])) for title, name in _LATENCIES],
    }


_TABLES = (("Strategy", "strategy"), ("Label", "label"), ("Annotator", "user"), ("Week from", "week"))
_LATENCIES = (
    ("Answer, as the backend measures it", "answer_ms"),
    ("of it waiting in the queue", "queue_ms"),
    ("of it encoding the image", "encode_ms"),
    ("of it decoding", "decode_ms"),
)


def _is(log: Log, name: str, value: str) -> Flags:
    codes, names = log.names[name]
    found: Flags = codes == (names.index(value) if value in names else -1)
    return found


def _following(log: Log, chosen: Flags) -> dict[str, int]:
    followed = chosen & log.flag["followed"]
    return {
        "proposals": int(chosen.sum()),
        "followed": int(followed.sum()),
        "matched": int((followed & log.flag["matched"]).sum()),
    }


_OUTCOMES = (
    ("Clicks per object", "clicks"),
    ("Seconds per object", "seconds"),
    ("Clicks to 90 % IoU", "clicks_90"),
    ("Seconds to 90 % IoU", "seconds_90"),
)


def _arms(log: Log, submitted: Flags) -> dict[str, Any] | None:
    """Shown against hidden over the randomised, submitted objects; None where nothing was randomised."""
    mixed = _is(log, "arm_mode", "mixed") & submitted
    show, hide = mixed & _is(log, "arm", "show"), mixed & _is(log, "arm", "hide")
    if not show.any() or not hide.any():
        return None
    units = _units(log)
    rows, differences = [], []
    for title, name in _OUTCOMES:
        a, b = (_unit_means(log.o[name], units, arm) for arm in (show, hide))
        first, second = Mean.of(a), Mean.of(b)
        if not first.n or not second.n:
            continue
        # Welch: the difference of two independent means.
        half = ((first.high - first.low) ** 2 + (second.high - second.low) ** 2) ** 0.5 / 2
        gap = first.mean - second.mean
        rows.append({"title": title, "show": first, "hide": second, "gap": gap, "low": gap - half, "high": gap + half})
        if second.mean > 0 and not np.isnan(half):
            percent = 100 / second.mean
            differences.append((title, gap * percent, (gap - half) * percent, (gap + half) * percent))
    return {
        "rows": rows,
        "chart": charts.difference_plot(differences),
        "show": int(show.sum()),
        "hide": int(hide.sum()),
        "units": sorted({log.names["arm_unit"][1][code] for code in np.unique(log.names["arm_unit"][0][mixed])}),
    }


def _units(log: Log) -> Codes:
    """For each object a number of the unit that was randomised with it."""
    o = log.o
    _, tasks = np.unique(np.stack([o["project"], o["task"]]), axis=1, return_inverse=True)
    everything = np.arange(o["id"].size)
    by_task, by_user = _is(log, "arm_unit", "task"), _is(log, "arm_unit", "annotator")
    unit = np.where(by_task, tasks.ravel(), np.where(by_user, log.names["user"][0], everything))
    return np.asarray(unit + everything.size * (by_task + 2 * by_user), np.int64)


def _unit_means(values: Floats, units: Codes, chosen: Flags) -> Floats:
    chosen = chosen & ~np.isnan(values)
    _, codes = np.unique(units[chosen], return_inverse=True)
    return np.asarray(np.bincount(codes, values[chosen]) / np.maximum(np.bincount(codes), 1), np.float64)


def _by_click(name: str, y_label: str, log: Log, groups: Sequence[tuple[str, Flags, str]]) -> str:
    series = []
    for title, chosen, tone in groups:
        means = [(k, Mean.of(log.c[name][chosen & (log.number == k)])) for k in range(1, MOST_CLICKS + 1)]
        points = [(float(k), m.mean, m.low, m.high) for k, m in means if m.n > 1]
        series.append(charts.Series(title, tone, points))
    return charts.interval_plot(series, x_label="click of the object", y_label=y_label)


def _iou_chart(log: Log, submitted: Flags) -> str:
    groups = []
    for arm, tone in (("show", "suggested"), ("hide", "human")):
        of_arm = (_is(log, "arm", arm) & submitted)[log.at]
        groups.append((arm, of_arm & ~log.flag["moved"], tone))
    return _by_click("iou_to_final", "IoU with the submitted mask", log, groups)


def _table(log: Log, name: str, submitted: Flags) -> list[dict[str, Any]]:
    codes, names = log.names[name]
    o, c = log.o, log.c
    count = len(names)
    of_click = codes[log.at]
    shown, suggested = log.flag["shown"], log.flag["suggested"]
    followed = shown & log.flag["followed"]

    def total(chosen: Flags) -> Codes:
        return np.bincount(of_click[chosen], minlength=count)

    def mean(values: Floats, groups: Codes, chosen: Flags) -> Floats:
        chosen = chosen & ~np.isnan(values)
        with np.errstate(invalid="ignore"):
            sums = np.bincount(groups[chosen], values[chosen], count)
            return np.asarray(sums / np.bincount(groups[chosen], minlength=count), np.float64)

    columns: dict[str, Any] = {
        "objects": np.bincount(codes, minlength=count),
        "clicks": mean(o["clicks"], codes, submitted),
        "seconds": mean(o["seconds"], codes, submitted),
        "shown": total(shown),
        "followed": total(followed),
        "matched": total(followed & log.flag["matched"]),
        "human": mean(c["delta_iou"], of_click, shown & ~suggested),
        "suggested": mean(c["delta_iou"], of_click, suggested),
    }
    rows = [{"name": names[i], **{key: values[i] for key, values in columns.items()}} for i in range(count)]
    if name == "week":
        return sorted(rows, key=lambda row: str(row["name"]))[-MOST_ROWS:]
    return sorted(rows, key=lambda row: -int(row["objects"]))[:MOST_ROWS]


def _heat(log: Log) -> dict[str, Any]:
    """Where ignored proposals were, and where people clicked instead, over the frame of the image."""
    ignored = log.ignored
    at = np.searchsorted(log.o["id"], ignored["object"])
    width, height = log.o["width"][at], log.o["height"][at]

    def grid(x: Floats, y: Floats) -> Codes:
        rows = np.clip((y / height * GRID[0]).astype(np.int64), 0, GRID[0] - 1)
        columns = np.clip((x / width * GRID[1]).astype(np.int64), 0, GRID[1] - 1)
        return np.bincount(rows * GRID[1] + columns, minlength=GRID[0] * GRID[1]).reshape(GRID)

    return {
        "ignored": at.size,
        "proposals": charts.heat_map(grid(ignored["proposal_x"], ignored["proposal_y"]), (214, 39, 140)),
        "instead": charts.heat_map(grid(ignored["x"], ignored["y"]), (31, 111, 235)),
    }


def _percentiles(values: Floats) -> dict[str, Any]:
    values = values[~np.isnan(values)]
    if not values.size:
        return {"n": 0}
    found = np.percentile(values, (50, 90, 95, 99))
    return {"n": values.size, **dict(zip(("p50", "p90", "p95", "p99"), found, strict=True)), "max": values.max()}


# --- cases ------------------------------------------------------------------------------------------------------------


def _cases(connection: Connection, chosen: Filter) -> list[dict[str, Any]]:
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


# --- words ------------------------------------------------------------------------------------------------------------


def _number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None or np.isnan(value) else f"{value:,.{digits}f}".replace(",", "\u202f")


def _percent(part: float, whole: float, digits: int = 0) -> str:
    return f"{100 * part / whole:.{digits}f}\u202f%" if whole else "–"


def _interval(mean: Mean, digits: int = 2) -> str:
    if not mean.n:
        return "–"
    middle = f"{mean.mean:.{digits}f}"
    return middle if np.isnan(mean.low) else f"{middle} ({mean.low:.{digits}f} to {mean.high:.{digits}f})"

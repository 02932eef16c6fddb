"""The report: whether proposals are followed and whether they pay, as one HTML page that needs nothing else.

One pass over the click log into arrays, then sums. Intervals are 95 % normal intervals of means; the arms are compared
over the units that were randomised (objects, tasks or annotators), so that clicks of one object do not count as
independent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, Connection, Engine, Integer, case, select, type_coerce
from sqlalchemy.exc import NoResultFound

from ml_backend.clicks import charts
from ml_backend.clicks.derive import DELETED, MOVED, SUGGESTED
from ml_backend.clicks.events import unpack_rle
from ml_backend.clicks.export import Filter
from ml_backend.clicks.people import People
from ml_backend.clicks.schema import answers, clicks, final_masks, masks, objects
from ml_backend.clicks.store import SUBMITTED, fetch
from worker import brush_rle

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Codes = NDArray[np.int64]

CHUNK = 50_000
Z95 = 1.959964
GRID = (24, 36)
CASES = 6
MOST_CLICKS = 8
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


@dataclass
class Log:
    """The click log as arrays: one entry an object (`o`), one entry a click (`c`); `at` is a click's object."""

    o: dict[str, Floats]
    c: dict[str, Floats]
    at: Codes
    names: dict[str, tuple[Codes, list[str]]] = field(default_factory=dict)


def render(engine: Engine, *, chosen: Filter, key: bytes | None) -> str:
    """The page. `key` None shows users by name, otherwise by pseudonym."""
    with engine.connect() as connection:
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


def read(connection: Connection, chosen: Filter, people: People) -> Log:
    """Objects and clicks of the filter."""
    numbers = ["id", "project", "task", "started", "clicks", "seconds", "clicks_90", "seconds_90"]
    texts = ("arm", "arm_mode", "arm_unit", "strategy", "label", "outcome")
    columns = [objects.c[name] for name in (*numbers, "width", "height", "user_email", "user_id", *texts)]
    query = select(*columns).where(*chosen.conditions()).order_by(objects.c.id)
    kept: list[Floats] = []
    names: dict[str, list[str | None]] = {name: [] for name in (*texts, "user")}
    for rows in _parts(connection, query):
        kept.append(_numbers(rows, len(numbers) + 2))
        for row in rows:
            names["user"].append(people.name(row[-len(texts) - 2], row[-len(texts) - 1]))
        for position, name in enumerate(texts):
            names[name] += [row[position - len(texts)] for row in rows]
    o = _columns(kept, [*numbers, "width", "height"])
    wanted: dict[str, ColumnElement[Any]] = {
        "object": clicks.c.object,
        "click": clicks.c.click,
        "moved": case((clicks.c.kind == MOVED, 1), else_=0),
        "suggested": case((clicks.c.origin == SUGGESTED, 1), else_=0),
        "shown": type_coerce(clicks.c.proposal_shown, Integer),
        "followed": type_coerce(clicks.c.followed, Integer),
        "matched": type_coerce(clicks.c.sign_matched, Integer),
        **{name: clicks.c[name] for name in ("x", "y", "proposal_x", "proposal_y", "delta_iou", "iou_to_final")},
        **{name: clicks.c[name] for name in ("think_s", "answer_ms", "queue_ms", "encode_ms", "decode_ms")},
    }
    asked = select(*wanted.values()).where(clicks.c.kind != DELETED)
    if conditions := chosen.conditions():
        asked = asked.join(objects, objects.c.id == clicks.c.object).where(*conditions)
    c = _columns([_numbers(rows, len(wanted)) for rows in _parts(connection, asked)], list(wanted))
    at = np.searchsorted(o["id"], c["object"])
    log = Log(o, c, at)
    for name, values in names.items():
        index: dict[str, int] = {}
        codes = np.array([index.setdefault(value or "unknown", len(index)) for value in values], np.int64)
        log.names[name] = codes, list(index)
    weeks = np.floor((o["started"] / 86400 + 3) / 7)  # 1970-01-01 was a Thursday
    found, codes = np.unique(weeks, return_inverse=True)
    log.names["week"] = codes, [(date(1970, 1, 1) + timedelta(days=week * 7 - 3)).isoformat() for week in found]
    return log


def _parts(connection: Connection, query: Any) -> Iterator[Sequence[Any]]:
    parts: Iterator[Sequence[Any]] = connection.execution_options(yield_per=CHUNK).execute(query).partitions()
    return parts


def _numbers(rows: Sequence[Any], count: int) -> Floats:
    """The first `count` columns of some rows, float64 (columns, rows); NULL is NaN."""
    columns = zip(*rows, strict=True)
    return np.array([np.array(column, np.float64) for column, _ in zip(columns, range(count), strict=False)])


def _columns(parts: list[Floats], names: list[str]) -> dict[str, Floats]:
    table = np.concatenate(parts, axis=1) if parts else np.empty((len(names), 0))
    return dict(zip(names, table, strict=True))


# --- sums -------------------------------------------------------------------------------------------------------------


def summarise(log: Log) -> dict[str, Any]:
    """All numbers and drawings of the page, by the names that its template uses."""
    o, c = log.o, log.c
    shown = c["shown"] == 1
    hidden = ~shown & ~np.isnan(c["proposal_x"])
    submitted = _is(log, "outcome", SUBMITTED)
    started = o["started"]
    suggested = c["suggested"] == 1
    page: dict[str, Any] = {
        "objects": o["id"].size,
        "submitted": int(submitted.sum()),
        "clicks": c["click"].size,
        "annotators": len(set(log.names["user"][1]) - {"unknown"}),
        "projects": np.unique(o["project"]).size,
        "first_day": datetime.fromtimestamp(started.min(), UTC) if started.size else None,
        "last_day": datetime.fromtimestamp(started.max(), UTC) if started.size else None,
        "following": {"shown": _following(c, shown), "hidden": _following(c, hidden)},
        "arms": _arms(log, submitted),
        "gain": {
            "human": Mean.of(c["delta_iou"][shown & ~suggested]),
            "suggested": Mean.of(c["delta_iou"][suggested]),
        },
        "gain_chart": _by_click(
            "delta_iou",
            "gain of IoU",
            log,
            (("human", shown & ~suggested, "human"), ("suggested", suggested, "suggested")),
        ),
        "iou_chart": _iou_chart(log, submitted),
        "tables": [(title, _table(log, name, submitted)) for title, name in _TABLES if o["id"].size],
        "heat": _heat(log, shown) if (shown & (c["followed"] == 0)).any() else None,
        "latency": [(title, _percentiles(c[name])) for title, name in _LATENCIES],
    }
    return page


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


def _following(c: dict[str, Floats], chosen: Flags) -> dict[str, Any]:
    followed = chosen & (c["followed"] == 1)
    return {
        "proposals": int(chosen.sum()),
        "followed": int(followed.sum()),
        "matched": int((followed & (c["matched"] == 1)).sum()),
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
        means = [(k, Mean.of(log.c[name][chosen & (log.c["click"] == k)])) for k in range(1, MOST_CLICKS + 1)]
        points = [(float(k), m.mean, m.low, m.high) for k, m in means if m.n > 1]
        series.append(charts.Series(title, tone, points))
    return charts.interval_plot(series, x_label="click of the object", y_label=y_label)


def _iou_chart(log: Log, submitted: Flags) -> str:
    groups = []
    for arm, tone in (("show", "suggested"), ("hide", "human")):
        of_arm = (_is(log, "arm", arm) & submitted)[log.at] if log.at.size else np.zeros(0, np.bool_)
        groups.append((arm, of_arm & (log.c["moved"] == 0), tone))
    return _by_click("iou_to_final", "IoU with the submitted mask", log, groups)


def _table(log: Log, name: str, submitted: Flags) -> list[dict[str, Any]]:
    codes, names = log.names[name]
    o, c = log.o, log.c
    count = len(names)
    of_click = codes[log.at]
    shown = c["shown"] == 1
    followed = shown & (c["followed"] == 1)

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
        "matched": total(followed & (c["matched"] == 1)),
        "human": mean(c["delta_iou"], of_click, shown & (c["suggested"] == 0)),
        "suggested": mean(c["delta_iou"], of_click, c["suggested"] == 1),
    }
    rows = [{"name": names[i], **{key: values[i] for key, values in columns.items()}} for i in range(count)]
    if name == "week":
        return sorted(rows, key=lambda row: str(row["name"]))[-MOST_ROWS:]
    return sorted(rows, key=lambda row: -int(row["objects"]))[:MOST_ROWS]


def _heat(log: Log, shown: Flags) -> dict[str, Any]:
    """Where ignored proposals were, and where people clicked instead, over the frame of the image."""
    c, o = log.c, log.o
    ignored = shown & (c["followed"] == 0)
    width, height = o["width"][log.at][ignored], o["height"][log.at][ignored]

    def grid(x: Floats, y: Floats) -> Codes:
        rows = np.clip((y / height * GRID[0]).astype(np.int64), 0, GRID[0] - 1)
        columns = np.clip((x / width * GRID[1]).astype(np.int64), 0, GRID[1] - 1)
        return np.bincount(rows * GRID[1] + columns, minlength=GRID[0] * GRID[1]).reshape(GRID)

    return {
        "ignored": int(ignored.sum()),
        "proposals": charts.heat_map(grid(c["proposal_x"][ignored], c["proposal_y"][ignored]), (214, 39, 140)),
        "instead": charts.heat_map(grid(c["x"][ignored], c["y"][ignored]), (31, 111, 235)),
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

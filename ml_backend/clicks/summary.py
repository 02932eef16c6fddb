"""The numbers and drawings of the report.

Intervals are 95 % normal intervals of means; the arms are compared over the units that were randomised (objects, tasks
or annotators), so that clicks of one object do not count as independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from ml_backend.clicks import charts
from ml_backend.clicks.arrays import UNKNOWN, Codes, Flags, Floats, Log, where
from ml_backend.clicks.store import SUBMITTED

Z95 = 1.959964
GRID = (24, 36)
MOST_CLICKS = 8
#: Rows of a table of labels or annotators.
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


def summarise(log: Log) -> dict[str, Any]:
    """All numbers and drawings of the page, by the names that its template uses."""
    c, started = log.c, log.o["started"]
    shown, suggested = log.flag["shown"], log.flag["suggested"]
    human = shown & ~suggested
    submitted = where(log, "outcome", SUBMITTED)
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
    mixed = where(log, "arm_mode", "mixed") & submitted
    show, hide = mixed & where(log, "arm", "show"), mixed & where(log, "arm", "hide")
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
    reached = (~np.isnan(log.o["clicks_90"])).astype(np.float64)
    return {
        "reached": [100 * Mean.of(_unit_means(reached, units, arm)).mean for arm in (show, hide)],
        "verdicts": [_verdict(*difference) for difference in differences[:2]],
        "rows": rows,
        "chart": charts.difference_plot(differences),
        "show": int(show.sum()),
        "hide": int(hide.sum()),
        "units": sorted({log.names["arm_unit"][1][code] for code in np.unique(log.names["arm_unit"][0][mixed])}),
    }


def _verdict(title: str, mean: float, low: float, high: float) -> tuple[str, str]:
    """(tone, sentence) of one difference between the arms, percent with its interval."""
    if low <= 0 <= high:
        return "unsure", f"{title}: no clear difference ({low:+.0f} to {high:+.0f}\u202f%).".replace(
            "-", "\N{MINUS SIGN}"
        )
    # The bound that is nearer to no difference comes first.
    near, far = sorted((abs(low), abs(high)))
    tone, what = ("good", "fewer") if mean < 0 else ("bad", "more")
    return tone, f"{title}: {abs(mean):.0f}\u202f% {what} with proposals ({near:.0f} to {far:.0f}\u202f%)."


def _units(log: Log) -> Codes:
    """For each object a number of the unit that was randomised with it."""
    o = log.o
    _, tasks = np.unique(np.stack([o["project"], o["task"]]), axis=1, return_inverse=True)
    everything = np.arange(o["id"].size)
    by_task, by_user = where(log, "arm_unit", "task"), where(log, "arm_unit", "annotator")
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
        of_arm = (where(log, "arm", arm) & submitted)[log.at]
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

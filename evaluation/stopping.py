"""When to stop proposing: the trade between clicks saved and IoU lost, read off a finished evaluation.

The score beside click t is what the strategy promised when it proposed that click, so stopping at threshold s means
that the session ends before the first click whose score is below s.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray


@dataclass(frozen=True)
class Trade:
    """At `threshold`: mean share of clicks saved, and mean IoU lost against making them all (negative: gained)."""

    threshold: float
    saved: float
    lost: float


def trades(clicks: pd.DataFrame, strategy: str, *, count: int = 60) -> list[Trade]:
    """The trade at `count` thresholds (quantiles of the scores), lowest first. Raises ValueError without sessions."""
    ious, scores = _sessions(clicks, strategy)
    thresholds = np.unique(np.quantile(scores[:, 1:], np.linspace(0.0, 1.0, count)))
    found = []
    for threshold in thresholds:
        below = scores < threshold
        below[:, 0] = False  # the first click was not proposed
        made = np.where(below.any(1), below.argmax(1), scores.shape[1])
        final = ious[np.arange(len(ious)), made - 1]
        found.append(
            Trade(float(threshold), float(1 - made.mean() / scores.shape[1]), float((ious[:, -1] - final).mean()))
        )
    return found


def choose(found: list[Trade], *, most_lost: float = 0.005) -> Trade:
    """The trade that saves most clicks and loses at most `most_lost` mean IoU."""
    return max((t for t in found if t.lost <= most_lost), key=lambda t: t.saved)


def _sessions(clicks: pd.DataFrame, strategy: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """IoU and scores, (sessions, clicks); a click that was not made has score 0, the first has infinity."""
    rows = clicks[clicks["strategy"] == strategy]
    if rows.empty:
        raise ValueError(f"There is no session of {strategy!r} in these clicks.")
    keys = ["dataset", "pair", "seed"]
    ious = rows.pivot_table(index=keys, columns="click", values="iou").to_numpy(float)
    rows = rows.assign(score=rows["score"].fillna(0.0))
    values = rows.pivot_table(index=keys, columns="click", values="score").to_numpy(float).copy()
    values[:, 0] = np.inf
    return ious, values

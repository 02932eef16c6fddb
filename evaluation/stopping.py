"""When to stop proposing: the trade between clicks saved and IoU lost, read off a finished evaluation.

The gain beside click t is what was expected of that click when it was proposed (`worker.acquisition.stopping`), so
stopping at threshold g means that the session ends before the first click that was expected to gain less than g.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray


@dataclass(frozen=True)
class Trade:
    """At `threshold`: mean share of clicks saved, and mean IoU lost against making them all (negative: gained), with
    its standard error over sessions."""

    threshold: float
    saved: float
    lost: float
    error: float


def trades(clicks: pd.DataFrame, strategy: str, *, count: int = 60) -> list[Trade]:
    """The trade at `count` thresholds (quantiles of the gains), lowest first. Raises ValueError without sessions."""
    ious, gains = _sessions(clicks, strategy)
    return [_trade(ious, gains, float(g)) for g in np.unique(np.quantile(gains[:, 1:], np.linspace(0.0, 1.0, count)))]


def trade_at(clicks: pd.DataFrame, strategy: str, threshold: float) -> Trade:
    """What stopping at `threshold`, calibrated elsewhere, saves and costs here. Raises ValueError without sessions."""
    return _trade(*_sessions(clicks, strategy), threshold)


def choose(found: list[Trade], *, most_lost: float = 0.005) -> Trade:
    """The trade that saves most clicks and loses at most `most_lost` mean IoU, its standard error included: the largest
    of many thresholds that seem to cost little on a few sessions costs more on others."""
    return max((t for t in found if t.lost + t.error <= most_lost), key=lambda t: t.saved)


def _trade(ious: NDArray[np.float64], gains: NDArray[np.float64], threshold: float) -> Trade:
    below = gains < threshold
    below[:, 0] = False  # the first click was not proposed
    made = np.where(below.any(1), below.argmax(1), gains.shape[1])
    lost = ious[:, -1] - ious[np.arange(len(ious)), made - 1]
    error = float(lost.std() / np.sqrt(max(len(lost) - 1, 1)))
    return Trade(threshold, float(1 - made.mean() / gains.shape[1]), float(lost.mean()), error)


def _sessions(clicks: pd.DataFrame, strategy: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """IoU and gains, (sessions, clicks); a click that was not made has gain 0, the first has infinity."""
    rows = clicks[clicks["strategy"] == strategy]
    if rows.empty:
        raise ValueError(f"There is no session of {strategy!r} in these clicks.")
    keys = ["dataset", "pair", "seed"]
    ious = rows.pivot_table(index=keys, columns="click", values="iou").to_numpy(float)
    rows = rows.assign(gain=pd.to_numeric(rows["gain"]).fillna(0.0))
    values = rows.pivot_table(index=keys, columns="click", values="gain").to_numpy(float).copy()
    values[:, 0] = np.inf
    return ious, values

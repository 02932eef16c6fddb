from __future__ import annotations

import pandas as pd
import pytest

from evaluation.stopping import choose, trade_at, trades


def clicks(sessions: list[tuple[list[float], list[float]]]) -> pd.DataFrame:
    rows = [
        {"dataset": "d", "pair": f"p{n}", "seed": 0, "strategy": "s", "click": t + 1, "iou": iou, "gain": gain}
        for n, (ious, scores) in enumerate(sessions)
        for t, (iou, gain) in enumerate(zip(ious, scores, strict=True))
    ]
    return pd.DataFrame(rows)


def test_trade_by_hand() -> None:
    nan = float("nan")
    data = clicks([([0.5, 0.8, 0.8, 0.7], [nan, 0.9, 0.2, 0.6]), ([0.4, 0.5, 0.6, 0.9], [nan, 0.9, 0.8, 0.7])])
    found = {round(t.threshold, 3): t for t in trades(data, "s", count=6)}  # 0.2, 0.6, 0.7, 0.8, 0.9
    # Under 0.6 nothing but the first session's third click: it stops at 2 of 4 clicks with 0.8 instead of 0.7.
    at = found[0.6]
    assert at.saved == pytest.approx(1 - (2 + 4) / 8)
    assert at.lost == pytest.approx(((0.7 - 0.8) + 0.0) / 2)
    assert at.error == pytest.approx(0.1 / 2**0.5 / 2**0.5)  # of the values -0.1 and 0, by n - 1
    assert trade_at(data, "s", 0.6) == at
    nothing = found[0.2]
    assert nothing.saved == 0 and nothing.lost == 0


def test_choose_respects_the_budget() -> None:
    data = clicks([([0.5, 0.8, 0.8], [float("nan"), 0.9, 0.1]), ([0.5, 0.6, 0.9], [float("nan"), 0.9, 0.5])])
    best = choose(trades(data, "s"), most_lost=0.005)
    assert best.saved == pytest.approx(1 - (2 + 3) / 6)
    assert choose(trades(data, "s"), most_lost=1.0).saved > best.saved


def test_choose_allows_for_the_chance_in_few_sessions() -> None:
    # Stopping before the third click costs 0.00 and 0.008: 0.004 on average, 0.004 its standard error.
    sessions = [([0.5, 0.8, 0.8], [float("nan"), 0.9, 0.1]), ([0.5, 0.8, 0.808], [float("nan"), 0.9, 0.1])]
    assert choose(trades(clicks(sessions), "s"), most_lost=0.005).saved == 0
    assert choose(trades(clicks(sessions * 40), "s"), most_lost=0.005).saved == pytest.approx(1 / 3)


def test_unknown_strategy() -> None:
    with pytest.raises(ValueError, match="no session"):
        trades(clicks([([0.5, 0.6], [0.1, 0.1])]), "other")

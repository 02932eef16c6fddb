from __future__ import annotations

import pandas as pd
import pytest

from evaluation.summary import summarise


@pytest.fixture
def clicks() -> pd.DataFrame:
    """Two strategies on three objects of two images, three clicks."""
    curves = {
        ("a", "first"): [0.2, 0.6, 0.8],
        ("a", "other"): [0.2, 0.4, 0.4],
        ("b", "first"): [0.4, 0.9, 0.9],
        ("b", "other"): [0.4, 0.5, 0.9],
        ("c", "first"): [0.1, 0.1, 0.3],
        ("c", "other"): [0.1, 0.3, 0.5],
    }
    return pd.DataFrame(
        [
            {"dataset": "d", "pair": pair, "strategy": name, "seed": 0, "click": n, "iou": iou, "gain": 0.1 / n}
            | {"on_error": float("nan") if n == 1 or name == "other" else float(n == 2 or pair == "a")}
            for (pair, name), curve in curves.items()
            for n, iou in enumerate(curve, 1)
        ]
    )


IMAGES = {("d", "a"): "1.png", ("d", "b"): "1.png", ("d", "c"): "2.png"}


def test_clicks_on_errors_are_counted_after_the_first(clicks: pd.DataFrame) -> None:
    found = summarise(clicks, IMAGES)["overall"]
    assert found["first"]["on_error"] == pytest.approx(4 / 6)
    assert found["other"]["on_error"] is None  # an evaluation of an earlier version


def test_differences_are_paired(clicks: pd.DataFrame) -> None:
    found = summarise(clicks, IMAGES)["first_minus"]
    assert list(found) == ["other"]
    mean, low, high = found["other"]["iou_final"]
    assert mean == pytest.approx((0.4 + 0.0 - 0.2) / 3)
    # Two images: every resampling is one of them alone or both.
    assert (low, high) == (pytest.approx(-0.2), pytest.approx(0.2))
    assert found["other"]["noc85"][0] == pytest.approx(-1 / 3)


def test_thin_objects_apart(clicks: pd.DataFrame) -> None:
    found = summarise(clicks, IMAGES, thin={("d", "c")})
    assert found["thin"]["first"]["iou_final"] == pytest.approx(0.3) and found["thin"]["first"]["pairs"] == 1
    assert found["compact"]["first"]["iou_final"] == pytest.approx(0.85)


def test_stopping_at_the_threshold_of_the_head(clicks: pd.DataFrame) -> None:
    # Expected gains are 0.05 of the second click and 0.033 of the third: the third is not made.
    found = summarise(clicks, IMAGES, stops={"first": 0.04, "absent": 0.1})["stopping"]
    assert list(found) == ["first"]
    assert found["first"]["saved"] == pytest.approx(1 / 3)
    assert found["first"]["lost"] == pytest.approx((0.2 + 0.0 + 0.2) / 3)

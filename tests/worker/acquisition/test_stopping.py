from __future__ import annotations

import pytest
import torch

from worker.acquisition.stopping import StoppingRule, expected_gain


def test_expected_gain_by_hand() -> None:
    # A mask of 2 x 2 at the left, sure; a doubtful region of two cells beside a sure gap; another elsewhere.
    probability = torch.tensor([[0.9, 0.9, 0.0, 0.5, 0.4], [0.9, 0.9, 0.0, 0.0, 0.0], [0.3, 0.0, 0.0, 0.0, 0.0]])
    shown = probability > 0.6
    union = 4 + 0.5 + 0.4 + 0.3
    assert expected_gain(probability, shown, (0, 3)) == pytest.approx(0.9 / union)
    assert expected_gain(probability, shown, (0, 4)) == pytest.approx(0.9 / union)
    assert expected_gain(probability, shown, (2, 0)) == pytest.approx(0.3 / union)
    # Wrong with 0.1 only: the region is what is wrong with at least half of that, here the mask and the cell below it.
    assert expected_gain(probability, shown, (0, 0)) == pytest.approx(0.7 / union)
    assert expected_gain(probability, shown, (1, 2)) == 0.0


def test_a_superfluous_part_counts_too() -> None:
    probability = torch.tensor([[0.99, 0.99, 0.99, 0.1]])
    shown = torch.ones(1, 4, dtype=torch.bool)
    assert expected_gain(probability, shown, (0, 3)) == pytest.approx(0.9 / 4)


def test_the_rule_says_why() -> None:
    rule = StoppingRule(0.01)
    assert rule.reason(0.02) is None
    assert StoppingRule().reason(0.0) is None
    assert "0.40% of it, under 1.00%" in (rule.reason(0.004) or "")
    assert "next to an earlier click" in (rule.reason(None) or "")

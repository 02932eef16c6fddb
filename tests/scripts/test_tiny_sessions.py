"""What a step of training tiny is made of: the restated decoding is segment_anything's, losses, simulated clicks."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from worker.backbones.tiny import build_tiny

pytestmark = pytest.mark.usefixtures("scripts_on_path")


@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
def test_decoding_in_training_is_segment_anythings(boxed: bool, with_mask: bool) -> None:
    decoding = importlib.import_module("tiny.decoding")
    torch.manual_seed(0)
    sam = build_tiny(96, (8, 8, 16, 16), (1, 1, 1, 1), 32, 4, 32)
    embedding = torch.randn(2, 32, 12, 12)
    mask_input = torch.randn(2, 1, 48, 48) if with_mask else None
    points = torch.tensor([[[10.0, 20.0], [30.0, 60.0], [50.0, 5.0]], [[1.0, 2.0], [90.0, 80.0], [33.0, 44.0]]])
    with torch.no_grad():
        pe = sam.prompt_encoder.get_dense_pe()
        if boxed:  # two corners, then a click
            tokens = decoding.prompt_tokens(sam, points, torch.tensor([[2, 3, 0], [2, 3, 1]]))
        else:  # a click, SAM's padding point, a click
            padded = points.clone()
            padded[:, 1] = 0
            tokens = decoding.prompt_tokens(sam, padded, torch.tensor([[1, -1, 0], [1, -1, 1]]))
        masks, scores = decoding.decode(sam, embedding, pe, tokens, mask_input)
        for n in range(2):
            last = torch.tensor([[0, 1][n]])
            if boxed:
                clicks, boxes = (points[n : n + 1, 2:], last[None]), points[n, :2].reshape(1, 4)
            else:
                clicks, boxes = (points[n : n + 1, [0, 2]], torch.tensor([[1, int(last)]])), None
            sparse, dense = sam.prompt_encoder(clicks, boxes, None if mask_input is None else mask_input[n : n + 1])
            theirs, their_scores = sam.mask_decoder.predict_masks(embedding[n : n + 1], pe, sparse, dense)
            torch.testing.assert_close(masks[n : n + 1], theirs, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(scores[n : n + 1], their_scores, rtol=1e-4, atol=1e-5)


def test_focal_and_dice_against_a_slow_reference() -> None:
    losses = importlib.import_module("tiny.losses")
    rng = np.random.default_rng(0)
    logits, truth = rng.normal(0, 2, (2, 3, 5, 4)), rng.random((2, 1, 5, 4)) > 0.5
    focal = losses.normalised_focal(torch.tensor(logits), torch.tensor(truth, dtype=torch.float64))
    dice = losses.dice(torch.tensor(logits), torch.tensor(truth, dtype=torch.float64))
    for n in range(2):
        for m in range(3):
            weighted = weights = both = sizes = 0.0
            for value, inside in zip(logits[n, m].ravel(), truth[n, 0].ravel(), strict=True):
                p = 1 / (1 + np.exp(-value))
                right = p if inside else 1 - p
                weighted += (1 - right) ** 2 * -np.log(right) / 20
                weights += (1 - right) ** 2 / 20
                both += p * inside
                sizes += p + inside
            assert focal[n, m].item() == pytest.approx(weighted / (weights + 1e-4), rel=1e-6)
            assert dice[n, m].item() == pytest.approx(1 - (2 * both + 1) / (sizes + 1), rel=1e-6)


def test_a_correction_lies_in_the_larger_error_and_says_which_it_is() -> None:
    clicks = importlib.import_module("tiny.clicks")
    truth, mask = np.zeros((2, 20, 30), bool)
    truth[4:14, 4:14] = True
    mask[4:14, 4:9] = True
    mask[0:2, 25:27] = True
    for centre in (True, False):
        x, y, positive = clicks.correction(truth, mask, np.random.default_rng(0), centre=centre)
        assert positive
        assert truth[y, x]
        assert not mask[y, x]
    mask[:] = True
    x, y, positive = clicks.correction(truth, mask, np.random.default_rng(0), centre=True)
    assert not positive
    assert not truth[y, x]


def test_hired_clickers_click_where_one_alone_does() -> None:
    clicks = importlib.import_module("tiny.clicks")
    rng = np.random.default_rng(3)
    truths, masks = rng.random((2, 5, 32, 40)) > 0.5
    for centre in (True, False):
        alone, hired = (
            list(clicks.Clickers(count).corrections(truths, masks, np.random.default_rng(1), centre=centre))
            for count in (0, 2)
        )
        assert alone == hired
        for (x, y, positive), truth, mask in zip(alone, truths, masks, strict=True):
            assert truth[y, x] == positive != mask[y, x]
    starts = (
        list(clicks.Clickers(count).starts(truths, np.random.default_rng(2), box_share=0.5, centre=False))
        for count in (0, 2)
    )
    for one, same, truth in zip(*starts, truths, strict=True):
        assert np.array_equal(one, same)
        assert len(one) == 2 or truth[int(one[0, 1]), int(one[0, 0])]


def test_a_session_is_learnt_from_first_and_last_and_sometimes_looks_again() -> None:
    session = importlib.import_module("tiny.session")
    plans = [session.plan(np.random.default_rng(seed)) for seed in range(300)]
    assert all(steps[0].learnt and steps[-1].learnt and sum(step.learnt for step in steps) == 2 for steps in plans)
    assert not any(steps[0].again or any(step.again for step in steps[2:]) for steps in plans)
    assert 0.5 < np.mean([steps[1].again for steps in plans]) < 0.7
    assert max(map(len, plans)) > 8


def test_a_mask_seen_from_afar_is_coarser_and_as_large() -> None:
    session = importlib.import_module("tiny.session")
    logits = torch.randn(2, 1, 32, 32)
    assert session.from_afar(logits, 1) is logits
    coarse = session.from_afar(logits, 4)
    assert coarse.shape == logits.shape
    torch.testing.assert_close(coarse.mean((2, 3)), logits.mean((2, 3)), atol=0.05, rtol=0)
    assert coarse.diff(dim=-1).abs().mean() < 0.3 * logits.diff(dim=-1).abs().mean()

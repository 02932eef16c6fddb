from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from worker import acquisition
from worker.acquisition.candidates import allowed_pixels, best_pixel, best_pixels, exclusion_radius
from worker.acquisition.regions import regional
from worker.acquisition.state import State
from worker.acquisition.stopping import StoppingRule
from worker.backbones import Backbone
from worker.contract import Box, Click, Prompts
from worker.decode import Decoded, decode
from worker.encode import Embedding
from worker.head import predictive
from worker.head.features import box_mean, coarse, distance_to_points, feature_names, pixel_features
from worker.head.linear import sam_centred

PROMPTS = Prompts(clicks=(Click(x=150.5, y=60.5), Click(x=20.5, y=30.5, positive=False)))


@pytest.fixture(scope="module")
def decoded(backbone: Backbone, embedding: Embedding) -> Decoded:
    return decode(backbone, embedding, PROMPTS)


@pytest.fixture(scope="module")
def state(backbone: Backbone, embedding: Embedding, decoded: Decoded) -> State:
    names = feature_names(decoded.upscaled.shape[0])
    grid = coarse(decoded)
    return State(
        decoded=decoded,
        coarse=grid,
        prompts=PROMPTS,
        features=pixel_features(grid, PROMPTS),
        posterior=sam_centred(names),
        allowed=allowed_pixels(grid, PROMPTS),
        redecode=lambda prompts, mask: decode(backbone, embedding, prompts, mask),
    )


def test_features_hold_sam(state: State) -> None:
    names = state.posterior.names
    assert state.features.shape == (len(names), *state.coarse.logits.shape)
    assert torch.isfinite(state.features).all()
    channels = [i for i, name in enumerate(names) if name.startswith("channel")]
    assert torch.allclose(state.features[channels].sum(0), state.coarse.logits, atol=1e-4)
    assert torch.equal(state.posterior.logit_mean(state.features), state.coarse.logits)


@pytest.mark.parametrize(
    "prompts", [PROMPTS, Prompts(clicks=PROMPTS.clicks[:1]), Prompts(box=Box(x0=9, y0=9, x1=80, y1=70))]
)
def test_the_heads_mask_is_the_sum_of_its_features(backbone: Backbone, embedding: Embedding, prompts: Prompts) -> None:
    """`head_logits` never holds the features that it sums, at a resolution above that of the proposals."""
    decoded = decode(backbone, embedding, prompts)
    names = feature_names(decoded.upscaled.shape[0])
    weights = torch.randn(len(names), generator=torch.Generator().manual_seed(3))
    posterior = replace(sam_centred(names), mean=weights)
    grid = coarse(decoded)
    allowed, features = allowed_pixels(grid, prompts), pixel_features(grid, prompts)
    state = State(
        decoded=decoded, coarse=grid, prompts=prompts, features=features, posterior=posterior, allowed=allowed
    )
    plain = pixel_features(decoded, prompts).double()
    expected = torch.tensordot(state.conditioned.mean[: len(names)].double(), plain, 1)
    if prompts.clicks:
        kernel = state.kernel.features(decoded).double()
        expected += torch.tensordot(state.conditioned.mean[len(names) :].double(), kernel, 1)
    found = state.head_logits()
    assert found.shape == decoded.logits.shape
    assert torch.allclose(found.double(), expected, atol=1e-3 * float(expected.abs().max()), rtol=0)


def test_near_features_peak_at_their_clicks(state: State) -> None:
    names = state.posterior.names
    for click, kind in zip(PROMPTS.clicks, ("positive", "negative"), strict=True):
        near = state.features[names.index(f"near_{kind}_0")]
        row, col = np.unravel_index(int(near.argmax()), near.shape)
        found = state.coarse.frame.to_lowres(click.x, click.y)
        assert abs(col + 0.5 - found[0]) <= 0.5 and abs(row + 0.5 - found[1]) <= 0.5


def test_the_grid_is_an_average_in_the_same_frame(decoded: Decoded) -> None:
    grid = coarse(decoded)
    assert max(grid.logits.shape) <= 128 < max(decoded.logits.shape)
    block = decoded.logits.shape[0] // grid.logits.shape[0]
    assert grid.logits[3, 5] == pytest.approx(
        float(decoded.logits[3 * block : 4 * block, 5 * block : 6 * block].mean()), rel=1e-4
    )
    assert torch.allclose(torch.einsum("c,chw->hw", grid.hyper, grid.upscaled), grid.logits, atol=1e-4)
    for point in ((0.5, 0.5), (150.0, 33.3)):
        assert grid.frame.to_original(*grid.frame.to_lowres(*point)) == pytest.approx(point)


def test_box_mean_matches_a_plain_mean() -> None:
    image = torch.rand(9, 13, dtype=torch.float64)
    found = box_mean(image, 2)
    assert found[4, 6] == pytest.approx(float(image[2:7, 4:9].mean()))
    corner = [image[max(r, 0), max(c, 0)] for r in range(-2, 3) for c in range(-2, 3)]
    assert found[0, 0] == pytest.approx(float(torch.stack(corner).mean()))


def test_allowed_pixels(state: State) -> None:
    rows, cols = state.coarse.frame.valid
    assert rows < state.allowed.shape[0]
    assert not state.allowed[rows:].any() and not state.allowed[:, cols:].any()
    radius = exclusion_radius(max(state.allowed.shape))
    for click in PROMPTS.clicks:
        point = state.coarse.frame.to_lowres(click.x, click.y)
        distance = distance_to_points([point], *state.allowed.shape, device=state.allowed.device)
        assert not state.allowed[distance <= radius].any()
    assert state.allowed.sum() > 0.95 * rows * cols


def test_the_first_proposal_is_a_likely_error_that_heads_disagree_about(state: State) -> None:
    error_region, error_bald = (acquisition.find(name).score for name in ("error-region", "error-bald"))
    assert torch.equal(error_bald(state), error_region(state))  # after a second click there is no difference
    first = replace(state, prompts=Prompts(clicks=PROMPTS.clicks[:1]))
    wrong = torch.where(first.shown > 0, 1 - first.probability, first.probability)
    bald = predictive.bald(*first.prior_moments)
    expected = regional(wrong * bald / bald[first.valid].max(), first.valid)
    torch.testing.assert_close(error_bald(first), expected)
    assert 0 < float(error_bald(first).max()) <= float(error_region(first).max())


def test_best_pixel_breaks_ties_in_row_major_order() -> None:
    score = torch.zeros(4, 5)
    score[1, 3] = score[2, 0] = 1.0
    everywhere = torch.ones(4, 5, dtype=torch.bool)
    assert best_pixel(score, everywhere) == (1, 3)
    score[1, 3] = torch.nan
    assert best_pixel(score, everywhere) == (2, 0)
    assert best_pixel(score, ~everywhere) is None


def test_best_pixels_keep_their_distance() -> None:
    score = torch.rand(40, 40, generator=torch.Generator().manual_seed(0))
    found = best_pixels(score, torch.ones(40, 40, dtype=torch.bool), 8, 6.0)
    assert len(found) == 8
    values = [float(score[pixel]) for pixel in found]
    assert values == sorted(values, reverse=True)
    for i, (r, c) in enumerate(found):
        assert all((r - s) ** 2 + (c - d) ** 2 > 36 for s, d in found[:i])


def test_regions_beat_lines() -> None:
    values = torch.zeros(128, 128)
    values[:, 20] = 1.0  # a thin line, brighter than
    values[60:76, 80:96] = 0.6  # a blob
    row, col = (
        best_pixel(regional(values, torch.ones_like(values, dtype=torch.bool)), torch.ones(128, 128).bool()) or ()
    )
    assert 62 <= row <= 74 and 82 <= col <= 94


@pytest.mark.parametrize("name", acquisition.names())
def test_every_strategy_scores_every_allowed_pixel(state: State, name: str) -> None:
    strategy = acquisition.find(name)
    first, again = strategy.score(state), strategy.score(state)
    assert first.shape == state.allowed.shape
    assert best_pixel(first, state.allowed) is not None
    assert torch.equal(first, again)
    other = strategy.score(replace(state, seed=1))
    assert torch.equal(first, other) != strategy.random
    assert strategy.description


def test_bald_mc_converges_to_bald(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    from worker.acquisition import bald_mc

    exact = acquisition.find("bald").score(state)
    monkeypatch.setattr(bald_mc, "SAMPLES", 2000)
    assert (acquisition.find("bald-mc").score(state) - exact).abs().max() < 0.02


def test_conditioning_lowers_the_variance_and_follows_the_clicks(state: State) -> None:
    _, before = state.prior_moments
    before = before + (state.reach.amplitude * state.kernel.features(state.coarse)).square().sum(0)
    assert (state.variance <= before + 1e-4).all()
    for click in PROMPTS.clicks:
        col, row = (int(v) for v in state.coarse.frame.to_lowres(click.x, click.y))
        prior = float(predictive.probability(*state.prior_moments)[row, col])
        after = float(state.probability[row, col])
        assert after > prior if click.positive else after < prior


def test_epig_matches_the_dense_covariance(state: State) -> None:
    from worker.acquisition import epig

    found = acquisition.find("epig").score(state)
    step = epig.STRIDE
    phi = state.session_features.double()
    covariance = state.conditioned.covariance.double()
    p = state.probability.double()
    slope = p * (1 - p)
    weight = torch.where(state.valid, slope**2, 0.0)[::step, ::step].flatten()
    others = phi[:, ::step, ::step].flatten(1)
    for row, col in ((3, 5), (20, 60), (35, 11)):
        cross = phi[:, row, col] @ covariance @ others
        variance = phi[:, row, col] @ covariance @ phi[:, row, col]
        dense = float((weight * cross**2).sum() / (variance + 1 / slope[row, col]))
        assert float(found[row, col]) == pytest.approx(dense, rel=1e-3)


def test_lookahead_says_what_it_needs(state: State) -> None:
    with pytest.raises(ValueError, match="needs the decoder"):
        acquisition.find("bald-lookahead").score(replace(state, redecode=None))


def test_unknown_strategy_lists_the_known() -> None:
    with pytest.raises(ValueError, match="bald-online"):
        acquisition.find("clairvoyance")


def test_stopping_rule() -> None:
    assert StoppingRule(0.1).reason(0.2) is None
    assert "settled" in (StoppingRule(0.1).reason(0.05) or "")
    assert "next to an earlier click" in (StoppingRule().reason(None) or "")
    assert StoppingRule().reason(0.0) is None

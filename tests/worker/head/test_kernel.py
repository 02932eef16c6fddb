from __future__ import annotations

import numpy as np
import torch

from worker.contract import Click, Prompts
from worker.decode import Decoded
from worker.encode import Embedding
from worker.frame import Frame
from worker.head.features import coarse
from worker.head.kernel import JITTER, ClickKernel, Reach, click_cells
from worker.head.linear import CLICK_WEIGHT, LinearPosterior

REACH = Reach(amplitude=3.0, length=0.4, colour=0.2)
PROMPTS = Prompts(
    clicks=(
        Click(x=60.0, y=50.0),
        Click(x=90.0, y=20.0, positive=False),
        Click(x=20.0, y=64.0),
        Click(x=20.5, y=64.2),  # the same cell again: the kernel matrix must stay regular
    )
)


def _decoded(side: int = 32) -> Decoded:
    generator = torch.Generator().manual_seed(4)
    colours = torch.rand((3, side, side), generator=generator)
    frame = Frame((100, 128), (50, 64), (side, side), (64, 64))
    none = torch.zeros(1, side, side)
    embedding = Embedding(none, none, (100, 128), (50, 64))
    return Decoded(none[0], 0.5, none, torch.zeros(1), none, torch.zeros(1), colours, frame, embedding)


def _reference(decoded: Decoded, prompts: Prompts) -> tuple[np.ndarray, np.ndarray]:
    """K between all cells and the clicks' cells (n, k), and among the clicks' cells, pixel by pixel in float64."""
    height, width = decoded.logits.shape
    colours = decoded.colours.double().numpy()

    def coordinates(row: int, col: int) -> np.ndarray:
        place = np.array([col + 0.5, row + 0.5]) / max(height, width)
        return np.concatenate([place / REACH.length, colours[:, row, col] / REACH.colour])

    clicks = [coordinates(row, col) for row, col in zip(*click_cells(decoded, prompts), strict=True)]
    cells = [coordinates(row, col) for row in range(height) for col in range(width)]

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.exp(-0.5 * ((a - b) ** 2).sum()))

    across = np.array([[correlation(cell, click) for click in clicks] for cell in cells])
    among = np.array([[correlation(a, b) for b in clicks] for a in clicks])
    return across, among


def test_features_span_the_kernel() -> None:
    decoded = _decoded()
    psi = ClickKernel.at(decoded, PROMPTS, REACH).features(decoded).flatten(1).double().numpy()
    across, among = _reference(decoded, PROMPTS)
    expected = across @ np.linalg.inv(among + JITTER * np.eye(len(among))) @ across.T
    np.testing.assert_allclose(psi.T @ psi, expected, atol=2e-3)


def test_mean_is_that_of_the_gaussian_process() -> None:
    """The kernel's part of the head, conditioned on the clicks, against the process's Laplace mode in float64."""
    decoded = _decoded()
    kernel = ClickKernel.at(decoded, PROMPTS, REACH)
    psi = kernel.features(decoded)
    rows, cols = click_cells(decoded, PROMPTS)
    empty = LinearPosterior((), torch.zeros(0), torch.zeros(0, 0))
    labels = torch.tensor([click.positive for click in PROMPTS.clicks])
    prior = empty.extended(tuple("abcd"), REACH.amplitude)
    mean = prior.conditioned(psi[:, rows, cols].T, labels).logit_mean(psi).flatten().double().numpy()

    across, among = _reference(decoded, PROMPTS)
    gram = REACH.amplitude**2 * (among @ np.linalg.inv(among + JITTER * np.eye(4)) @ among)
    target = labels.double().numpy()
    alpha = np.zeros(4)
    for _ in range(2000):  # damped fixed point of alpha = weight (y - sigmoid(K alpha)); slow and sure
        alpha += 0.02 * (CLICK_WEIGHT * (target - 1 / (1 + np.exp(-gram @ alpha))) - alpha)
    inverse = np.linalg.inv(among + JITTER * np.eye(4))
    np.testing.assert_allclose(mean, REACH.amplitude**2 * across @ inverse @ among @ alpha, atol=2e-2)


def test_anchors_made_on_the_grid_hold_on_the_finer_map() -> None:
    decoded = _decoded(256)
    kernel = ClickKernel.at(coarse(decoded), PROMPTS, REACH)
    rows, cols = click_cells(decoded, PROMPTS)
    assert kernel.features(decoded).shape == (4, 256, 256)
    assert kernel.features(coarse(decoded)).shape == (4, 128, 128)
    smooth = Decoded(**{**decoded.__dict__, "colours": torch.full((3, 256, 256), 0.5)})
    kernel = ClickKernel.at(coarse(smooth), PROMPTS, REACH)
    own = kernel.features(smooth)[:, rows, cols].square().sum(0)
    torch.testing.assert_close(own, torch.ones(4), atol=1e-2, rtol=0)

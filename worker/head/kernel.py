"""What the clicks say about places like theirs, beside the linear head: a Gaussian process over place and colour.

A linear head can only re-weight what the decoder gives it, the same everywhere. A click says more about what lies near
it and looks like it, so the logit gets a second term, g(x) ~ GP(0, k) with

    k(x, y) = amplitude^2 exp(-|x - y|^2 / 2 length^2 - |c(x) - c(y)|^2 / 2 colour^2),

x, y places in units of the frame's longer side, c(x) the colour (RGB in [0, 1]) at x. Given labels at the clicks alone,
the posterior mean of g lies in the span of k(., click). So each click gives every pixel one more feature, and g joins
the linear head (subset of regressors; Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006, section
8.3.1). Its variance is then that within the span: far from every click g is taken to be 0 instead of unknown. That is
on purpose: with the full variance all that is far is doubtful, and predictions were worse (docs/results/proposals.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from worker.contract import Prompts
    from worker.decode import Decoded

#: Added to the kernel matrix's diagonal: clicks on one spot would make it singular.
JITTER = 1e-4


@dataclass(frozen=True)
class Reach:
    """How far a click speaks: `length` in units of the frame's longer side, `colour` in RGB of [0, 1], `amplitude` in
    logits. What suits depends on the images: a project learns its own (`worker.training.best_reach`)."""

    amplitude: float = 4.0
    length: float = 0.3
    colour: float = 0.15

    def __post_init__(self) -> None:
        if not all(value > 0 for value in (self.amplitude, self.length, self.colour)):
            raise ValueError(f"{self} must be positive")


@dataclass(frozen=True)
class ClickKernel:
    """The kernel at k clicks: anchors (k, 5), place and colour in units of their lengths; root (k, k), Cholesky."""

    anchors: Tensor
    root: Tensor
    reach: Reach

    @classmethod
    def at(cls, decoded: Decoded, prompts: Prompts, reach: Reach) -> ClickKernel:
        """The kernel anchored at the clicks of `prompts`, with the colours of the cells of `decoded` that hold them."""
        cells = click_cells(decoded, prompts)
        anchors = _coordinates(decoded, reach)[:, cells[0], cells[1]].T.double()
        gram = _correlation(anchors, anchors)
        identity = torch.eye(len(anchors), dtype=gram.dtype, device=gram.device)
        return cls(anchors.float(), torch.linalg.cholesky(gram + JITTER * identity), reach)

    def features(self, decoded: Decoded) -> Tensor:
        """psi (k, h, w) float32 on any grid of the same image: psi(x) . psi(y) is the kernel within the anchors' span,
        with amplitude 1; a weight on each has the prior N(0, reach.amplitude^2)."""
        correlation = self._correlation_with(decoded)
        features: Tensor = torch.tensordot(self._whiten, correlation, 1)
        return features

    def weighted_features(self, decoded: Decoded, weights: Tensor) -> Tensor:
        """(h, w): `features` times `weights` (k,), summed."""
        summed: Tensor = torch.tensordot(weights @ self._whiten, self._correlation_with(decoded), 1)
        return summed

    @property
    def _whiten(self) -> Tensor:
        whiten: Tensor = torch.linalg.inv(self.root).float()
        return whiten

    def _correlation_with(self, decoded: Decoded) -> Tensor:
        """(k, h, w): every cell's correlation with the clicks."""
        places = _coordinates(decoded, self.reach)
        return _correlation(self.anchors, places.flatten(1).T).view(-1, *places.shape[1:])


def click_cells(decoded: Decoded, prompts: Prompts) -> tuple[list[int], list[int]]:
    """(rows, cols) of the cells of `decoded` that hold the clicks, the border's for what lies on the border."""
    height, width = decoded.logits.shape
    at = [decoded.frame.to_lowres(click.x, click.y) for click in prompts.clicks]
    rows = [min(max(int(row), 0), height - 1) for _, row in at]
    cols = [min(max(int(col), 0), width - 1) for col, _ in at]
    return rows, cols


def _coordinates(decoded: Decoded, reach: Reach) -> Tensor:
    """(5, h, w): x, y and colour of every cell's centre, in units of the reach's lengths."""
    height, width = decoded.logits.shape
    side, device = float(max(height, width)), decoded.logits.device
    x = ((torch.arange(width, device=device) + 0.5) / side).expand(height, width)
    y = ((torch.arange(height, device=device) + 0.5) / side)[:, None].expand(height, width)
    return torch.cat([torch.stack([x, y]) / reach.length, decoded.colours / reach.colour])


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """exp(-|a_i - b_j|^2 / 2) for (k, 5) and (n, 5): (k, n)."""
    squared = a.square().sum(1)[:, None] + b.square().sum(1)[None] - 2.0 * a @ b.T
    return torch.exp(-0.5 * squared.clamp(min=0.0))

"""Losses per object and mask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def normalised_focal(logits: Tensor, truth: Tensor) -> Tensor:
    """Focal loss (gamma 2) whose weights are rescaled to mean 1 in each mask, so that the loss does not fade as the
    easy pixels become right (Sofiiuk et al., "AdaptIS", 2019). N x M x H x W logits, N x 1 x H x W truth; N x M."""
    truth = truth.expand_as(logits)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    weight = (1 - torch.exp(-cross_entropy.detach())) ** 2
    return (weight * cross_entropy).mean((2, 3)) / (weight.mean((2, 3)) + 1e-4)


def dice(logits: Tensor, truth: Tensor) -> Tensor:
    """Soft dice loss, 1 - 2 |p t| / (|p| + |t|). N x M x H x W logits, N x 1 x H x W truth; N x M."""
    p = logits.sigmoid()
    both = (p * truth).sum((2, 3))
    return 1 - (2 * both + 1) / (p.sum((2, 3)) + truth.sum((2, 3)) + 1)


@torch.no_grad()
def iou(logits: Tensor, truth: Tensor) -> Tensor:
    """IoU of the masks at threshold 0. N x M x H x W logits, N x 1 x H x W truth (0 or 1); N x M."""
    mask, is_object = logits > 0, truth > 0.5
    both = (mask & is_object).sum((2, 3))
    either = (mask | is_object).sum((2, 3))
    return both / either.clamp_min(1)


def mask_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Focal plus dice, N x M."""
    return normalised_focal(logits, truth) + dice(logits, truth)

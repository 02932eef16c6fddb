"""Masks at the size at which they are judged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from worker.decode import Frame


def full_size_mask(logits: Tensor, frame: Frame) -> NDArray[np.bool_]:
    """Low-resolution logits (h, w) to a mask (H, W) of the original image: `Sam.postprocess_masks`, then > 0."""
    square = (frame.image_size, frame.image_size)
    inputs = F.interpolate(logits[None, None], square, mode="bilinear", align_corners=False)
    inputs = inputs[..., : frame.input_size[0], : frame.input_size[1]]
    full = F.interpolate(inputs, frame.original_size, mode="bilinear", align_corners=False)[0, 0]
    return np.asarray((full > 0).cpu().numpy())

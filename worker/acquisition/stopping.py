"""When no further click is worth making.

A score says how much a place is in doubt; it stays high as long as any single place is. What ends a session is that
nothing large is in doubt any more: the best click could only change a small part of the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

#: A place is in doubt when the label shown there is wrong with at least this probability, or half of what it is at the
#: click where that is less: where nothing is in much doubt, gains still differ.
DOUBT = 0.25


def expected_gain(probability: Tensor, shown: Tensor, pixel: tuple[int, int]) -> float:
    """What a click at `pixel` is expected to mend, as a part of the union of mask and object.

    The click settles the doubtful region around it (4-connected pixels, see `DOUBT`); the expected number of wrong
    pixels there is divided by the expected union |M| + E|Y - M|.

    Args:
        probability: (h, w) float, P(inside), without padding; on the processor, as `shown`.
        shown: (h, w) bool, the mask on screen.
        pixel: (row, col) of the click.

    Returns:
        Between 0 and 1; 0 where the place is not in doubt at all.
    """
    wrong = torch.where(shown, 1.0 - probability, probability)
    doubt = min(DOUBT, 0.5 * float(wrong[pixel]))
    if doubt == 0.0:
        return 0.0
    _count, labels = cv2.connectedComponents((wrong >= doubt).numpy().astype(np.uint8), connectivity=4)
    mended = float(wrong[torch.from_numpy(labels == labels[pixel])].sum())
    union = float(shown.sum()) + float(probability[~shown].sum())
    return mended / union


@dataclass(frozen=True)
class StoppingRule:
    """Stop when the best click is expected to gain less than `threshold`; `None` never stops.

    Thresholds are calibrated for each head and strategy by `evaluation.stopping` when a head is trained.
    """

    threshold: float | None = None

    def reason(self, gain: float | None) -> str | None:
        """Why there is nothing to propose, in words for the annotator, or None when there is. `gain` None: no place."""
        if gain is None:
            return "Every place on the image is next to an earlier click."
        if self.threshold is not None and gain < self.threshold:
            return (
                f"The mask looks settled: the best next click is expected to change {gain:.2%} of it, "
                f"under {self.threshold:.2%}."
            )
        return None

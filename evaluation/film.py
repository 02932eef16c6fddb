"""One session of one object, drawn click by click."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from evaluation.clicker import Mask
from evaluation.datasets import Pair
from evaluation.plots import FilmStrip
from evaluation.run import Setup, open_session
from worker.contract import Prompts
from worker.frame import Frame
from worker.proposer import Decision


def draw_film(setup: Setup, pair: Pair, strategy: str, path: Path, *, clicks: int = 6) -> None:
    """Play `clicks` clicks of `strategy` on a pair and write the strip as an image."""
    session = open_session(setup, pair)
    strip = FilmStrip(session.image, session.truth)

    def watch(prompts: Prompts, mask: Mask, decision: Decision, frame: Frame) -> None:
        maps = {name: _full_size(values, frame) for name, values in decision.maps.items()}
        proposal = decision.proposal
        strip.add(prompts.clicks, mask, maps, None if proposal is None else (proposal.x, proposal.y))

    with torch.inference_mode():
        session.play(strategy, 0, clicks, watch=watch)
    strip.save(path)


def _full_size(values: NDArray[np.float32], frame: Frame) -> NDArray[np.float32]:
    """A map over the padded square frame as one over the original image (H, W): 0 outside of the part it covers."""
    height, width = frame.seen.size
    rows, cols = (round(max(values.shape) * length / max(height, width)) for length in (height, width))
    cut = torch.from_numpy(values[:rows, :cols].copy())[None, None]
    full = np.zeros(frame.original_size, np.float32)
    full[frame.seen.slices] = F.interpolate(cut, (height, width), mode="bilinear", align_corners=False)[0, 0]
    return full

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
from worker.proposer import Decision


def draw_film(setup: Setup, pair: Pair, strategy: str, path: Path, *, clicks: int = 6) -> None:
    """Play `clicks` clicks of `strategy` on a pair and write the strip as an image."""
    session = open_session(setup, pair)
    strip = FilmStrip(session.image, session.truth)

    def watch(prompts: Prompts, mask: Mask, decision: Decision) -> None:
        maps = {name: _full_size(values, strip.image.shape[:2]) for name, values in decision.maps.items()}
        proposal = decision.proposal
        strip.add(prompts.clicks, mask, maps, None if proposal is None else (proposal.x, proposal.y))

    with torch.inference_mode():
        session.play(strategy, 0, clicks, watch=watch)
    strip.save(path)


def _full_size(values: NDArray[np.float32], size: tuple[int, ...]) -> NDArray[np.float32]:
    """A map over the padded square frame, cut to the image and resized to (height, width)."""
    height, width = size
    rows, cols = (round(max(values.shape) * length / max(size)) for length in (height, width))
    cut = torch.from_numpy(values[:rows, :cols].copy())[None, None]
    return np.asarray(F.interpolate(cut, (height, width), mode="bilinear", align_corners=False)[0, 0])

"""From a decoded mask to the mask that is shown and the next click that is worth making."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from numpy import float32
from numpy.typing import NDArray
from torch import Tensor

from worker import acquisition
from worker.acquisition.candidates import allowed_pixels, best_pixel
from worker.acquisition.state import State
from worker.acquisition.stopping import StoppingRule, expected_gain
from worker.contract import Prompts, Proposal
from worker.guided_filter import guided
from worker.head import predictive
from worker.head.features import coarse, pixel_features, smoothed
from worker.head.store import channels_of, find_head, on_device

if TYPE_CHECKING:
    from worker.backbones import Backbone
    from worker.decode import Decoded


@dataclass(frozen=True)
class Decision:
    """What to answer to one click.

    `logits`: (h, w) float32, above 0 in the mask to show, in the low-resolution frame of the `Decoded` it came from.
    `proposal`: the next click in original pixels, or None, and then `stopped` says why in words.
    `expected_iou`: what the posterior expects the mask to reach, see `predictive.expected_iou`.
    `gain`: what the best click is expected to gain, see `stopping.expected_gain`; None where no place is left.
    `maps`: score, bald, entropy, probability as float32 arrays over the (coarser) grid of proposals, when asked for.
    """

    logits: Tensor
    proposal: Proposal | None
    stopped: str | None
    expected_iou: float
    gain: float | None = None
    maps: dict[str, NDArray[float32]] = field(default_factory=dict)


class Proposer:
    """Head, posterior and strategy of one backbone. Pure: equal arguments give equal decisions."""

    def __init__(
        self, backbone: Backbone, *, head: str = "default", strategy: str = "default", data_dir: Path, stop: bool = True
    ) -> None:
        """Raises ValueError for an unknown strategy or a head that cannot be used. `stop=False`: always propose."""
        found = find_head(head, backbone_id=backbone.id, channels=channels_of(backbone.sam), data_dir=data_dir)
        self.head = on_device(found, backbone.device)
        self.strategy = acquisition.find(strategy)
        self.stop = stop
        self._guided = backbone.guided

    @property
    def model_version(self) -> str:
        """Backbone, head and strategy, as shown beside predictions."""
        return f"{self.head.backbone}/{self.head.id}/{self.strategy.name}"

    @torch.inference_mode()
    def propose(
        self,
        decoded: Decoded,
        prompts: Prompts,
        *,
        strategy: str | None = None,
        redecode: Callable[[Prompts, Tensor | None], Decoded] | None = None,
        seed: int = 0,
        maps: bool = False,
    ) -> Decision:
        """Decide on the mask and the next click after `prompts`.

        Args:
            decoded: the decoder's answer to `prompts`.
            prompts: everything given for this object so far.
            strategy: another strategy than the proposer's own.
            redecode: decodes other prompts with a mask input for the same image; look-ahead needs it.
            seed: for strategies that draw; the prompts enter too, so that successive clicks draw afresh.
            maps: fill `Decision.maps`.
        """
        chosen = self.strategy if strategy in (None, "default") else acquisition.find(strategy)
        grid, seed = coarse(decoded), _seed(prompts, seed)
        prompts = decoded.frame.visible(prompts)
        state = State(
            decoded=decoded,
            coarse=grid,
            prompts=prompts,
            features=pixel_features(grid, prompts),
            posterior=self.head.posterior,
            allowed=allowed_pixels(grid, prompts),
            shows=self.head.shows,
            reach=self.head.reach,
            seed=seed,
            redecode=redecode,
        )
        scores = chosen.score(state)
        # What follows looks at single values: on the processor, where nobody waits for them, and without padding.
        rows, cols = grid.frame.valid
        found = (scores, state.allowed, state.probability, state.shown > 0)
        score, allowed, inside, shown = (one[:rows, :cols].cpu() for one in found)
        pixel = best_pixel(score, allowed)
        gain = None if pixel is None else expected_gain(inside, shown, pixel)
        stopped = StoppingRule(self.head.stop.get(chosen.name) if self.stop else None).reason(gain)
        proposal = None
        if pixel is not None and stopped is None:
            row, col = pixel
            x, y = grid.frame.to_original(col + 0.5, row + 0.5)
            height, width = decoded.frame.original_size
            proposal = Proposal(
                x=min(max(x, 0.5), width - 0.5),
                y=min(max(y, 0.5), height - 0.5),
                positive=bool(inside[pixel] > 0.5),
                score=float(score[pixel]),
                strategy=chosen.name,
            )
        expected = predictive.expected_iou(inside, shown)
        return Decision(self._shown(state), proposal, stopped, expected, gain, _maps(state, scores) if maps else {})

    def _shown(self, state: State) -> Tensor:
        """Logits of the mask to show, its border smoothed or guided by the image."""
        decoded, valid = state.decoded, state.decoded.frame.valid
        logits = state.head_logits() if self.head.shows == "head" else decoded.logits
        if self._guided:
            return guided(logits, decoded.colours, valid)
        return smoothed(logits, valid) if self.head.shows == "head" else logits


def _seed(prompts: Prompts, seed: int) -> int:
    digest = hashlib.sha256(f"{seed}:{prompts.model_dump_json()}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def _maps(state: State, score: Tensor) -> dict[str, NDArray[float32]]:
    maps = {
        "score": torch.where(state.allowed, score, 0.0),
        "bald": state.bald,
        "entropy": predictive.entropy(state.mean, state.variance),
        "probability": state.probability,
    }
    return {name: values.float().cpu().numpy() for name, values in maps.items()}

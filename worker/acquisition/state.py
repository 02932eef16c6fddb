"""What a strategy may look at: one object after some clicks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from worker.head import predictive
from worker.head.features import weighted_features
from worker.head.kernel import ClickKernel, Reach, click_cells
from worker.head.linear import LinearPosterior

if TYPE_CHECKING:
    from worker.contract import Prompts
    from worker.decode import Decoded

    Redecode = Callable[[Prompts, Tensor | None], Decoded]


@dataclass(frozen=True)
class State:
    """Maps are (h, w) float32 over the grid of `coarse`, padding included.

    `decoded`: the decoder's answer; `coarse`: the same on the grid of proposals (`worker.head.features.coarse`).
    `posterior`: before this session's clicks; `conditioned`: after them. `allowed`: (h, w) bool, where a click may go.
    `shows`: whose mask the annotator sees, `sam` or `head`. `reach`: of each click, see `worker.head.kernel`.
    `seed`: for strategies that draw. `redecode`: answers other prompts for the same image, where the caller can.
    """

    decoded: Decoded
    coarse: Decoded
    prompts: Prompts
    features: Tensor  # (d, h, w)
    posterior: LinearPosterior
    allowed: Tensor
    shows: str = "sam"
    reach: Reach = field(default_factory=Reach)
    seed: int = 0
    redecode: Redecode | None = None

    @cached_property
    def kernel(self) -> ClickKernel:
        """What this session's clicks say about places like theirs."""
        return ClickKernel.at(self.coarse, self.prompts, self.reach)

    @cached_property
    def session_features(self) -> Tensor:
        """(d + k, h, w): `features` and those of `kernel`, which `conditioned` is a head of."""
        if not self.prompts.clicks:
            return self.features
        return torch.cat([self.features, self.kernel.features(self.coarse)])

    @cached_property
    def conditioned(self) -> LinearPosterior:
        """The posterior given the labels of the clicked pixels: the head's weights and the kernel's."""
        clicks = self.prompts.clicks
        rows, cols = click_cells(self.coarse, self.prompts)
        labels = torch.tensor([click.positive for click in clicks], dtype=torch.bool, device=self.features.device)
        prior = self.posterior.extended(tuple(f"click_{index}" for index in range(len(clicks))), self.reach.amplitude)
        return prior.conditioned(self.session_features[:, rows, cols].T, labels)

    @cached_property
    def whitened(self) -> Tensor:
        """(r, h, w): inner products are covariances of logits under `conditioned`."""
        return self.conditioned.whitened(self.session_features)

    @cached_property
    def mean(self) -> Tensor:
        """E[f] under `conditioned`."""
        return self.conditioned.logit_mean(self.session_features)

    def head_logits(self) -> Tensor:
        """E[f] under `conditioned` at the resolution of `decoded`, (h, w): the head's own mask."""
        if self.coarse is self.decoded:
            return self.mean
        mean, plain = self.conditioned.mean, len(self.posterior.names)
        logits = weighted_features(self.decoded, self.prompts, mean[:plain])
        if self.prompts.clicks:
            logits += self.kernel.weighted_features(self.decoded, mean[plain:])
        return logits

    @cached_property
    def variance(self) -> Tensor:
        """Var f under `conditioned`."""
        return self.whitened.square().sum(0)

    @cached_property
    def prior_moments(self) -> tuple[Tensor, Tensor]:
        """E[f] and Var f under `posterior`, which knows nothing of this session's answers but through the features."""
        return self.posterior.moments(self.features)

    @cached_property
    def probability(self) -> Tensor:
        """P(inside) under `conditioned`."""
        return predictive.probability(self.mean, self.variance)

    @cached_property
    def bald(self) -> Tensor:
        """BALD in nats under `conditioned`."""
        return predictive.bald(self.mean, self.variance)

    @cached_property
    def valid(self) -> Tensor:
        """(h, w) bool: pixels that lie on the image."""
        rows, cols = self.coarse.frame.valid
        valid = torch.zeros_like(self.allowed)
        valid[:rows, :cols] = True
        return valid

    @cached_property
    def shown(self) -> Tensor:
        """Logits of the mask that the annotator sees."""
        return self.mean if self.shows == "head" else self.coarse.logits

    def generator(self) -> torch.Generator:
        """A fresh generator: the same state and seed give the same draws."""
        return torch.Generator(device="cpu").manual_seed(self.seed)

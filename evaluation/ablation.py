"""Fit each Laplace setting on the pixels of training sessions, and make a strategy of it that asks where it disagrees.

Every setting looks at the same features and is judged twice: on the pixels of objects that it was not fitted to, and by
the clicks that its BALD map asks for. SAM's own mask is shown throughout, so that curves differ by the clicks alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from evaluation.laplace_settings import Setting
from worker.acquisition.registry import REGISTRY, strategy
from worker.acquisition.state import State
from worker.head import predictive
from worker.head.dense import dense_covariance, relative_error
from worker.head.fit import Pixels
from worker.head.network import Kind, build_network, with_neighbours
from worker.head.posterior import LaplacePosterior, fit_laplace, train_network

PREFIX = "laplace/"
HIDDEN = 16
#: Rows that are fitted, that tune a prior, that judge, and on which covariances are compared with the dense reference.
FITTED, TUNED, JUDGED, COMPARED = 20_000, 4_000, 20_000, 200
CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Rows:
    """Pixels as independent rows, drawn so that each pixel of an image is as likely as any other.

    Each split is ((N, k) float32 standardised features, (N,) bool); `scale`: (k,) what features were divided by.
    """

    fitted: tuple[Tensor, Tensor]
    tuned: tuple[Tensor, Tensor]
    judged: tuple[Tensor, Tensor]
    scale: Tensor

    def centres(self) -> Rows:
        """Rows of 3 x 3 windows (`with_neighbours`) cut down to the pixel in the middle."""
        d = len(self.scale) // 9
        middle = slice(4 * d, 5 * d)
        fitted, tuned, judged = (
            (features[:, middle], labels) for features, labels in (self.fitted, self.tuned, self.judged)
        )
        return Rows(fitted, tuned, judged, self.scale[middle])


@dataclass(frozen=True)
class Fitted:
    """A setting, its posterior, and how that does on pixels; `refused`: why there is none, in words."""

    setting: Setting
    posterior: LaplacePosterior | None
    measures: dict[str, float]
    refused: str = ""

    @property
    def strategy(self) -> str:
        """The name its strategy is registered under."""
        return PREFIX + self.setting.name

    def described(self) -> dict[str, Any]:
        """For JSON."""
        return {"setting": asdict(self.setting), "measures": self.measures, "refused": self.refused}


def split(pixels: Pixels, *, seed: int = 0) -> Rows:
    """Rows of three groups of objects: 70 % fitted, 10 % tuned, 20 % judged. Raises ValueError for under ten."""
    objects = torch.unique(pixels.objects)
    if len(objects) < 10:
        raise ValueError(
            f"An ablation needs at least ten training objects, not {len(objects)}. Give more with --train."
        )
    generator = torch.Generator().manual_seed(seed)
    shuffled = objects[torch.randperm(len(objects), generator=generator)]
    first, second = round(0.7 * len(objects)), round(0.8 * len(objects))
    scale = pixels.features.flatten(0, 1).square().mean(0).sqrt().clamp(min=1e-3)

    def rows(chosen: Tensor, count: int) -> tuple[Tensor, Tensor]:
        of = torch.isin(pixels.objects, chosen)
        features, labels = pixels.features[of].flatten(0, 1), pixels.labels[of].flatten()
        drawn = torch.multinomial(pixels.weights[of].flatten(), count, replacement=True, generator=generator)
        return features[drawn] / scale, labels[drawn]

    return Rows(
        rows(shuffled[:first], FITTED), rows(shuffled[first:second], TUNED), rows(shuffled[second:], JUDGED), scale
    )


class Fitter:
    """Fits settings on one backbone's rows; settings that share a network share its mode."""

    def __init__(self, windows: Rows, *, seed: int = 0) -> None:
        """`windows`: rows of 3 x 3 windows; the heads without neighbours see the middle of each."""
        self._rows, self._seed = {False: windows.centres(), True: windows}, seed
        self._modes: dict[tuple[Kind, float, float], nn.Sequential] = {}

    def rows(self, kind: Kind) -> Rows:
        """What a network of this kind sees."""
        return self._rows[kind is Kind.CONV]

    def mode(self, setting: Setting) -> nn.Sequential:
        """The setting's network at the mode of its tempered posterior (before its prior is tuned)."""
        rows = self.rows(setting.kind)
        effective = setting.effective or float(FITTED)
        key = (setting.kind, setting.prior_precision, effective)
        if key not in self._modes:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed)
                network = build_network(setting.kind, len(self._rows[False].scale), hidden=HIDDEN)
            self._modes[key] = train_network(
                network, *rows.fitted, prior_precision=setting.prior_precision, effective=effective, steps=150
            )
        return self._modes[key]

    def fit(self, setting: Setting) -> Fitted:
        """Posterior and pixel measures of a setting; one that cannot be fitted is returned with the reason."""
        rows, network = self.rows(setting.kind), self.mode(setting)
        began = time.perf_counter()
        try:
            posterior = fit_laplace(
                network, *rows.fitted, setting.flavour, prior_precision=setting.prior_precision,
                effective=setting.effective, held_out=rows.tuned,
            )  # fmt: skip
        except ValueError as error:
            return Fitted(setting, None, {}, str(error))
        seconds = time.perf_counter() - began
        measures = pixel_measures(setting, posterior, *rows.judged)
        return Fitted(setting, posterior, {**measures, "fit_s": seconds, "covariance_error": self._error(setting)})

    def _error(self, setting: Setting) -> float:
        """Relative error of the covariance against dense float64, on few rows; NaN where there is no posterior."""
        rows, network = self.rows(setting.kind), self.mode(setting)
        features, labels = (values[:COMPARED] for values in rows.fitted)
        try:
            found = fit_laplace(
                network, features, labels, setting.flavour, prior_precision=setting.prior_precision,
                effective=setting.effective, held_out=rows.tuned,
            )  # fmt: skip
        except ValueError:
            return float("nan")
        expected = dense_covariance(found, features, labels, setting.flavour, effective=setting.effective)
        return relative_error(found.covariance, expected)


def outlook(
    setting: Setting, posterior: LaplacePosterior, rows: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """P(inside) and BALD in nats (N,) of rows (N, k), in closed form or from as many heads as the setting draws."""
    if setting.samples == 0:
        moments = posterior.logit_moments(rows)
        return predictive.probability(*moments), predictive.bald(*moments)
    draws = posterior.logit_samples(rows, setting.samples, linearised=setting.linearised, generator=generator)
    return torch.sigmoid(draws).mean(0), predictive.bald_of_samples(draws)


def pixel_measures(
    setting: Setting, posterior: LaplacePosterior, features: Tensor, labels: Tensor, *, seed: int = 0
) -> dict[str, float]:
    """On labelled rows: `nll` (nats), `calibration` (expected calibration error, 15 bins of equal width), `auroc` of
    BALD for wrong pixels (0.5: it says nothing of errors), `bald` (mean, nats)."""
    parts = [
        outlook(setting, posterior, part, torch.Generator().manual_seed(seed + number))
        for number, part in enumerate(torch.split(features, 4096))
    ]
    inside, disagreement = torch.cat([p for p, _ in parts]).double(), torch.cat([b for _, b in parts])
    target = labels.double()
    clipped = inside.clamp(1e-7, 1 - 1e-7)
    wrong = (inside > 0.5) != labels
    return {
        "nll": float(nn.functional.binary_cross_entropy(clipped, target)),
        "calibration": _calibration_error(inside, target),
        "auroc": _auroc(disagreement.numpy(), wrong.numpy()),
        "bald": float(disagreement.mean()),
    }


def register(fitted: Fitted, scale: Tensor) -> str:
    """Make the setting's BALD map a strategy; returns its name. A map registered before under it is replaced."""
    setting, posterior = fitted.setting, fitted.posterior
    if posterior is None:
        raise ValueError(f"{setting.name} has no posterior: {fitted.refused}")
    REGISTRY.pop(fitted.strategy, None)
    strategy(fitted.strategy, unit="nats", random=setting.samples > 0)(_score(setting, posterior, scale))
    return fitted.strategy


def _score(setting: Setting, posterior: LaplacePosterior, scale: Tensor) -> Callable[[State], Tensor]:
    def score(state: State) -> Tensor:
        """BALD under a Laplace posterior of the ablation."""
        # Function transforms differentiate, which tensors made in inference mode do not take part in.
        with torch.inference_mode(False):
            features = state.features.clone()
            maps = with_neighbours(features) if setting.kind is Kind.CONV else features
            rows = maps[:, state.allowed.clone()].T / scale
            _, disagreement = outlook(setting, posterior, rows, state.generator())
            result = torch.zeros_like(features[0])
            result[state.allowed.clone()] = disagreement
            return result

    return score


def _calibration_error(inside: Tensor, target: Tensor) -> float:
    bins = (inside * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    zeros = torch.zeros(CALIBRATION_BINS, dtype=torch.float64)
    gaps = zeros.index_add(0, bins, inside) - zeros.index_add(0, bins, target)
    return float(gaps.abs().sum() / len(inside))


def _auroc(score: np.ndarray[Any, Any], positive: np.ndarray[Any, Any]) -> float:
    """Area under the ROC curve by ranks (Mann and Whitney 1947); NaN when there is one class only."""
    count, others = int(positive.sum()), int((~positive).sum())
    if not count or not others:
        return float("nan")
    return float((rankdata(score)[positive].sum() - count * (count + 1) / 2) / (count * others))

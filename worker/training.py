"""Fit a head and its posterior to click sessions on images with known masks.

Sessions visit the states that proposals are made in: those of the click log where there are any, then simulated ones,
that is a first click, then answers to clicks on errors and elsewhere, the previous mask fed back each time. From every
state a few hundred pixels are kept with weights that undo the sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from worker.acquisition.candidates import allowed_pixels
from worker.acquisition.state import State
from worker.backbones import Backbone
from worker.contract import Click, Prompts
from worker.decode import Decoded, decode_next, decode_session
from worker.encode import Embedding, encode
from worker.head.features import coarse, feature_names, pixel_features
from worker.head.fit import FitOptions, Pixels, best_strength, fit_linear
from worker.head.kernel import Reach
from worker.head.store import Head, channels_of
from worker.preemption import give_way
from worker.zoom import Look, looker

Mask = NDArray[np.bool_]

NOTHING = "There is nothing to train on: give folders with images and masks."
#: What `best_reach` chooses from.
REACHES = tuple(Reach(length=length, colour=colour) for length in (0.3, 0.6) for colour in (0.08, 0.15, 0.3))


class Example(Protocol):
    """An image with one object, as `evaluation.datasets.Pair` is."""

    @property
    def name(self) -> str: ...
    def read_image(self) -> NDArray[np.uint8]: ...
    def read_mask(self) -> Mask: ...


@dataclass(frozen=True)
class SessionOptions:
    """How sessions are simulated. `clicks`: states per object; `pixels`: kept per state."""

    clicks: int = 6
    pixels: int = 384
    seed: int = 0


@dataclass(frozen=True)
class Visited:
    """An example whose image is encoded already. `states`: the prompts after each logged click, oldest first. `look`:
    encodes parts of the image."""

    name: str
    truth: Mask
    embedding: Embedding
    states: tuple[Prompts, ...] = ()
    look: Look | None = None


def collect(
    backbone: Backbone,
    examples: Iterable[Example | Visited],
    options: SessionOptions,
    *,
    features: Callable[[Decoded, Prompts], Tensor] = pixel_features,
    progress: Callable[[int], None] | None = None,
) -> Pixels:
    """Run one session per example and keep pixels of every state. Raises ValueError when there is no example.

    `features`: (d, h, w) maps of which pixels are kept.
    """
    rng = np.random.default_rng(options.seed)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    objects, counts, names = [], [], []
    with torch.inference_mode():
        for number, example in enumerate(examples):
            for prompts, decoded, labels in _session(backbone, _visited(example, backbone), options.clicks, rng):
                maps = features(decoded, prompts)
                kept.append(_sample(maps, labels, decoded, options.pixels, rng))
                objects.append(number)
                counts.append(len(prompts.clicks))
            names.append(example.name)
            if progress is not None:
                progress(number + 1)
    if not kept:
        raise ValueError(NOTHING)
    rows, labels, weights = (torch.stack([state[i] for state in kept]).clone() for i in range(3))
    return Pixels(rows, labels, weights, torch.tensor(objects), torch.tensor(counts), names)


def _visited(example: Example | Visited, backbone: Backbone) -> Visited:
    if isinstance(example, Visited):
        return example
    image = example.read_image()
    return Visited(example.name, example.read_mask(), encode(backbone, image), look=looker(backbone, image))


def _session(
    backbone: Backbone, example: Visited, count: int, rng: np.random.Generator
) -> Iterator[tuple[Prompts, Decoded, Tensor]]:
    """(prompts, the decoder's answer on the grid, the truth there) of `count` states: logged ones, then simulated."""
    truth, embedding = example.truth, example.embedding
    prompts = Prompts()
    answer: Decoded | None = None
    click: Click | None = None
    for number in range(count):
        give_way()
        if number < len(example.states):
            prompts = example.states[number]
            answer = decode_session(backbone, embedding, prompts, look=example.look)
        else:
            click = click or _start(truth, rng)
            prompts = prompts.model_copy(update={"clicks": (*prompts.clicks, click)})
            answer = decode_next(backbone, embedding, prompts, answer, example.look)
        decoded = coarse(answer)
        labels = lowres_truth(truth, decoded)
        yield decoded.frame.visible(prompts), decoded, labels
        click = _next(truth, labels, decoded, prompts, rng)
        if click is None:
            return


def train_head(
    backbone: Backbone,
    examples: Iterable[Example | Visited],
    sessions: SessionOptions,
    fit: FitOptions,
    *,
    start: Head | None = None,
    notes: dict[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Head:
    """Sessions on `examples`, then `fit_head`. Raises ValueError when there is no example."""
    pixels = collect(backbone, examples, sessions, progress=progress)
    return fit_head(backbone, pixels, sessions, fit, start=start, notes=notes)


def fit_head(
    backbone: Backbone,
    pixels: Pixels,
    sessions: SessionOptions,
    fit: FitOptions,
    *,
    start: Head | None = None,
    notes: dict[str, Any] | None = None,
) -> Head:
    """The hierarchical linear head of what `collect` found in such sessions. It refines `start` if that is given (and
    is one of this backbone that was trained). Raises ValueError when there is nothing to learn from."""
    if not len(pixels.objects):
        raise ValueError(NOTHING)
    names = feature_names(channels_of(backbone.sam))
    known = start.posterior.to(torch.device("cpu")) if start is not None and start.id != "prior" else None
    if known is not None and fit.strength is None:
        fit = replace(fit, strength=best_strength(names, pixels, fit, known))
    posterior = fit_linear(names, pixels, fit, start=known)
    recipe = {"sessions": asdict(sessions), "fit": asdict(fit)}
    counts = {"objects": len(torch.unique(pixels.objects)), "states": len(pixels.objects)}
    reach = Reach() if start is None else start.reach
    return Head("trained", posterior, backbone.id, reach=reach, notes={**(notes or {}), **recipe, **counts})


def best_reach(backbone: Backbone, examples: Iterable[Example | Visited], options: SessionOptions, head: Head) -> Reach:
    """How far clicks should speak on images like these: the one of `REACHES` under which `head`, conditioned on the
    clicks of simulated sessions, gives the true labels of all pixels the largest likelihood; another than the head's
    own only where it is larger by more than its standard error over examples."""
    rng = np.random.default_rng(options.seed)
    reaches = tuple(dict.fromkeys((head.reach, *REACHES)))
    found: list[Tensor] = []
    with torch.inference_mode():
        for example in examples:
            sums, count = torch.zeros(len(reaches), dtype=torch.float64), 0
            for prompts, decoded, labels in _session(backbone, _visited(example, backbone), options.clicks, rng):
                state = State(
                    decoded=decoded,
                    coarse=decoded,
                    prompts=prompts,
                    features=pixel_features(decoded, prompts),
                    posterior=head.posterior,
                    allowed=allowed_pixels(decoded, prompts),
                )
                sums += torch.stack([_likelihood(replace(state, reach=reach), labels) for reach in reaches])
                count += 1
            if count:
                found.append(sums / count)
    if not found:
        return head.reach
    values = torch.stack(found)
    best = int(values.mean(0).argmax())
    gains = values[:, best] - values[:, 0]
    error = float(gains.std()) / len(gains) ** 0.5 if len(gains) > 1 else float("inf")
    return reaches[best] if float(gains.mean()) > error else head.reach


def _likelihood(state: State, labels: Tensor) -> Tensor:
    """Mean log-likelihood of the labels (h, w) on the image, nats; float64 scalar."""
    inside = state.probability.double().clamp(1e-4, 1 - 1e-4)
    return torch.where(labels, inside, 1 - inside).log()[state.valid].mean().cpu()


def lowres_truth(truth: Mask, decoded: Decoded) -> Tensor:
    """The true mask (H, W) on the frame's cells: (h, w) bool, False on padding; a cell is inside when most of it is."""
    frame = decoded.frame
    rows, cols = frame.valid
    values = torch.from_numpy(truth[frame.seen.slices].astype(np.float32))[None, None]
    inside = F.interpolate(values, (rows, cols), mode="area")[0, 0] > 0.5
    full = torch.zeros(decoded.logits.shape, dtype=torch.bool)
    full[:rows, :cols] = inside
    return full.to(decoded.logits.device)


def _start(truth: Mask, rng: np.random.Generator) -> Click:
    """Near the object's centre: a random one of its deeper pixels."""
    import cv2

    depth = cv2.distanceTransform(np.pad(truth.astype(np.uint8), 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
    row, col = _draw(depth >= 0.7 * depth.max(), rng)
    return Click(x=col + 0.5, y=row + 0.5, positive=True)


def _next(truth: Mask, labels: Tensor, decoded: Decoded, prompts: Prompts, rng: np.random.Generator) -> Click | None:
    """Mostly somewhere wrong, sometimes anywhere, as annotators and strategies do. The label is true."""
    allowed = allowed_pixels(decoded, prompts)
    wrong = allowed & ((decoded.logits > 0) != labels)
    where = wrong if wrong.any() and rng.random() < 0.7 else allowed
    if not where.any():
        return None
    row, col = _draw(where.cpu().numpy(), rng)
    x, y = decoded.frame.to_original(col + 0.5, row + 0.5)
    seen = decoded.frame.seen
    x, y = min(x, seen.x1 - 0.5), min(y, seen.y1 - 0.5)
    return Click(x=x, y=y, positive=bool(truth[int(y), int(x)]))


def _draw(region: Mask, rng: np.random.Generator) -> tuple[int, int]:
    index = rng.choice(np.flatnonzero(region.ravel()))
    row, col = np.unravel_index(index, region.shape)
    return int(row), int(col)


def _sample(
    features: Tensor, labels: Tensor, decoded: Decoded, count: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """`count` pixels of the image, half of them where it matters (doubtful or wrong), with weights that undo that."""
    rows, cols = decoded.frame.valid
    valid = torch.zeros_like(labels)
    valid[:rows, :cols] = True
    doubtful = valid & ((decoded.logits.abs() < 3.0) | ((decoded.logits > 0) != labels) | labels)
    density = valid.float() / valid.sum() * 0.5 + doubtful.float() / doubtful.sum().clamp(min=1) * 0.5
    flat = density.flatten().double().cpu().numpy()
    index = torch.from_numpy(rng.choice(flat.size, count, p=flat / flat.sum())).to(labels.device)
    weights = 1.0 / (density.flatten()[index] * valid.sum())
    return (
        features.flatten(1)[:, index].T.float().cpu(),
        labels.flatten()[index].cpu(),
        (weights / weights.mean()).cpu(),
    )

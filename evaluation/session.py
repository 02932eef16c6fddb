"""One object on one encoded image, segmented click by click with a simulated user."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from evaluation import baselines, metrics
from evaluation.clicker import Mask, answer, first_click, human_like_click, oracle_click
from evaluation.datasets import Pair
from worker.backbones import Backbone
from worker.byte_lru import ByteLRU
from worker.contract import Click, Prompts
from worker.decode import Decoded, LogitsCache, decode, decode_next, decode_session
from worker.encode import Embedding, encode
from worker.frame import Frame
from worker.masks import to_mask
from worker.proposer import Decision, Proposer
from worker.zoom import Look, looker

Row = dict[str, object]
Watch = Callable[[Prompts, Mask, Decision, Frame], None]

#: Players that read the ground truth, and whether they draw.
USERS = {
    "oracle": False,
    "human-like": True,
    **dict.fromkeys(baselines.ONE_SHOT, True),
    "one-shot-entropy": False,
    "grabcut": False,
    "random-walker": False,
}
#: People: their recorded sessions are replayed (evaluation.replay).
HUMAN = "human"
CLASSICAL: dict[str, Callable[[NDArray[np.uint8], tuple[Click, ...]], Mask]] = {
    "grabcut": baselines.grabcut,
    "random-walker": baselines.random_walker,
}


@dataclass
class Session:
    """What every player starts from. `image`: H x W x 3 RGB uint8, for the classical methods alone; `truth`, `ignore`:
    H x W bool; `look`: encodes parts of the image."""

    backbone: Backbone
    proposer: Proposer
    embedding: Embedding
    image: NDArray[np.uint8]
    truth: Mask
    ignore: Mask | None
    look: Look | None = None

    @classmethod
    def open(cls, backbone: Backbone, proposer: Proposer, pair: Pair) -> Session:
        """Read a pair and encode its image."""
        image = pair.read_image()
        embedding, look = encode(backbone, image), looker(backbone, image)
        return cls(backbone, proposer, embedding, image, pair.read_mask(), pair.read_ignore(), look)

    def play(
        self,
        strategy: str,
        seed: int,
        count: int,
        start: Decoded | None = None,
        watch: Watch | None = None,
    ) -> list[Row]:
        """`count` rows, one per click, for a strategy or a player of `USERS`.

        `start`: the decoded first click, where the caller has it. `watch`: called per click, with the maps' frame.
        """
        journal = _Journal(self.truth, self.ignore)
        if strategy.startswith("one-shot-"):
            self._one_shot(strategy, seed, count, journal)
        elif strategy in CLASSICAL:
            self._classical(strategy, count, journal)
        else:
            self._interactive(strategy, seed, count, journal, start, watch)
        return journal.padded(count)

    def replay(self, given: Sequence[tuple[Click, Prompts]], count: int) -> list[Row]:
        """`count` rows of a recorded session: for each click its place, and all prompts of the object then.

        Each state is decoded as the backend does, from its prompts alone: after an undo or a drag no mask stays behind.
        """
        journal = _Journal(self.truth, self.ignore)
        known: LogitsCache = ByteLRU(64 * 2**20)
        for click, prompts in given[:count]:
            began = time.perf_counter()
            decoded = decode_session(self.backbone, self.embedding, prompts, known, look=self.look)
            decision = self.proposer.propose(decoded, prompts, strategy="random")
            seconds = time.perf_counter() - began
            mask = to_mask(decision.logits, decoded.frame, prompts)
            journal.add(click, mask, seconds, prompts, honoured_raw=_honoured(decision.logits, decoded.frame, prompts))
        return journal.padded(count)

    def decode(self, prompts: Prompts, before: Decoded | None = None) -> Decoded:
        """The decoder's answer to prompts, one click after `before`."""
        return decode_next(self.backbone, self.embedding, prompts, before, self.look)

    def _interactive(
        self,
        strategy: str,
        seed: int,
        count: int,
        journal: _Journal,
        start: Decoded | None,
        watch: Watch | None,
    ) -> None:
        rng = np.random.default_rng(_hash(strategy, seed))
        following: Click | None = first_click(self.truth)
        score = gain = math.nan
        prompts = Prompts()
        decoded: Decoded | None = None
        for number in range(1, count + 1):
            if following is None:
                return
            click = following
            began = time.perf_counter()
            prompts = Prompts(clicks=(*prompts.clicks, click))
            decoded = start if number == 1 and start is not None else self.decode(prompts, decoded)
            # A user needs the mask alone; `random` is the cheapest proposal beside it.
            decision = self.proposer.propose(
                decoded,
                prompts,
                strategy="random" if strategy in USERS else strategy,
                redecode=partial(decode, self.backbone, decoded.embedding),
                seed=seed,
                maps=watch is not None,
            )
            seconds = time.perf_counter() - began
            mask = to_mask(decision.logits, decoded.frame, prompts)
            raw = _honoured(decision.logits, decoded.frame, prompts)
            journal.add(click, mask, seconds, prompts, honoured_raw=raw, score=score, gain=gain)
            if watch is not None:
                watch(prompts, mask, decision, decoded.frame)
            if number < count:
                following = self._next(strategy, mask, prompts, decision, rng)
                if strategy not in USERS and decision.proposal is not None and decision.gain is not None:
                    score, gain = decision.proposal.score, decision.gain

    def _next(
        self, strategy: str, mask: Mask, prompts: Prompts, decision: Decision, rng: np.random.Generator
    ) -> Click | None:
        """The next click, or None when no place is left (a perfect mask, for users)."""
        if strategy == "oracle":
            return oracle_click(self.truth, mask, prompts.clicks, self.ignore)
        if strategy == "human-like":
            return human_like_click(self.truth, mask, prompts.clicks, rng, self.ignore)
        if decision.proposal is None:
            return None
        return answer(self.truth, decision.proposal.x, decision.proposal.y)

    def _one_shot(self, name: str, seed: int, count: int, journal: _Journal) -> None:
        place = baselines.ONE_SHOT.get(name)
        if place is None:
            first = Prompts(clicks=(first_click(self.truth),))
            decoded = decode(self.backbone, self.embedding, first)  # the whole image: clicks are placed all over it
            logits, frame = decoded.logits, decoded.frame
            height, width = frame.original_size
            # |logit| is monotone in entropy, and the nearest cell will do for choosing places.
            cols = [int(frame.to_lowres(x + 0.5, 0.0)[0]) for x in range(width)]
            rows = [int(frame.to_lowres(0.0, y + 0.5)[1]) for y in range(height)]
            place = baselines.entropy_places(-np.abs(logits.cpu().numpy())[np.ix_(rows, cols)])
        for number in range(1, count + 1):
            began = time.perf_counter()
            clicks = baselines.one_shot_clicks(self.truth, number, place, np.random.default_rng(_hash(name, seed)))
            prompts = Prompts(clicks=clicks)
            decoded = self.decode(prompts)
            # The same head as the strategies: what is compared is where the clicks are.
            logits = self.proposer.propose(decoded, prompts, strategy="random").logits
            seconds = time.perf_counter() - began
            mask = to_mask(logits, decoded.frame, prompts)
            journal.add(clicks[-1], mask, seconds, prompts, honoured_raw=_honoured(logits, decoded.frame, prompts))

    def _classical(self, name: str, count: int, journal: _Journal) -> None:
        clicks: tuple[Click, ...] = (first_click(self.truth),)
        for _ in range(count):
            began = time.perf_counter()
            mask = CLASSICAL[name](self.image, clicks)
            journal.add(clicks[-1], mask, time.perf_counter() - began, Prompts(clicks=clicks))
            click = oracle_click(self.truth, mask, clicks, self.ignore)
            if click is None:
                return
            clicks = (*clicks, click)


@dataclass
class _Journal:
    truth: Mask
    ignore: Mask | None
    rows: list[Row] = field(default_factory=list)
    best: float = 0.0
    mask: Mask | None = None

    def add(
        self,
        click: Click,
        mask: Mask,
        seconds: float,
        prompts: Prompts,
        *,
        honoured_raw: float = math.nan,
        score: float = math.nan,
        gain: float = math.nan,
    ) -> None:
        """One click later. `prompts`: all so far; `score`, `gain`: what the proposal that led to it promised."""
        quality = metrics.iou(mask, self.truth, self.ignore)
        self.best = max(self.best, quality)
        # Whether there was something to correct where the click is, in the mask that the one before had led to.
        on_error = "" if self.mask is None else int(not metrics.honoured(self.mask, (click,)))
        self.mask = mask
        self.rows.append(
            {
                "click": len(self.rows) + 1,
                "x": round(click.x, 2),
                "y": round(click.y, 2),
                "positive": int(click.positive),
                "iou": round(quality, 5),
                "best_iou": round(self.best, 5),
                "score": _text(score),
                "seconds": round(seconds, 4),
                "gain": _text(gain),
                "honoured": _text(metrics.honoured(mask, prompts.clicks)),
                "honoured_raw": _text(honoured_raw),
                "on_error": on_error,
            }
        )

    def padded(self, count: int) -> list[Row]:
        """`count` rows: where no click was left to make, the mask stays as it is."""
        nothing = {"x": "", "y": "", "positive": "", "score": "", "seconds": 0.0, "gain": "", "on_error": ""}
        while len(self.rows) < count:
            self.rows.append({**self.rows[-1], **nothing, "click": len(self.rows) + 1})
        return self.rows


def _honoured(logits: Tensor, frame: Frame, prompts: Prompts) -> float:
    """Share of the clicks that the logits' own sign answers, before the mask is repaired around those it does not."""
    inside = (logits > 0).cpu().numpy()
    # Outside of the window there is no mask, and no positive click (`zoom.follow`).
    clicks = frame.visible(prompts).clicks
    at = [frame.to_lowres(click.x, click.y) for click in clicks]
    cells = (Click(x=col, y=row, positive=c.positive) for (col, row), c in zip(at, clicks, strict=True))
    missed = (1.0 - metrics.honoured(inside, tuple(cells))) * len(clicks)
    return 1.0 - missed / max(len(prompts.clicks), 1)


def _text(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.5g}"


def _hash(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big")

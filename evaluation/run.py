"""Strategies x pairs x seeds: simulate sessions and append every click to clicks.csv.

A unit of work is one pair: its image is encoded once, its first click decoded once, and every strategy and seed starts
from there. A finished (pair, strategy, seed) is written in one piece, so a run that was killed goes on where it was.
"""

from __future__ import annotations

import csv
import hashlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evaluation import metrics
from evaluation.clicker import answer, first_click, human_like_click, oracle_click
from evaluation.datasets import Pair
from worker import acquisition
from worker.backbones import Backbone, build
from worker.contract import Click, Prompts
from worker.decode import Decoded, decode
from worker.embeddings import Embedding, encode
from worker.masks import upsample
from worker.proposer import Decision, Proposer

COLUMNS = ("dataset", "pair", "strategy", "seed", "click", "x", "y", "positive", "iou", "best_iou", "score", "seconds")
#: Strategies that read the ground truth, and whether they draw.
USERS = {"oracle": False, "human-like": True}

Mask = NDArray[np.bool_]
Row = dict[str, object]


@dataclass(frozen=True)
class Setup:
    """Everything a process needs to evaluate pairs. `strategies` as given by the user, `default` resolved."""

    backbone: str
    checkpoint: Path | None
    device: str
    head: str
    data_dir: Path
    strategies: tuple[str, ...]
    clicks: int
    seeds: int
    random_weights: bool = False
    threads: int = 1

    def jobs_of(self, pair: Pair) -> list[tuple[str, int]]:
        """(strategy, seed) to run for a pair: one seed is enough where nothing is drawn."""
        return [(name, seed) for name in self.strategies for seed in range(self.seeds if is_random(name) else 1)]


def is_random(strategy: str) -> bool:
    """Whether seeds matter. Raises ValueError for an unknown strategy."""
    if strategy in USERS:
        return USERS[strategy]
    return acquisition.find(strategy).random


@lru_cache(maxsize=1)
def _model(setup: Setup) -> tuple[Backbone, Proposer]:
    torch.set_num_threads(setup.threads)
    backbone = build(
        setup.backbone,
        checkpoint=setup.checkpoint,
        device=setup.device,
        data_dir=setup.data_dir,
        random_weights=setup.random_weights,
    )
    return backbone, Proposer(backbone, head=setup.head, data_dir=setup.data_dir, stop=False)


@dataclass
class Session:
    """One object on one encoded image, seen by a simulated user."""

    backbone: Backbone
    proposer: Proposer
    embedding: Embedding
    truth: Mask
    ignore: Mask | None

    def redecode(self, prompts: Prompts, mask_input: Tensor | None) -> Decoded:
        return decode(self.backbone, self.embedding, prompts, mask_input)

    def play(
        self,
        strategy: str,
        seed: int,
        count: int,
        start: Decoded | None = None,
        watch: Callable[[Prompts, Mask, Decision], None] | None = None,
    ) -> Iterator[Row]:
        """Rows of `count` clicks (fewer when no place is left): the exact user's answers to `strategy`'s proposals.

        `start`: the decoded first click, where the caller has it. `watch(prompts, mask, decision)`: called per click.
        """
        rng = np.random.default_rng(_hash(strategy, seed))
        click = first_click(self.truth)
        prompts, previous, best, score = Prompts(), None, 0.0, float("nan")
        for number in range(1, count + 1):
            began = time.perf_counter()
            prompts = Prompts(clicks=(*prompts.clicks, click))
            decoded = start if number == 1 and start is not None else self.redecode(prompts, previous)
            decision = self._decide(decoded, prompts, strategy, seed, maps=watch is not None)
            seconds = time.perf_counter() - began
            mask = upsample(decision.logits, decoded.frame, decoded.frame.original_size)
            quality = metrics.iou(mask, self.truth, self.ignore)
            best = max(best, quality)
            if watch is not None:
                watch(prompts, mask, decision)
            yield {
                "click": number,
                "x": round(click.x, 2),
                "y": round(click.y, 2),
                "positive": int(click.positive),
                "iou": round(quality, 5),
                "best_iou": round(best, 5),
                "score": f"{score:.5g}",
                "seconds": round(seconds, 4),
            }
            previous = decoded.logits[None]
            following = self._next(strategy, mask, prompts, decision, rng)
            if following is None:
                # Nothing is left to click on (a perfect mask for the oracle): the mask stays as it is.
                for later in range(number + 1, count + 1):
                    yield {
                        "click": later,
                        "x": "",
                        "y": "",
                        "positive": "",
                        "iou": round(quality, 5),
                        "best_iou": round(best, 5),
                        "score": "",
                        "seconds": 0.0,
                    }
                return
            click, score = following

    def _decide(self, decoded: Decoded, prompts: Prompts, strategy: str, seed: int, *, maps: bool) -> Decision:
        name = "random" if strategy in USERS else strategy  # the mask is the same, the proposal is not used
        return self.proposer.propose(decoded, prompts, strategy=name, redecode=self.redecode, seed=seed, maps=maps)

    def _next(
        self, strategy: str, mask: Mask, prompts: Prompts, decision: Decision, rng: np.random.Generator
    ) -> tuple[Click, float] | None:
        if strategy == "oracle":
            click = oracle_click(self.truth, mask, prompts.clicks, self.ignore)
        elif strategy == "human-like":
            click = human_like_click(self.truth, mask, prompts.clicks, rng, self.ignore)
        elif decision.proposal is None:
            return None
        else:
            return answer(self.truth, decision.proposal.x, decision.proposal.y), decision.proposal.score
        return None if click is None else (click, float("nan"))


def open_session(setup: Setup, pair: Pair) -> Session:
    """Read a pair and encode its image."""
    backbone, proposer = _model(setup)
    with torch.inference_mode():
        embedding = encode(backbone, pair.read_image())
    return Session(backbone, proposer, embedding, pair.read_mask(), pair.read_ignore())


def evaluate_pair(task: tuple[Setup, Pair, frozenset[tuple[str, int]]]) -> list[Row]:
    """All rows of a pair but those of the (strategy, seed) that are done already."""
    setup, pair, done = task
    todo = [job for job in setup.jobs_of(pair) if job not in done]
    if not todo:
        return []
    rows: list[Row] = []
    with torch.inference_mode():
        session = open_session(setup, pair)
        start = session.redecode(Prompts(clicks=(first_click(session.truth),)), None)
        for strategy, seed in todo:
            head: Row = {"dataset": pair.dataset, "pair": pair.name, "strategy": strategy, "seed": seed}
            rows += [{**head, **row} for row in session.play(strategy, seed, setup.clicks, start)]
    return rows


def run(
    setup: Setup, pairs: list[Pair], path: Path, *, jobs: int = 1, progress: Callable[[int, int], None] | None = None
) -> None:
    """Evaluate `pairs` and append to the CSV at `path`, skipping what it already holds.

    `progress(done, total)` counts pairs. Each process uses `setup.threads` threads.
    """
    done = finished(path, setup.clicks)
    tasks = [(setup, pair, frozenset(done.get((pair.dataset, pair.name), ()))) for pair in pairs]
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if fresh:
            writer.writeheader()
        for number, rows in enumerate(_map(tasks, jobs), start=1):
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())
            if progress is not None:
                progress(number, len(tasks))


def _map(tasks: list[tuple[Setup, Pair, frozenset[tuple[str, int]]]], jobs: int) -> Iterable[list[Row]]:
    if jobs <= 1:
        yield from map(evaluate_pair, tasks)
        return
    # Not fork: a forked copy of torch's thread pool can hang.
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(evaluate_pair, tasks)


def finished(path: Path, clicks: int) -> dict[tuple[str, str], set[tuple[str, int]]]:
    """(dataset, pair) -> the (strategy, seed) with all `clicks` rows in the CSV.

    A half-written tail, as a kill may leave, is cut off the file.
    """
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if None not in row.values() and row.get("seconds")]
    counts: dict[tuple[str, str, str, int], int] = {}
    for row in rows:
        key = (row["dataset"], row["pair"], row["strategy"], int(row["seed"]))
        counts[key] = max(counts.get(key, 0), int(row["click"]))
    complete = {key for key, count in counts.items() if count >= clicks}
    kept = [r for r in rows if (r["dataset"], r["pair"], r["strategy"], int(r["seed"])) in complete]
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(kept)
    temporary.replace(path)
    done: dict[tuple[str, str], set[tuple[str, int]]] = {}
    for dataset, pair, strategy, seed in complete:
        done.setdefault((dataset, pair), set()).add((strategy, seed))
    return done


def _hash(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big")

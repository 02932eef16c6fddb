"""Strategies x pairs x seeds: simulate sessions and append every click to clicks.csv.

A unit of work is one pair: its image is encoded once, its first click decoded once, and every strategy and seed starts
from there. A finished (pair, strategy, seed) is written in one piece, so a run that was killed goes on where it was.
"""

from __future__ import annotations

import csv
import multiprocessing
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from evaluation.clicker import first_click
from evaluation.datasets import Pair
from evaluation.replay import Recorded, Recordings
from evaluation.session import HUMAN, USERS, Row, Session
from worker import acquisition
from worker.backbones import Backbone, build
from worker.contract import Prompts
from worker.proposer import Proposer

COLUMNS = (
    *("dataset", "pair", "strategy", "seed", "click", "x", "y", "positive", "iou", "best_iou", "score", "seconds"),
    *("gain", "honoured", "honoured_raw", "on_error"),
)


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
    zoom: str = "auto"
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
def model(setup: Setup) -> tuple[Backbone, Proposer]:
    """The backbone and proposer of a set-up, built once in a process."""
    torch.set_num_threads(setup.threads)
    backbone = build(
        setup.backbone,
        checkpoint=setup.checkpoint,
        device=setup.device,
        data_dir=setup.data_dir,
        zoom=setup.zoom,
        random_weights=setup.random_weights,
    )
    return backbone, Proposer(backbone, head=setup.head, data_dir=setup.data_dir, stop=False)


def open_session(setup: Setup, pair: Pair) -> Session:
    """Read a pair and encode its image."""
    return Session.open(*model(setup), pair)


@dataclass(frozen=True)
class Task:
    """A pair, the (strategy, seed) that are done already, and people's sessions: the n-th is seed n of `human`."""

    setup: Setup
    pair: Pair
    done: frozenset[tuple[str, int]]
    recorded: tuple[Recorded, ...] = ()


def evaluate_pair(task: Task) -> list[Row]:
    """All rows of a pair but those that are done already."""
    setup, pair = task.setup, task.pair
    todo = [job for job in setup.jobs_of(pair) if job not in task.done]
    replays = [(seed, one) for seed, one in enumerate(task.recorded) if (HUMAN, seed) not in task.done]
    if not todo and not replays:
        return []
    rows: list[Row] = []
    with torch.inference_mode():
        session = open_session(setup, pair)
        start = session.decode(Prompts(clicks=(first_click(session.truth),)))
        for strategy, seed in todo:
            head: Row = {"dataset": pair.dataset, "pair": pair.name, "strategy": strategy, "seed": seed}
            rows += [{**head, **row} for row in session.play(strategy, seed, setup.clicks, start)]
        for seed, one in replays:
            head = {"dataset": pair.dataset, "pair": pair.name, "strategy": HUMAN, "seed": seed}
            steps = [(step.click, step.prompts) for step in one.steps]
            rows += [{**head, **row} for row in session.replay(steps, setup.clicks)]
    return rows


def run(
    setup: Setup,
    pairs: list[Pair],
    path: Path,
    *,
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
    recorded: Recordings | None = None,
) -> None:
    """Evaluate `pairs` and append to the CSV at `path`, skipping what it already holds.

    `recorded`: people's sessions on the pairs. `progress(done, total)` counts pairs. Each process uses `setup.threads`
    threads.
    """
    done = finished(path, setup.clicks)
    keys = [(pair.dataset, pair.name) for pair in pairs]
    tasks = [
        Task(setup, pair, frozenset(done.get(key, ())), (recorded or {}).get(key, ()))
        for pair, key in zip(pairs, keys, strict=True)
    ]
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


def _map(tasks: list[Task], jobs: int) -> Iterable[list[Row]]:
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

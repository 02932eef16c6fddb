"""What full sessions on known masks decide about a head: whose mask is shown, and when to stop proposing clicks."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, replace

import pandas as pd

from evaluation.session import Session
from evaluation.stopping import Trade, choose, trades
from worker.head.store import Head, on_device
from worker.proposer import Proposer


@dataclass(frozen=True)
class Calibration:
    """`iou`: mean IoU over all clicks with SAM's mask (`sam`) and the head's (`head`); `stop`: the trade chosen."""

    objects: int
    iou: dict[str, float]
    stop: Trade


def calibrated(head: Head, sessions: Iterable[tuple[str, Session]], *, clicks: int = 15) -> tuple[Head, Calibration]:
    """The head with what sessions (by name of the object) decide: `shows` is the mask with the larger mean IoU, `stop`
    the expected gain under which the sessions' strategy loses next to nothing by stopping.

    Raises ValueError without sessions.
    """
    played: dict[str, list[dict[str, object]]] = {"sam": [], "head": []}
    strategy = ""
    for name, session in sessions:
        strategy = session.proposer.strategy.name
        key = {"dataset": "", "pair": name, "seed": 0, "strategy": strategy}
        for shows, rows in played.items():
            mine = replace(session, proposer=with_head(session.proposer, replace(head, shows=shows)))
            rows += [{**key, **row} for row in mine.play(strategy, 0, clicks)]
    if not strategy:
        raise ValueError("There is nothing to calibrate on.")
    frames = {shows: pd.DataFrame(rows) for shows, rows in played.items()}
    ious = {shows: float(frame["iou"].mean()) for shows, frame in frames.items()}
    shows = max(ious, key=lambda name: ious[name])
    chosen = choose(trades(frames[shows], strategy))
    found = Calibration(len(frames[shows]) // clicks, ious, chosen)
    notes = {"objects": found.objects, "saved": chosen.saved, "lost": chosen.lost, "mean_iou": ious}
    made = replace(head, shows=shows, stop={strategy: chosen.threshold}, notes={**head.notes, "calibration": notes})
    return made, found


def with_head(proposer: Proposer, head: Head) -> Proposer:
    """Another proposer with this head and the strategy of `proposer`, which always proposes."""
    made = copy(proposer)
    made.head, made.stop = on_device(head, proposer.head.posterior.mean.device), False
    return made

"""What full sessions on known masks decide about a head: how far a click speaks, whose mask is shown, and when to stop
proposing clicks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass, replace

import pandas as pd

from evaluation.session import Session
from evaluation.stopping import Trade, choose, trades
from worker.backbones import Backbone
from worker.head.store import Head, on_device
from worker.proposer import Proposer
from worker.training import SessionOptions, Visited, best_reach

#: Sessions on the same objects anew, by name of the object, for a stage of calibration: "reach" or "calibrating".
Sessions = Callable[[str], Iterable[tuple[str, Session]]]


@dataclass(frozen=True)
class Calibration:
    """`iou`: mean IoU over all clicks with SAM's mask (`sam`), the head's (`head`) and, where the likelihood calls for
    it, the head's when clicks have another reach (`reach`); `stop`: the trade chosen."""

    objects: int
    iou: dict[str, float]
    stop: Trade


def calibrated(
    backbone: Backbone, head: Head, sessions: Sessions, *, clicks: int = 15, seed: int = 0
) -> tuple[Head, Calibration]:
    """The head with what sessions decide: `shows` is the mask and `reach` that of clicks with which the sessions'
    strategy has the largest mean IoU, `stop` the expected gain under which it loses next to nothing by stopping.

    Raises ValueError without sessions.
    """
    visited = (Visited(name, one.truth, one.embedding, look=one.look) for name, one in sessions("reach"))
    reach = best_reach(backbone, visited, SessionOptions(seed=seed), head)
    tried = {"sam": replace(head, shows="sam"), "head": replace(head, shows="head")}
    if reach != head.reach:
        tried["reach"] = replace(head, shows="head", reach=reach)
    played: dict[str, list[dict[str, object]]] = {name: [] for name in tried}
    strategy = ""
    for name, session in sessions("calibrating"):
        strategy = session.proposer.strategy.name
        key = {"dataset": "", "pair": name, "seed": 0, "strategy": strategy}
        for which, rows in played.items():
            mine = replace(session, proposer=with_head(session.proposer, tried[which]))
            rows += [{**key, **row} for row in mine.play(strategy, 0, clicks)]
    if not strategy:
        raise ValueError("There is nothing to calibrate on.")
    frames = {which: pd.DataFrame(rows) for which, rows in played.items()}
    ious = {which: float(frame["iou"].mean()) for which, frame in frames.items()}
    best = max(ious, key=lambda which: ious[which])
    chosen = choose(trades(frames[best], strategy))
    found = Calibration(len(frames[best]) // clicks, ious, chosen)
    notes = {"objects": found.objects, "saved": chosen.saved, "lost": chosen.lost, "mean_iou": ious}
    made = replace(tried[best], stop={strategy: chosen.threshold}, notes={**head.notes, "calibration": notes})
    return made, found


def with_head(proposer: Proposer, head: Head) -> Proposer:
    """Another proposer with this head and the strategy of `proposer`, which always proposes."""
    made = copy(proposer)
    made.head, made.stop = on_device(head, proposer.head.posterior.mean.device), False
    return made

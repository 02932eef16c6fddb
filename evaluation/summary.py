"""From clicks.csv to the tables of summary.json."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evaluation import metrics
from evaluation.session import HUMAN, USERS
from evaluation.stopping import trade_at

Key = tuple[str, str]
MEASURES = ("iou_1", "iou_final", "best_iou", "delta_iou", "auc", "noc85", "noc90", "failures85", "failures90")
#: Who knows the truth, people included, is ranked, too, but apart.
WITH_TRUTH = frozenset(USERS) | {HUMAN}


def read_clicks(path: Path, pairs: Collection[Key], strategies: Collection[str]) -> pd.DataFrame:
    """clicks.csv, one row per click, of these pairs and strategies: a folder may hold more of an earlier run."""
    rows = pd.read_csv(path, dtype={"dataset": str, "pair": str, "strategy": str})
    rows = rows[[key in pairs for key in zip(rows["dataset"], rows["pair"], strict=True)]]
    return rows[rows["strategy"].isin(strategies)]


def object_table(clicks: pd.DataFrame) -> pd.DataFrame:
    """One row per (dataset, pair, strategy): every measure, averaged over seeds."""
    rows = []
    for (dataset, pair, strategy, seed), group in clicks.groupby(["dataset", "pair", "strategy", "seed"], sort=False):
        curve = group.sort_values("click")["iou"].to_numpy(float)
        rows.append(
            {"dataset": dataset, "pair": pair, "strategy": strategy, "seed": seed} | metrics.object_measures(curve)
        )
    table = pd.DataFrame(rows)
    return table.groupby(["dataset", "pair", "strategy"], as_index=False, sort=False)[list(MEASURES)].mean()


def summarise(
    clicks: pd.DataFrame,
    images: dict[Key, str],
    *,
    thin: Collection[Key] | None = None,
    stops: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Per data set and strategy: means of the measures, ci95 of auc and noc85 over images, ranks by auc.

    `images`: (dataset, pair) -> image, the unit of the bootstrap. Means are over pairs (seeds averaged first).
    `rank`: among all strategies; `rank_without_truth`: among those that do not read the ground truth.
    `overall`: the same over all data sets together (pairs pooled), and the mean of the ranks.
    `on_error`: share of the clicks after the first whose place was wrong in the mask before, all clicks alike.
    `first_minus`: other strategy -> paired differences of the first strategy in `clicks` to it.
    With `thin`, the pairs whose object is thin: `thin` and `compact`, the same over the pairs of either kind.
    With `stops`, strategy -> expected gain under which it stops: `stopping`, share of the clicks saved and IoU lost.
    """
    objects = object_table(clicks)
    per_set = {str(name): _strategies(group, images) for name, group in objects.groupby("dataset", sort=False)}
    overall = _strategies(objects, images)
    for strategy, entry in overall.items():
        on_error = clicks.loc[clicks["strategy"] == strategy, "on_error"].mean()
        entry["on_error"] = None if np.isnan(on_error) else float(on_error)
        for key in ("rank", "rank_without_truth"):
            found = [table[strategy][key] for table in per_set.values() if key in table.get(strategy, {})]
            if found:
                entry[key] = float(np.mean(found))
    result = {"datasets": per_set, "overall": overall, "first_minus": _differences(objects, images)}
    if thin is not None:
        of = np.array([key in thin for key in zip(objects["dataset"], objects["pair"], strict=True)])
        result |= {name: _strategies(objects[part], images) for name, part in (("thin", of), ("compact", ~of))}
    if stops is not None:
        played = set(objects["strategy"])
        trades = {name: trade_at(clicks, name, gain) for name, gain in stops.items() if name in played}
        result["stopping"] = {name: asdict(trade) for name, trade in trades.items()}
    return result


def _differences(objects: pd.DataFrame, images: dict[Key, str]) -> dict[str, dict[str, list[float]]]:
    """The first strategy minus each other on the same pairs: [mean, low, high], 95 % bootstrap over images."""
    first, *others = objects["strategy"].unique()
    found: dict[str, dict[str, list[float]]] = {str(other): {} for other in others}
    for measure in ("auc", "iou_final", "best_iou", "noc85"):
        wide = objects.pivot_table(index=["dataset", "pair"], columns="strategy", values=measure)
        for other in others:
            pairs = wide[[first, other]].dropna()
            values = (pairs[first] - pairs[other]).to_numpy(float)
            groups = [(dataset, images.get((dataset, pair), pair)) for dataset, pair in pairs.index]
            found[str(other)][measure] = [float(values.mean()), *metrics.bootstrap(values, groups)]
    return found


def _strategies(objects: pd.DataFrame, images: dict[tuple[str, str], str]) -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for name, group in objects.groupby("strategy", sort=False):
        keys = list(zip(group["dataset"].astype(str), group["pair"].astype(str), strict=True))
        groups = [(dataset, images.get((dataset, pair), pair)) for dataset, pair in keys]
        entry: dict[str, Any] = {measure: float(group[measure].mean()) for measure in MEASURES}
        entry["failures85"], entry["failures90"] = float(group["failures85"].sum()), float(group["failures90"].sum())
        for measure in ("auc", "noc85"):
            low, high = metrics.bootstrap(group[measure].to_numpy(float), groups)
            entry["ci95" if measure == "auc" else f"ci95_{measure}"] = [low, high]
        entry["pairs"], entry["images"] = len(group), len(set(groups))
        table[str(name)] = entry
    for name, rank in metrics.ranks({name: entry["auc"] for name, entry in table.items()}).items():
        table[name]["rank"] = rank
    blind = {name: entry["auc"] for name, entry in table.items() if name not in WITH_TRUTH}
    for name, rank in metrics.ranks(blind).items():
        table[name]["rank_without_truth"] = rank
    return table


def write_summary(summary: dict[str, Any], path: Path) -> None:
    """Write summary.json."""
    path.write_text(json.dumps(summary, indent=1) + "\n")

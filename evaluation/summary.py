"""From clicks.csv to the tables of summary.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evaluation import metrics
from evaluation.session import HUMAN, USERS

MEASURES = ("iou_1", "iou_final", "best_iou", "delta_iou", "auc", "noc85", "noc90", "failures85", "failures90")
#: Who knows the truth, people included, is ranked, too, but apart.
WITH_TRUTH = frozenset(USERS) | {HUMAN}


def read_clicks(path: Path) -> pd.DataFrame:
    """clicks.csv, one row per click."""
    return pd.read_csv(path, dtype={"dataset": str, "pair": str, "strategy": str})


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


def summarise(clicks: pd.DataFrame, images: dict[tuple[str, str], str]) -> dict[str, Any]:
    """Per data set and strategy: means of the measures, ci95 of auc and noc85 over images, ranks by auc.

    `images`: (dataset, pair) -> image, the unit of the bootstrap. Means are over pairs (seeds averaged first).
    `rank`: among all strategies; `rank_without_truth`: among those that do not read the ground truth.
    `overall`: the same over all data sets together (pairs pooled), and the mean of the ranks.
    """
    objects = object_table(clicks)
    per_set = {str(name): _strategies(group, images) for name, group in objects.groupby("dataset", sort=False)}
    overall = _strategies(objects, images)
    for strategy, entry in overall.items():
        for key in ("rank", "rank_without_truth"):
            found = [table[strategy][key] for table in per_set.values() if key in table.get(strategy, {})]
            if found:
                entry[key] = float(np.mean(found))
    return {"datasets": per_set, "overall": overall}


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

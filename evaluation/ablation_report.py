"""What an ablation found: one table, and one figure for each axis."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from evaluation import metrics, summary
from evaluation.ablation import PREFIX
from evaluation.laplace_settings import AXES, BASE

mpl.use("Agg")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
#: Columns of a table and how they are written.
_FORMATS = {
    "auc": ".4f",
    "difference": "+.4f",
    "low": "+.4f",
    "high": "+.4f",
    "nll": ".4f",
    "calibration": ".4f",
    "auroc": ".3f",
    "bald": ".4f",
    "covariance_error": ".1e",
    "fit_s": ".2f",
}
_HEADINGS = {
    "auc": "AUC",
    "difference": "to the base",
    "low": "95 % from",
    "high": "to",
    "nll": "NLL",
    "calibration": "ECE",
    "auroc": "AUROC",
    "bald": "mean BALD",
    "covariance_error": "covariance error",
    "fit_s": "fit, s",
}


def table(
    clicks: pd.DataFrame, fits: list[dict[str, Any]], images: dict[tuple[str, str], str], backbone: str
) -> pd.DataFrame:
    """One row for each setting and reference strategy of a backbone, best AUC first within its axis.

    clicks: rows of clicks.csv; fits: `Fitted.described()` of the settings; images: (dataset, pair) -> image, the unit
    of the bootstrap. `difference` (with `low`, `high`): paired AUC difference to the base setting.
    """
    objects = summary.object_table(clicks)
    wide = objects.pivot_table(index=["dataset", "pair"], columns="strategy", values="auc")
    groups = [(dataset, images.get((dataset, pair), pair)) for dataset, pair in wide.index]
    known = {PREFIX + fit["setting"]["name"]: fit for fit in fits}
    base = PREFIX + BASE
    rows = []
    for strategy in [*known, *(name for name in wide.columns if name not in known)]:
        fit = known.get(strategy)
        row: dict[str, Any] = {
            "backbone": backbone,
            "axis": fit["setting"]["axis"] if fit else "reference",
            "setting": strategy.removeprefix(PREFIX),
            "refused": fit["refused"] if fit else "",
            **(fit["measures"] if fit else {}),
        }
        if strategy in wide:
            row["auc"] = float(wide[strategy].mean())
            if base in wide:
                gains = (wide[strategy] - wide[base]).to_numpy(float)
                low, high = metrics.bootstrap(gains, groups)
                row |= {"difference": float(gains.mean()), "low": low, "high": high}
        rows.append(row)
    frame = pd.DataFrame(rows).reindex(columns=["backbone", "axis", "setting", "refused", *_FORMATS])
    place = {axis: number for number, axis in enumerate((*AXES, "reference"))}
    frame["place"] = frame["axis"].map(place)
    return frame.sort_values(["place", "auc"], ascending=[True, False], ignore_index=True).drop(columns="place")


def markdown(frame: pd.DataFrame) -> str:
    """The rows of one backbone as Markdown, a table for each axis."""
    lines: list[str] = []
    for axis, part in frame.groupby("axis", sort=False):
        lines += ["", f"**{axis}**", "", f"| setting | {' | '.join(_HEADINGS.values())} |"]
        lines.append("|---" * (len(_FORMATS) + 1) + "|")
        for _, row in part.iterrows():
            cells = [_cell(row[name], form) for name, form in _FORMATS.items()]
            if row["refused"]:
                cells[0] = f"refused: {row['refused']}"
            lines.append(f"| {row['setting']} | {' | '.join(cells)} |")
    return "\n".join(lines[1:]) + "\n"


def plot_axis(frame: pd.DataFrame, axis: str, path: Path) -> None:
    """AUC differences to the base with their intervals, and held-out NLL, of an axis's settings on every backbone."""
    part = frame[(frame["axis"] == axis) & frame["auc"].notna()]
    names, backbones = list(dict.fromkeys(part["setting"])), list(dict.fromkeys(part["backbone"]))
    figure = Figure(figsize=(9.5, 0.32 * max(len(names), 2) + 1.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for number, backbone in enumerate(backbones):
        of = part[part["backbone"] == backbone].set_index("setting")
        places = np.array([names.index(name) for name in of.index]) + 0.18 * (number - (len(backbones) - 1) / 2)
        gains = of["difference"].to_numpy(float)
        errors = np.abs(np.stack([gains - of["low"].to_numpy(float), of["high"].to_numpy(float) - gains]))
        style = {"fmt": "o", "color": COLOURS[number % len(COLOURS)], "markersize": 4, "label": backbone}
        left.errorbar(gains, places, xerr=errors, linewidth=1.2, **style)
        right.plot(of["nll"].to_numpy(float), places, "o", color=style["color"], markersize=4)
    left.axvline(0.0, color="#999999", linewidth=0.8)
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.invert_yaxis()
    left.set_xlabel(f"AUC − AUC of {BASE}", fontsize=9)
    right.set_xlabel("negative log-likelihood of held-out pixels", fontsize=9)
    for panel in (left, right):
        panel.grid(alpha=0.25)
    figure.suptitle(axis, fontsize=11)
    if len(backbones) > 1:
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def _cell(value: Any, form: str) -> str:
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else format(value, form)

"""Figures: curves per data set, average ranks, and one object as a film strip."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from evaluation.clicker import Mask
from worker.contract import Click

mpl.use("Agg")
COLUMNS = 4
#: Colours that stay apart for most colour-blind readers (Okabe and Ito), then line styles.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
STYLES = ("-", "--", ":")


def curves(clicks: pd.DataFrame, path: Path, *, normalised: bool = False) -> None:
    """One panel per data set: mean IoU_t - IoU_1 over clicks for each strategy.

    `normalised`: scaled per panel so that the smallest and largest mean of all strategies are 0 and 1.
    """
    frame = clicks.copy()
    keys = ["dataset", "pair", "strategy", "seed"]
    frame["delta"] = frame["iou"] - frame.groupby(keys)["iou"].transform("first")
    datasets, strategies = list(frame["dataset"].unique()), list(frame["strategy"].unique())
    rows = math.ceil(len(datasets) / COLUMNS)
    figure = Figure(figsize=(3.3 * COLUMNS, 2.8 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False, sharex=True)
    for panel, dataset in zip(panels.flat, datasets, strict=False):
        part = frame[frame["dataset"] == dataset]
        means = part.groupby(["strategy", "click"])["delta"].mean().unstack("click")
        if normalised:
            low, high = means.to_numpy().min(), means.to_numpy().max()
            means = (means - low) / max(high - low, 1e-9)
        for number, strategy in enumerate(strategies):
            if strategy in means.index:
                colour, style = COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS) % len(STYLES)]
                panel.plot(means.columns, means.loc[strategy], style, color=colour, label=strategy, linewidth=1.5)
        panel.set_title(f"{dataset} ({part['pair'].nunique()})", fontsize=10)
        panel.grid(alpha=0.25)
    for panel in list(panels.flat)[len(datasets) :]:
        panel.set_axis_off()
    for panel in panels[-1]:
        panel.set_xlabel("clicks")
    figure.supylabel("ΔIoU, min-max normalised" if normalised else "ΔIoU")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=9, frameon=False)
    figure.savefig(path, dpi=110)


def average_ranks(summary: dict[str, Any], path: Path) -> None:
    """Mean rank by AUC over data sets, best at the top; dots are single data sets."""
    overall = summary["overall"]
    names = sorted(overall, key=lambda name: overall[name]["rank"], reverse=True)
    figure = Figure(figsize=(6.5, 0.34 * len(names) + 1.2), layout="constrained")
    panel = figure.subplots()
    panel.barh(range(len(names)), [overall[name]["rank"] for name in names], color="#56B4E9")
    for position, name in enumerate(names):
        ranks = [table[name]["rank"] for table in summary["datasets"].values() if name in table]
        panel.plot(ranks, [position] * len(ranks), "o", color="black", markersize=3, alpha=0.6)
    panel.set_yticks(range(len(names)), names)
    panel.set_xlabel("rank by AUC (1 = best)")
    figure.savefig(path, dpi=110)


class FilmStrip:
    """One session, a column per click: image with prompts, mask, BALD, entropy, and the proposal on all of them."""

    def __init__(self, image: NDArray[np.uint8], truth: Mask) -> None:
        self.image, self.truth = image, truth
        self.frames: list[
            tuple[tuple[Click, ...], Mask, dict[str, NDArray[np.float32]], tuple[float, float] | None]
        ] = []

    def add(
        self,
        clicks: tuple[Click, ...],
        mask: Mask,
        maps: dict[str, NDArray[np.float32]],
        proposal: tuple[float, float] | None,
    ) -> None:
        """One click later. `maps`: `bald` and `entropy` at the image's size; `proposal`: (x, y) original pixels."""
        self.frames.append((clicks, mask, maps, proposal))

    def save(self, path: Path) -> None:
        """Write the strip as an image."""
        rows = ("prompts", "mask", "bald", "entropy")
        figure = Figure(figsize=(2.1 * len(self.frames), 2.1 * len(rows) * self._aspect() + 0.4), layout="constrained")
        panels = figure.subplots(len(rows), len(self.frames), squeeze=False)
        for column, (clicks, mask, maps, proposal) in enumerate(self.frames):
            for row, kind in enumerate(rows):
                panel = panels[row][column]
                panel.imshow(self.image if kind in ("prompts", "mask") else maps[kind], cmap="magma")
                if kind == "mask":
                    panel.contour(mask, [0.5], colors="#56B4E9", linewidths=1.2)
                    panel.contour(self.truth, [0.5], colors="white", linewidths=0.7, linestyles="dotted")
                if kind == "prompts":
                    for click in clicks:
                        panel.plot(
                            click.x, click.y, "o", color="#00C853" if click.positive else "#D50000", mec="w", ms=5
                        )
                if proposal is not None:
                    panel.plot(*proposal, "o", mfc="none", mec="#FFD600", ms=9, mew=1.6)
                panel.set_xticks([])
                panel.set_yticks([])
                if column == 0:
                    panel.set_ylabel(kind)
            panels[0][column].set_title(f"click {column + 1}", fontsize=9)
        figure.savefig(path, dpi=110)

    def _aspect(self) -> float:
        return self.image.shape[0] / self.image.shape[1]

"""The training curve as a picture."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def plot_curve(log: Path, out: Path) -> None:
    """Draw log.jsonl: losses while training, and IoU on held-out images after 1, 3 and 5 clicks."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    checks = [record for record in records if "validation" in record]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot([r["minutes"] for r in steps], [r["loss"] for r in steps], lw=0.8, label="loss")
    if any("imitation" in r for r in steps):
        left.plot(
            [r["minutes"] for r in steps], [r.get("imitation") for r in steps], lw=0.8, label="distance to teacher"
        )
    left.set(xlabel="minutes of training", title="training")
    left.legend(frameon=False)
    for group, style in (("photographs", "-o"), ("scenes", "--s")):
        for place, click in ((0, 1), (2, 3), (4, 5)):
            points = [(r["minutes"], r["validation"][group][place]) for r in checks if group in r["validation"]]
            if points:
                right.plot(
                    *zip(*points, strict=True), style, ms=3, color=f"C{place // 2}", label=f"{group}, click {click}"
                )
    right.set(xlabel="minutes of training", ylabel="mean IoU", title="held-out images", ylim=(0, 1))
    right.legend(frameon=False, fontsize=7)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)

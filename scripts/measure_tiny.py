"""Measure `tiny` on evaluation sets: its own mask after every click of the standard clicker, as a Markdown table.

    python scripts/measure_tiny.py DATASETS/davis345 DATASETS/suim --limit 20
    python scripts/measure_tiny.py --speed

The clicker is `evaluation.clicker.oracle_click` (the deepest wrong pixel); no head, no proposals. It takes a fraction
of the time of `bald-sam evaluate --strategies oracle --head none`, which asks the same question through the product.
`--speed` times the encoder and five clicks on one 1024 x 768 picture, for `tiny` and for ViT-B with random weights.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from segment_anything import SamPredictor, sam_model_registry

from evaluation.clicker import first_click, oracle_click
from evaluation.datasets import Pair, read_pairs, subset
from evaluation.metrics import iou
from worker.backbones.tiny import load_tiny

SHIPPED = Path(__file__).parent.parent / "worker" / "weights" / "tiny.safetensors"


@torch.inference_mode()
def click_through(predictor: SamPredictor, pair: Pair, clicks: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """True and predicted IoU after each of `clicks` clicks; an object without any error left keeps its last values."""
    truth, ignore = pair.read_mask(), pair.read_ignore()
    predictor.set_image(pair.read_image())
    given, low, true, predicted = [first_click(truth)], None, [], []
    while len(true) < clicks:
        masks, scores, logits = predictor.predict(
            np.array([(click.x, click.y) for click in given]),
            np.array([int(click.positive) for click in given]),
            mask_input=low,
            multimask_output=low is None,
        )
        best = int(scores.argmax())
        low = logits[best : best + 1]
        true.append(iou(masks[best], truth, ignore))
        predicted.append(float(scores[best]))
        click = oracle_click(truth, masks[best], tuple(given), ignore)
        if click is None:
            break
        given.append(click)
    missing = clicks - len(true)
    return np.array(true + true[-1:] * missing), np.array(predicted + predicted[-1:] * missing)


@torch.inference_mode()
def speed(rounds: int) -> None:
    """Print seconds for `set_image` and five clicks, `tiny` and ViT-B in turn, and the ratio of the fastest rounds."""
    image = np.random.default_rng(0).integers(0, 256, (768, 1024, 3), dtype=np.uint8)
    models = {"tiny": load_tiny(SHIPPED), "vit_b": sam_model_registry["vit_b"]().eval()}
    best = dict.fromkeys(models, float("inf"))
    for _ in range(rounds):
        for name, sam in models.items():
            predictor, began, low = SamPredictor(sam), time.perf_counter(), None
            predictor.set_image(image)
            for count in range(1, 6):
                points = np.array([(100.0 * (n + 1), 80.0 * (n + 1)) for n in range(count)])
                _, scores, logits = predictor.predict(
                    points, np.ones(count), mask_input=low, multimask_output=count == 1
                )
                low = logits[scores.argmax()][None]
            best[name] = min(best[name], time.perf_counter() - began)
    times = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in best.items())
    print(f"encode and 5 clicks, fastest of {rounds}: {times}, ratio {best['vit_b'] / best['tiny']:.0f}")


def main() -> None:
    """Print one row for each data set, one for their mean, and one for all objects whatever their set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--weights", type=Path, default=SHIPPED)
    parser.add_argument("--clicks", type=int, default=15)
    parser.add_argument("--limit", type=int, default=None, help="objects per data set, evenly spaced")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--speed", action="store_true", help="time encoder and clicks beside ViT-B's")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.speed:
        speed(rounds=3)
    if not options.folders:
        return
    predictor = SamPredictor(load_tiny(options.weights))
    shown = [click for click in (1, 2, 3, 5, 10, 15) if click <= options.clicks]
    print("| set | objects | " + " | ".join(f"click {c}" for c in shown) + " | last minus best | Spearman |")
    print("|---" * (len(shown) + 4) + "|")
    curves, every = [], []
    for folder in options.folders:
        measured = [click_through(predictor, p, options.clicks) for p in subset(read_pairs(folder), options.limit)]
        true, predicted = (np.stack(values) for values in zip(*measured, strict=True))
        every.append((true, predicted))
        curves.append((folder.name, len(true), true.mean(0), spearmanr(true.ravel(), predicted.ravel()).statistic))
        print(_row(*curves[-1], shown), flush=True)
    total = sum(count for _, count, _, _ in curves)
    curve, rank = np.mean([c for _, _, c, _ in curves], 0), float(np.mean([r for *_, r in curves]))
    print(_row("**mean of sets**", total, curve, rank, shown))
    true, predicted = (np.concatenate(values) for values in zip(*every, strict=True))
    rank = float(spearmanr(true.ravel(), predicted.ravel()).statistic)
    print(_row("all objects as one set", total, true.mean(0), rank, shown))


def _row(name: str, count: int, curve: NDArray[np.float64], rank: float, shown: list[int]) -> str:
    values = " | ".join(f"{curve[click - 1]:.3f}" for click in shown)
    return f"| {name} | {count} | {values} | {curve[-1] - curve.max():.3f} | {rank:.2f} |"


if __name__ == "__main__":
    main()

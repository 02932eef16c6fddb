"""Measure `tiny` on evaluation sets: its own mask after every click of the standard clicker, as a Markdown table.

    python scripts/measure_tiny.py DATASETS/davis345 DATASETS/suim --limit 20
    python scripts/measure_tiny.py --speed

The clicker is `evaluation.clicker.oracle_click` (the deepest wrong pixel); no head, no proposals. It takes a fraction
of the time of `bald-sam evaluate --strategies oracle --head none`, which asks the same question through the product.
`--whole`: the object is never looked at from near. `--unguided`: borders of masks are not moved to the image's.
`--speed` times the encoder and five clicks on one 1024 x 768 picture, for `tiny`, from near and not, and for ViT-B with
random weights.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from evaluation.clicker import first_click, oracle_click
from evaluation.datasets import Pair, read_pairs, subset
from evaluation.metrics import iou
from worker.backbones import TINY_WEIGHTS, Backbone, build
from worker.contract import Click, Prompts
from worker.decode import Decoded, decode_next
from worker.encode import encode
from worker.guided_filter import guided
from worker.masks import to_mask
from worker.zoom import looker


@torch.inference_mode()
def click_through(backbone: Backbone, pair: Pair, clicks: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """True and predicted IoU after each of `clicks` clicks; an object without any error left keeps its last values."""
    truth, ignore, image = pair.read_mask(), pair.read_ignore(), pair.read_image()
    embedding, look = encode(backbone, image), looker(backbone, image)
    prompts = Prompts()
    true: list[float] = []
    predicted: list[float] = []
    decoded: Decoded | None = None
    click: Click | None = first_click(truth)
    while click is not None and len(true) < clicks:
        prompts = Prompts(clicks=(*prompts.clicks, click))
        decoded = decode_next(backbone, embedding, prompts, decoded, look)
        mask = shown(backbone, decoded, prompts)
        true.append(iou(mask, truth, ignore))
        predicted.append(decoded.predicted_iou)
        click = oracle_click(truth, mask, prompts.clicks, ignore)
    missing = clicks - len(true)
    return np.array(true + true[-1:] * missing), np.array(predicted + predicted[-1:] * missing)


def shown(backbone: Backbone, decoded: Decoded, prompts: Prompts) -> NDArray[np.bool_]:
    """The mask as the product shows it without a head."""
    logits, frame = decoded.logits, decoded.frame
    return to_mask(guided(logits, decoded.colours, frame.valid) if backbone.guided else logits, frame, prompts)


@torch.inference_mode()
def speed(rounds: int) -> None:
    """Print seconds for an encoded image and five clicks, of each model in turn, and how much quicker `tiny` is, of the
    fastest rounds."""
    rows, cols = np.mgrid[:768, :1024]
    image = np.random.default_rng(0).integers(0, 90, (768, 1024, 3), dtype=np.uint8)
    image[(rows - 300) ** 2 + (cols - 400) ** 2 < 120**2] += 120
    places = [(400, 300, True), (560, 310, False), (320, 250, True), (400, 170, False), (470, 340, True)]
    clicks = tuple(Click(x=float(x), y=float(y), positive=positive) for x, y, positive in places)
    models = {
        "tiny": build("tiny", device="cpu"),
        "tiny, the whole image alone": build("tiny", device="cpu", zoom="off"),
        "vit_b": build("vit_b", device="cpu", random_weights=True),
    }
    best = dict.fromkeys(models, float("inf"))
    for _ in range(rounds):
        for name, backbone in models.items():
            began = time.perf_counter()
            embedding, look = encode(backbone, image), looker(backbone, image)
            decoded: Decoded | None = None
            for count in range(1, 6):
                prompts = Prompts(clicks=clicks[:count])
                decoded = decode_next(backbone, embedding, prompts, decoded, look)
                shown(backbone, decoded, prompts)
            best[name] = min(best[name], time.perf_counter() - began)
    for name, seconds in best.items():
        print(f"encode and 5 clicks, {name}: {seconds:.2f} s, 1/{best['vit_b'] / seconds:.0f} of vit_b")


def main() -> None:
    """Print one row for each data set, one for their mean, and one for all objects whatever their set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--weights", type=Path, default=TINY_WEIGHTS)
    parser.add_argument("--clicks", type=int, default=15)
    parser.add_argument("--limit", type=int, default=None, help="objects per data set, evenly spaced")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--whole", action="store_true", help="do not look at the object from near")
    parser.add_argument("--unguided", action="store_true", help="do not move borders of masks to the image's")
    parser.add_argument("--speed", action="store_true", help="time encoder and clicks beside ViT-B's")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.speed:
        speed(rounds=3)
    if not options.folders:
        return
    backbone = build("tiny", checkpoint=options.weights, device="cpu", zoom="off" if options.whole else "on")
    backbone.guided = not options.unguided
    columns = [click for click in (1, 2, 3, 5, 10, 15) if click <= options.clicks]
    print("| set | objects | " + " | ".join(f"click {c}" for c in columns) + " | last minus best | Spearman |")
    print("|---" * (len(columns) + 4) + "|")
    curves, every = [], []
    for folder in options.folders:
        measured = [click_through(backbone, p, options.clicks) for p in subset(read_pairs(folder), options.limit)]
        true, predicted = (np.stack(values) for values in zip(*measured, strict=True))
        every.append((true, predicted))
        curves.append((folder.name, len(true), true.mean(0), spearmanr(true.ravel(), predicted.ravel()).statistic))
        print(_row(*curves[-1], columns), flush=True)
    total = sum(count for _, count, _, _ in curves)
    curve, rank = np.mean([c for _, _, c, _ in curves], 0), float(np.mean([r for *_, r in curves]))
    print(_row("**mean of sets**", total, curve, rank, columns))
    true, predicted = (np.concatenate(values) for values in zip(*every, strict=True))
    rank = float(spearmanr(true.ravel(), predicted.ravel()).statistic)
    print(_row("all objects as one set", total, true.mean(0), rank, columns))


def _row(name: str, count: int, curve: NDArray[np.float64], rank: float, columns: list[int]) -> str:
    values = " | ".join(f"{curve[click - 1]:.3f}" for click in columns)
    return f"| {name} | {count} | {values} | {curve[-1] - curve.max():.3f} | {rank:.2f} |"


if __name__ == "__main__":
    main()

"""What learning from a few annotated images brings on other images of the same kind; see docs/results/learning.md.

`python scripts/measure_learning.py --data DIR`: the images of the folder are split in halves. The masks of 50 images of
the first half are learnt from, exactly as `bald-sam train --project` does it (which holds out a quarter of them in
turn, to decide). Then the shipped head, none (SAM's own mask) and the new head play full sessions with the exact
simulated user on objects of the second half, or of another folder with `--other DIR`.
"""

from __future__ import annotations

import base64
import json
import tempfile
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from evaluation import metrics
from evaluation.calibration import with_head
from evaluation.datasets import Pair, read_pairs, subset
from evaluation.learning import learn
from evaluation.session import Session
from worker import brush_rle
from worker.contract import ImageRef, LabelledObject, RuntimeOptions, TrainJob
from worker.head.store import channels_of, find_head
from worker.runtime import Runtime


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path), help="Folder with metadata.json.")
@click.option("--other", type=click.Path(exists=True, path_type=Path), help="Folder to judge on, not the second half.")
@click.option("--images", default=50, show_default=True, help="Annotated images to learn from.")
@click.option("--per-image", default=3, show_default=True, help="Objects of each image.")
@click.option("--judge", default=50, show_default=True, help="Objects of the other half to judge on.")
@click.option("--clicks", default=15, show_default=True)
@click.option("--backbone", default="tiny", show_default=True)
@click.option("--strategy", default="default", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="JSON file with the figures.")
def main(
    data: Path,
    other: Path | None,
    images: int,
    per_image: int,
    judge: int,
    clicks: int,
    backbone: str,
    strategy: str,
    seed: int,
    out: Path | None,
) -> None:
    """Learn from one half of a folder, judge on the other."""
    torch.set_num_threads(1)
    began = time.monotonic()
    pairs = read_pairs(data, per_image=per_image, seed=seed)
    names = sorted({pair.image for pair in pairs})
    order = np.random.default_rng(seed).permutation(len(names))
    first = [names[i] for i in order[: len(names) // 2]][:images]
    second = {names[i] for i in order[len(names) // 2 :]}
    apart = [pair for pair in pairs if pair.image in second] if other is None else read_pairs(other, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        options = RuntimeOptions(
            data_dir=Path(folder), backbone=backbone, strategy=strategy, local_roots=(data.resolve(),), cache_mb=64
        )
        current = Runtime(options)
        objects = tuple(labelled(pair, first.index(pair.image)) for pair in pairs if pair.image in first)
        job = TrainJob(project=1, objects=objects, clicks=clicks, seed=seed, force=True)
        result = learn(job, current, report=told)
        click.echo(result.model_dump_json(indent=1), err=True)
        channels = channels_of(current.backbone.sam)
        heads = {
            name: find_head(name, backbone_id=current.backbone.id, channels=channels, data_dir=options.data_dir)
            for name in ("none", "shipped", result.head)
        }
        chosen = subset(apart, judge)
        curves: dict[str, list[list[float]]] = {name: [] for name in heads}
        for number, pair in enumerate(chosen, 1):
            session = Session.open(current.backbone, current.proposer, pair)
            for name, head in heads.items():
                mine = replace(session, proposer=with_head(session.proposer, head))
                rows = mine.play(session.proposer.strategy.name, seed, clicks)
                curves[name].append([float(str(row["iou"])) for row in rows])
            told("judging elsewhere", number, len(chosen))
    groups = [pair.image.name for pair in chosen]
    found: dict[str, Any] = {
        "data": json.loads((data / "metadata.json").read_text()).get("name", data.name),
        "backbone": current.backbone.id,
        "strategy": current.proposer.strategy.name,
        "shipped": heads["shipped"].id,
        "judged_on": "the other half" if other is None else other.name,
        "learnt_from": {"images": len(first), "objects": len(objects)},
        "decision": result.model_dump(mode="json", exclude={"skipped", "used", "reason", "project"}),
        "judged": {"images": len(set(groups)), "objects": len(chosen)},
        "heads": {name: summary(np.array(values)) for name, values in curves.items()},
        "gain": {name: gain(curves[result.head], curves[name], groups) for name in ("shipped", "none")},
        "seconds": round(time.monotonic() - began),
    }
    text = json.dumps(found, indent=1)
    click.echo(text)
    if out is not None:
        out.write_text(text + "\n")


def labelled(pair: Pair, task: int) -> LabelledObject:
    """A pair as an annotator's submitted mask."""
    mask = pair.read_mask()
    packed = base64.b64encode(zlib.compress(bytes(brush_rle.encode(mask)))).decode()
    image = ImageRef(url=str(pair.image.resolve()), task=task, project=1)
    return LabelledObject(image=image, region=pair.name, width=mask.shape[1], height=mask.shape[0], mask=packed)


def summary(curves: NDArray[np.float64]) -> dict[str, float]:
    """Means over objects of what `bald-sam evaluate` reports for each."""
    measures = [metrics.object_measures(curve) for curve in curves]
    names = ("auc", "iou_1", "iou_final", "noc85", "failures85")
    return {name: round(float(np.mean([one[name] for one in measures])), 4) for name in names}


def gain(new: list[list[float]], old: list[list[float]], groups: list[str]) -> dict[str, float]:
    """Mean paired difference of AUC, with its 95 % interval by bootstrap over images."""
    values = np.array([metrics.auc(np.array(a)) - metrics.auc(np.array(b)) for a, b in zip(new, old, strict=True)])
    low, high = metrics.bootstrap(values, groups)
    return {"mean": round(float(values.mean()), 4), "low": round(low, 4), "high": round(high, 4)}


def told(stage: str, done: int, total: int) -> None:
    """Progress on stderr."""
    click.echo(f"\r{stage} {done}/{total}    ", nl=done == total, err=True)


if __name__ == "__main__":
    main()

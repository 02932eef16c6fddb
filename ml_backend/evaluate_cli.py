"""`bald-sam evaluate`, `train` and `heads`. Everything that needs torch is imported when a command runs."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from ml_backend.settings import Settings

if TYPE_CHECKING:
    from evaluation.datasets import Pair
    from evaluation.run import Setup
    from worker.backbones import Backbone
    from worker.head.store import Head

DATA = click.option(
    "--data",
    "folders",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="Folder with a metadata.json (repeatable).",
)
BACKBONE = click.option("--backbone", default=None, help="tiny, mobile_sam, vit_b, vit_l or vit_h.")
CHECKPOINT = click.option(
    "--checkpoint", type=click.Path(path_type=Path), default=None, help="Weights of the backbone."
)
DEVICE = click.option("--device", default=None, help="auto, cpu, cuda, cuda:1, mps.")


def fail(message: str) -> NoReturn:
    """One line on stderr, exit status 2."""
    click.echo(message, err=True)
    sys.exit(2)


@click.command()
@DATA
@click.option("--strategies", default="default,entropy,random,oracle", help="Comma-separated names.", show_default=True)
@click.option("--clicks", default=15, type=click.IntRange(2), help="Clicks per object.", show_default=True)
@click.option("--seeds", default=3, type=click.IntRange(1), help="Runs of strategies that draw.", show_default=True)
@BACKBONE
@CHECKPOINT
@DEVICE
@click.option("--head", default=None, help="Name or path of a head, default, or none for SAM's own mask.")
@click.option("--limit", type=click.IntRange(1), default=None, help="At most this many pairs per folder.")
@click.option("--jobs", default=1, type=click.IntRange(1), help="Processes.", show_default=True)
@click.option("--random-weights", is_flag=True, help="Only try the mechanics of a backbone without its checkpoint.")
@click.option("--film", default=1, type=click.IntRange(0), help="Film strips to draw per folder.", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print summary.json instead of a table.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder for clicks.csv, summary.json, plots."
)
def evaluate(
    folders: tuple[Path, ...],
    strategies: str,
    clicks: int,
    seeds: int,
    backbone: str | None,
    checkpoint: Path | None,
    device: str | None,
    head: str | None,
    limit: int | None,
    jobs: int,
    random_weights: bool,
    film: int,
    as_json: bool,
    out: Path,
) -> None:
    """Compare strategies with a simulated annotator who answers with the truth.

    A run that was stopped goes on where it was when it is started again with the same --out.
    """
    from evaluation import plots, summary
    from evaluation.datasets import read_pairs, subset
    from evaluation.run import Setup, is_random, run
    from worker import acquisition

    settings = Settings()
    names = [name.strip() for name in strategies.split(",") if name.strip()]
    names = list(dict.fromkeys(acquisition.DEFAULT if name == "default" else name for name in names))
    try:
        for name in names:
            is_random(name)
        pairs = [pair for folder in folders for pair in subset(read_pairs(folder), limit)]
        setup = Setup(
            backbone=backbone or settings.backbone,
            checkpoint=checkpoint or settings.checkpoint,
            device=device or settings.device,
            head=head or settings.head,
            data_dir=settings.data_dir,
            strategies=tuple(names),
            clicks=clicks,
            seeds=seeds,
            random_weights=random_weights,
            threads=1,
        )
        same_setup_or_fail(setup, out)
        run(setup, pairs, out / "clicks.csv", jobs=jobs, progress=_progress())
    except ValueError as error:
        fail(str(error))
    wanted = {(pair.dataset, pair.name) for pair in pairs}
    rows = summary.read_clicks(out / "clicks.csv")
    rows = rows[[key in wanted for key in zip(rows["dataset"], rows["pair"], strict=True)]]
    rows = rows[rows["strategy"].isin(names)]
    result = summary.summarise(rows, {(pair.dataset, pair.name): str(pair.image) for pair in pairs})
    summary.write_summary(result, out / "summary.json")
    plots.curves(rows, out / "curves.png")
    plots.curves(rows, out / "curves_normalised.png", normalised=True)
    plots.average_ranks(result, out / "ranks.png")
    _films(setup, pairs, film, out)
    click.echo(json.dumps(result, indent=1) if as_json else _table(result["overall"]))


def same_setup_or_fail(setup: Setup, out: Path) -> None:
    """Keep what a run was made with beside its results; refuse to mix two set-ups in one folder (ValueError)."""
    described = {
        "backbone": setup.backbone,
        "checkpoint": str(setup.checkpoint or ""),
        "head": setup.head,
        "clicks": setup.clicks,
        "random_weights": setup.random_weights,
    }
    path = out / "setup.json"
    if path.is_file() and json.loads(path.read_text()) != described:
        raise ValueError(f"{out} holds results of another set-up (see {path}). Choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(described, indent=1) + "\n")


class _progress:  # noqa: N801 - used as a function
    """A line on stderr with an estimate of the time left, at most once a second."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.shown = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self.shown < 1.0:
            return
        self.shown = now
        left = (now - self.began) / done * (total - done)
        end = "\n" if done == total else ""
        click.echo(f"\r{done}/{total} objects, {left / 60:.1f} min left  {end}", nl=False, err=True)


def _films(setup: Setup, pairs: list[Pair], count: int, out: Path) -> None:
    from evaluation.film import draw_film
    from evaluation.session import USERS

    strategy = next((name for name in setup.strategies if name not in USERS), None)
    drawn: dict[str, int] = {}
    for pair in pairs:
        if strategy is None or drawn.get(pair.dataset, 0) >= count:
            continue
        path = out / f"film_{pair.dataset}_{drawn.get(pair.dataset, 0)}.png"
        drawn[pair.dataset] = drawn.get(pair.dataset, 0) + 1
        if not path.is_file():
            draw_film(setup, pair, strategy, path, clicks=min(6, setup.clicks))


def _table(overall: dict[str, dict[str, float]]) -> str:
    lines = [f"{'strategy':<18}{'AUC':>8}{'IoU end':>9}{'best':>8}{'NoC@85':>8}{'NoC@90':>8}{'fail85':>8}{'rank':>7}"]
    for name, row in sorted(overall.items(), key=lambda item: -item[1]["auc"]):
        lines.append(
            f"{name:<18}{row['auc']:>8.4f}{row['iou_final']:>9.4f}{row['best_iou']:>8.4f}{row['noc85']:>8.2f}"
            f"{row['noc90']:>8.2f}{row['failures85']:>8.1f}{row['rank']:>7.2f}"
        )
    return "\n".join(lines)


@click.group()
def heads() -> None:
    """List the trained heads and choose one."""


@heads.command("list")
@click.option("--json", "as_json", is_flag=True)
def heads_list(as_json: bool) -> None:
    """Heads in the data directory and the shipped one; a star marks the default."""
    from worker.head.store import SHIPPED, chosen_head, load_head

    root = Settings().data_dir
    chosen = chosen_head(root)
    rows = []
    for path in [*sorted((root / "heads").glob("*/head.safetensors")), SHIPPED]:
        if not path.is_file():
            continue
        try:
            head = load_head(path)
        except ValueError as error:
            click.echo(str(error), err=True)
            continue
        name = "shipped" if path == SHIPPED else path.parent.name
        rows.append({"name": name, "backbone": head.backbone, "id": head.id, "default": path == (chosen or SHIPPED)})
    if as_json:
        click.echo(json.dumps(rows, indent=1))
    elif not rows:
        click.echo("There is no trained head. `bald-sam train` makes one.")
    for row in () if as_json else rows:
        click.echo(f"{'*' if row['default'] else ' '} {row['name']:<24}{row['backbone']:<24}{row['id']}")


@heads.command("use")
@click.argument("name")
def heads_use(name: str) -> None:
    """Make the head NAME the default of this data directory; `shipped` goes back to the shipped one."""
    from worker.head.store import load_head

    root = Settings().data_dir / "heads"
    if name == "shipped":
        (root / "default").unlink(missing_ok=True)
        click.echo("Using the shipped head.")
        return
    try:
        head = load_head(root / name / "head.safetensors")
    except ValueError as error:
        fail(str(error))
    (root / "default").write_text(name + "\n")
    click.echo(f"Using {head.id} for {head.backbone}. Running workers take it up when they are restarted.")


def _calibrated(head: Head, model: Backbone, apart: list[Pair], settings: Settings) -> Head:
    """The head with what full sessions on objects kept apart decide.

    Whose mask is shown (the one with the larger mean IoU), and the score under which the default strategy stops.
    """
    from dataclasses import replace

    import pandas as pd
    import torch

    from evaluation.session import Session
    from evaluation.stopping import choose, trades
    from worker import acquisition
    from worker.embeddings import encode
    from worker.proposer import Proposer

    strategy = acquisition.DEFAULT
    played: dict[str, list[dict[str, object]]] = {"sam": [], "head": []}
    with torch.inference_mode():
        for pair in apart:
            image = pair.read_image()
            embedding = encode(model, image)
            key = {"dataset": pair.dataset, "pair": pair.name, "seed": 0, "strategy": strategy}
            for shows, rows in played.items():
                proposer = Proposer(model, head="none", strategy=strategy, data_dir=settings.data_dir, stop=False)
                proposer.head = replace(head, shows=shows)
                session = Session(model, proposer, embedding, image, pair.read_mask(), pair.read_ignore())
                rows += [{**key, **row} for row in session.play(strategy, 0, 15)]
    frames = {shows: pd.DataFrame(rows) for shows, rows in played.items()}
    ious = {shows: float(frame["iou"].mean()) for shows, frame in frames.items()}
    shows = max(ious, key=lambda name: ious[name])
    frame = frames[shows].assign(score=pd.to_numeric(frames[shows]["score"]))
    chosen = choose(trades(frame, strategy))
    click.echo(f"Mean IoU over 15 clicks: SAM's mask {ious['sam']:.4f}, the head's {ious['head']:.4f}.")
    click.echo(
        f"Stopping under {chosen.threshold:.4g} saves {chosen.saved:.0%} of the clicks for {chosen.lost:.4f} IoU."
    )
    stopping = {"objects": len(apart), "saved": chosen.saved, "lost": chosen.lost, "mean_iou": ious}
    notes = {**head.notes, "calibration": stopping}
    return replace(head, shows=shows, stop={strategy: chosen.threshold}, notes=notes)


@click.command()
@DATA
@click.option("--name", required=True, help="Name of the head; it is kept in the data directory.")
@BACKBONE
@CHECKPOINT
@DEVICE
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Write to this .safetensors file instead.")
@click.option("--objects", default=600, type=click.IntRange(1), help="At most this many objects.", show_default=True)
@click.option("--per-image", default=2, type=click.IntRange(1), help="Objects of one image.", show_default=True)
@click.option("--clicks", default=6, type=click.IntRange(1), help="States of each object.", show_default=True)
@click.option("--effective", default=40.0, help="Independent pixels that one state counts as.", show_default=True)
@click.option("--calibrate", default=60, type=click.IntRange(0), help="Objects kept apart for calibration.")
@click.option("--seed", default=0, show_default=True)
def train(
    folders: tuple[Path, ...],
    name: str,
    backbone: str | None,
    checkpoint: Path | None,
    device: str | None,
    out: Path | None,
    objects: int,
    per_image: int,
    clicks: int,
    effective: float,
    calibrate: int,
    seed: int,
) -> None:
    """Fit a head and its posterior to simulated click sessions on folders of images and masks."""
    import torch

    from evaluation.datasets import read_pairs, subset
    from worker.backbones import build
    from worker.head.fit import FitOptions
    from worker.head.store import save_head
    from worker.training import SessionOptions, train_head

    settings = Settings()
    show = _progress()
    # A decode of a small model on the CPU is too short to share out: threads that wait cost more than they bring.
    torch.set_num_threads(1)
    try:
        share = -(-objects // len(folders))
        examples = [
            pair for folder in folders for pair in subset(read_pairs(folder, per_image=per_image, seed=seed), share)
        ]
        apart = subset(examples, calibrate) if 2 * calibrate < len(examples) else []
        images = {pair.image for pair in apart}
        examples = [pair for pair in examples if pair.image not in images]
        model = build(
            backbone or settings.backbone,
            checkpoint=checkpoint or settings.checkpoint,
            device=device or settings.device,
            data_dir=settings.data_dir,
        )
        head = train_head(
            model,
            examples,
            SessionOptions(clicks=clicks, seed=seed),
            FitOptions(effective=effective),
            notes={"sets": sorted({pair.dataset for pair in examples})},
            progress=lambda done: show(done, len(examples)),
        )
    except ValueError as error:
        fail(str(error))
    path = out or settings.data_dir / "heads" / name / "head.safetensors"
    save_head(head, path)
    if apart and calibrate:
        head = _calibrated(head, model, apart, settings)
        save_head(head, path)
    click.echo(f"{path}: {head.notes['states']} states of {head.notes['objects']} objects.")
    if out is None:
        click.echo(f"Use it with `bald-sam heads use {name}`, or `--head {name}`.")

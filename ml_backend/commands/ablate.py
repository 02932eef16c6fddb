"""`bald-sam ablate`: backbones x Laplace settings. Everything that needs torch is imported when the command runs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ml_backend.cli import fail, load_settings
from ml_backend.commands.evaluate import progress_line, same_setup_or_fail
from ml_backend.commands.options import DATA, DEVICE

if TYPE_CHECKING:
    from evaluation.datasets import Pair
    from evaluation.laplace_settings import Setting
    from evaluation.run import Setup
    from worker.head.fit import Pixels

#: Played beside the settings, with the head of `none`: SAM's mask, and what can be asked without a fit.
REFERENCES = ("bald", "bald-online", "entropy", "error-region", "random", "oracle")


@click.command()
@click.option(
    "--train",
    "training",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="Folder that heads are fitted to (repeatable).",
)
@DATA
@click.option(
    "--backbones",
    default="tiny,tiny@256,vit_b",
    show_default=True,
    help="Comma-separated. tiny@256: tiny with an input of 256 x 256.",
)
@click.option(
    "--random-weights", is_flag=True, help="Only try the mechanics of published backbones without their file."
)
@DEVICE
@click.option("--settings", "names", help="Only these settings or axes, comma-separated.  [all 35]")
@click.option("--objects", default=150, type=click.IntRange(10), help="Training objects.", show_default=True)
@click.option("--limit", default=3, type=click.IntRange(1), help="Objects of each --data folder.", show_default=True)
@click.option("--clicks", default=8, type=click.IntRange(2), help="Clicks per object.", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for tables and plots.")
def ablate(
    training: tuple[Path, ...],
    folders: tuple[Path, ...],
    backbones: str,
    random_weights: bool,
    device: str | None,
    names: str | None,
    objects: int,
    limit: int,
    clicks: int,
    seed: int,
    out: Path,
) -> None:
    """Compare Laplace settings by the pixels they predict and by the clicks that their BALD asks for.

    SAM's own mask is shown throughout. A run that was stopped goes on when it is started again with the same --out.
    """
    from evaluation import laplace_settings
    from evaluation.datasets import read_pairs, subset
    from worker.backbones.checkpoints import CheckpointError

    try:
        settings = laplace_settings.chosen(names)
        share = -(-objects // len(training))
        examples = [pair for folder in training for pair in subset(read_pairs(folder, per_image=1, seed=seed), share)]
        pairs = [pair for folder in folders for pair in subset(read_pairs(folder), limit)]
        tables = [
            _backbone(name.strip(), settings, examples, pairs, out, random_weights, device, clicks, seed)
            for name in backbones.split(",")
        ]
    except (ValueError, CheckpointError) as error:
        fail(str(error))
    _write(tables, out)


def _backbone(
    name: str,
    settings: tuple[Setting, ...],
    examples: list[Pair],
    pairs: list[Pair],
    out: Path,
    random_weights: bool,
    device: str | None,
    clicks: int,
    seed: int,
) -> Any:
    """Fit and play all settings on one backbone; returns its table."""
    from evaluation import ablation, summary
    from evaluation.ablation_report import table
    from evaluation.run import run

    folder = out / name
    setup, shown = _setup(name, folder, random_weights, device, clicks)
    same_setup_or_fail(setup, folder)
    click.echo(f"{shown}: collecting pixels of {len(examples)} objects", err=True)
    rows = ablation.split(_pixels(setup, examples, folder, seed), seed=seed)
    fitter = ablation.Fitter(rows, seed=seed)
    fits, strategies = [], []
    for setting in settings:
        fitted = fitter.fit(setting)
        fits.append(fitted.described())
        if fitted.posterior is not None:
            strategies.append(ablation.register(fitted, fitter.rows(setting.kind).scale))
        click.echo(f"  {setting.name}: {fitted.refused or _measured(fitted.measures)}", err=True)
    (folder / "fits.json").write_text(json.dumps(fits, indent=1) + "\n")
    played = replace(setup, strategies=(*strategies, *REFERENCES))
    run(played, pairs, folder / "clicks.csv", progress=progress_line())
    images = {(pair.dataset, pair.name): str(pair.image) for pair in pairs}
    return table(summary.read_clicks(folder / "clicks.csv", images, played.strategies), fits, images, shown)


def _setup(name: str, folder: Path, random_weights: bool, device: str | None, clicks: int) -> tuple[Setup, str]:
    """How to build a backbone of the list, and what to call it. Raises ValueError for one that is not there."""
    from evaluation.run import Setup
    from worker.backbones import BACKBONES, TINY_WEIGHTS
    from worker.backbones.checkpoints import checkpoint_path, file_sha256
    from worker.backbones.tiny import load_tiny, resize_tiny, save_tiny

    options = load_settings()
    kind, _, size = name.partition("@")
    checkpoint = None
    if kind not in BACKBONES or (size and (kind != "tiny" or not size.isdigit())):
        raise ValueError(f"There is no backbone {name!r}. Choose of {', '.join(BACKBONES)}, tiny@256 and the like.")
    if size:
        # Written once: the same weights do not give the same file twice, and the file's hash is the backbone's id.
        checkpoint = folder / f"tiny-{file_sha256(TINY_WEIGHTS)[:12]}.safetensors"
        if not checkpoint.is_file():
            sam = load_tiny(TINY_WEIGHTS)
            resize_tiny(sam, int(size))
            folder.mkdir(parents=True, exist_ok=True)
            save_tiny(sam, checkpoint)
    published = BACKBONES[kind].checkpoint
    missing = published is not None and not checkpoint_path(published, options.data_dir).exists()
    noise = missing and random_weights
    setup = Setup(
        kind, checkpoint, device or options.device, "none", options.data_dir, (), clicks, 1, random_weights=noise
    )
    return setup, f"{name}, random weights" if noise else name


def _pixels(setup: Setup, examples: list[Pair], folder: Path, seed: int) -> Pixels:
    """Pixels of simulated sessions on the training objects, kept in the folder for the next start."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from evaluation.run import model
    from worker.head.features import pixel_features
    from worker.head.fit import Pixels
    from worker.head.network import with_neighbours
    from worker.training import SessionOptions, collect

    path = folder / "pixels.safetensors"
    backbone, _ = model(setup)
    names = "\n".join(f"{pair.dataset}/{pair.name}" for pair in examples)
    drawn_from = hashlib.sha256(f"{backbone.id} {seed}\n{names}".encode()).hexdigest()
    if path.is_file():
        with safe_open(path, "pt") as file:
            # The clicks beside it were asked for by heads that were fitted to these pixels.
            if file.metadata().get("of") != drawn_from:
                raise ValueError(f"{folder} holds results of other weights or training objects. Choose another --out.")
        return Pixels(names=[], **load_file(path))
    progress = progress_line()
    pixels = collect(
        backbone,
        examples,
        SessionOptions(pixels=128, seed=seed),
        features=lambda decoded, prompts: with_neighbours(pixel_features(decoded, prompts)),
        progress=lambda done: progress(done, len(examples)),
    )
    tensors = {key: getattr(pixels, key) for key in ("features", "labels", "weights", "objects", "clicks")}
    save_file(tensors, path, {"of": drawn_from})
    return Pixels(names=[], **tensors)


def _measured(measures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in measures.items())


def _write(tables: list[Any], out: Path) -> None:
    import pandas as pd

    from evaluation.ablation_report import markdown, plot_axis

    frame = pd.concat(tables, ignore_index=True)
    frame.to_csv(out / "ablation.csv", index=False)
    text = "\n".join(f"## {name}\n\n{markdown(part)}" for name, part in frame.groupby("backbone", sort=False))
    (out / "ablation.md").write_text(text)
    for axis in dict.fromkeys(frame["axis"]):
        plot_axis(frame, axis, out / f"ablation_{axis}.png")
    click.echo(f"{out / 'ablation.md'}, {out / 'ablation.csv'} and a figure for each axis are written.")

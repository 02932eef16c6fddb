"""`bald-sam evaluate`. Everything that needs torch is imported when a command runs."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ml_backend.cli import fail, load_settings
from ml_backend.commands.options import BACKBONE, CHECKPOINT, DATA, DEVICE

if TYPE_CHECKING:
    from evaluation.datasets import Pair
    from evaluation.replay import Recordings
    from evaluation.run import Setup


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
@click.option(
    "--sessions",
    type=click.Path(path_type=Path),
    default=None,
    help="File of `bald-sam clicks export`: adds the strategy `human`, what annotators did on these objects.",
)
@click.option("--jobs", default=1, type=click.IntRange(1), help="Processes.", show_default=True)
@click.option("--zoom", type=click.Choice(["auto", "on", "off"]), help="Look at the object from near after a click.")
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
    sessions: Path | None,
    jobs: int,
    zoom: str | None,
    random_weights: bool,
    film: int,
    as_json: bool,
    out: Path,
) -> None:
    """Compare strategies with a simulated annotator who answers with the truth.

    A run that was stopped goes on where it was when it is started again with the same --out.
    """
    from evaluation import metrics, plots, summary
    from evaluation.datasets import read_pairs, subset
    from evaluation.run import Setup, is_random, model, run
    from evaluation.session import HUMAN
    from worker import acquisition
    from worker.backbones.checkpoints import CheckpointError

    settings = load_settings()
    names = [name.strip() for name in strategies.split(",") if name.strip()]
    names = list(dict.fromkeys(acquisition.DEFAULT if name == "default" else name for name in names))
    played = [name for name in names if name != HUMAN]
    try:
        for name in played:
            is_random(name)
        if sessions is None and played != names:
            raise ValueError("`human` replays annotators' clicks: give --sessions, a file of `bald-sam clicks export`.")
        pairs = [pair for folder in folders for pair in subset(read_pairs(folder), limit)]
        recorded: Recordings = {}
        if sessions is not None:
            pairs, recorded = _recorded(sessions, pairs)
            names = [*played, HUMAN]
        setup = Setup(
            backbone=backbone or settings.backbone,
            checkpoint=checkpoint or settings.checkpoint,
            device=device or settings.device,
            head=head or settings.head,
            data_dir=settings.data_dir,
            strategies=tuple(played),
            clicks=clicks,
            seeds=seeds,
            zoom=zoom or settings.zoom,
            random_weights=random_weights,
            threads=1,
        )
        same_setup_or_fail(setup, out, sessions)
        run(setup, pairs, out / "clicks.csv", jobs=jobs, progress=progress_line(), recorded=recorded)
    except (ValueError, CheckpointError) as error:
        fail(str(error))
    images = {(pair.dataset, pair.name): str(pair.image) for pair in pairs}
    rows = summary.read_clicks(out / "clicks.csv", images, names)
    _, proposer = model(setup)
    thin = {(pair.dataset, pair.name) for pair in pairs if metrics.disc_share(pair.read_mask()) < metrics.THIN}
    result = summary.summarise(rows, images, thin=thin, stops=proposer.head.stop)
    summary.write_summary(result, out / "summary.json")
    plots.curves(rows, out / "curves.png")
    plots.curves(rows, out / "curves_normalised.png", normalised=True)
    plots.average_ranks(result, out / "ranks.png")
    _films(setup, pairs, film, out)
    click.echo(json.dumps(result, indent=1) if as_json else _table(result["overall"]))


def _recorded(path: Path, pairs: list[Pair]) -> tuple[list[Pair], Recordings]:
    """The pairs on which annotators worked, and their sessions: all strategies are compared on the same objects."""
    from evaluation.replay import assign, read_sessions

    sessions = read_sessions(path)
    recorded = assign(sessions, pairs)
    if not recorded:
        raise ValueError(
            f"None of the {len(sessions)} sessions of {path} is on an object of --data. Image files must have the "
            "names that they had when they were imported into Label Studio, and the clicks must be on the objects."
        )
    known = [pair for pair in pairs if (pair.dataset, pair.name) in recorded]
    used = sum(map(len, recorded.values()))
    click.echo(
        f"{used} of {len(sessions)} sessions are on {len(known)} of {len(pairs)} objects; "
        "only these objects are evaluated.",
        err=True,
    )
    return known, recorded


def same_setup_or_fail(setup: Setup, out: Path, sessions: Path | None = None) -> None:
    """Keep what a run was made with beside its results; refuse to mix two set-ups in one folder (ValueError)."""
    described = {
        "backbone": setup.backbone,
        "checkpoint": str(setup.checkpoint or ""),
        "head": setup.head,
        "clicks": setup.clicks,
        "zoom": setup.zoom,
        "random_weights": setup.random_weights,
    }
    if sessions is not None:
        described["sessions"] = hashlib.sha256(sessions.read_bytes()).hexdigest()
    path = out / "setup.json"
    if path.is_file() and json.loads(path.read_text()) != described:
        raise ValueError(f"{out} holds results of another set-up (see {path}). Choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(described, indent=1) + "\n")


class progress_line:  # noqa: N801 - used as a function
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

"""`bald-sam models`: which backbones there are, and getting their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ml_backend.cli import load_settings

if TYPE_CHECKING:
    from worker.backbones import BackboneSpec

MB = 1_000_000
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for a script.")


@click.group()
def models() -> None:
    """List, download and inspect backbones."""


@models.command("list")
@as_json
def list_models(as_json: bool) -> None:
    """Show every backbone, and which weights are on this machine."""
    rows = [_summary(spec) for spec in _registry().values()]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "size", "here", "licence", "source")
    for row in rows:
        here = "ships with it" if row["url"] is None else "yes" if row["present"] else "no"
        table.add_row(row["name"], f"{row['bytes'] / MB:,.1f} MB", here, row["licence"], row["source"])
    Console().print(table)


@models.command()
@click.argument("name")
@as_json
def download(name: str, as_json: bool) -> None:
    """Download and verify the published weights of NAME."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from worker.backbones.checkpoints import CheckpointError
    from worker.backbones.checkpoints import download as fetch

    checkpoint = _spec(name).checkpoint
    if checkpoint is None:
        _say(as_json, f"The weights of {name} ship with bald-sam; there is nothing to download.", _summary(_spec(name)))
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    try:
        with Progress(*columns, console=Console(stderr=True), disable=as_json) as progress:
            task = progress.add_task(checkpoint.file, total=checkpoint.size)
            path = fetch(checkpoint, load_settings().data_dir, lambda count: progress.update(task, completed=count))
    except CheckpointError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(
            f"Could not write the file ({error}). Free some space, or set BALD_SAM_DATA_DIR to another folder."
        ) from error
    _say(as_json, f"{path} is verified. Use it with BALD_SAM_BACKBONE={name}.", _summary(_spec(name)))


@models.command()
@click.argument("name")
@as_json
def info(name: str, as_json: bool) -> None:
    """Show the sizes of NAME and verify its weights, where they are on this machine."""
    import torch

    from worker.backbones.checkpoints import file_sha256

    spec = _spec(name)
    row = _summary(spec)
    if row["present"]:
        row["sha256_here"] = file_sha256(Path(row["path"]))
        row["verified"] = spec.checkpoint is None or row["sha256_here"] == spec.checkpoint.sha256
    with torch.device("meta"):  # sizes without memory
        sam = spec.builder()
    row["parameters"] = sum(parameter.numel() for parameter in sam.parameters())
    row["encoder_parameters"] = sum(parameter.numel() for parameter in sam.image_encoder.parameters())
    row["image_size"] = sam.image_encoder.img_size
    row["embedding"] = [sam.prompt_encoder.embed_dim, *sam.prompt_encoder.image_embedding_size]
    if as_json:
        click.echo(json.dumps(row, indent=2))
    else:
        for field, value in row.items():
            click.echo(f"{field:18} {'-' if value is None else value}")
    if row.get("verified") is False:
        raise click.ClickException(
            f"{row['path']} is not the published file. Delete it and run `bald-sam models download {name}`."
        )


def _registry() -> dict[str, BackboneSpec]:
    try:
        from worker.backbones import BACKBONES
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"This needs the worker's packages ({error.name} is missing). Install them: pip install 'bald-sam[worker]'"
        ) from error
    return BACKBONES


def _spec(name: str) -> BackboneSpec:
    registry = _registry()
    if name not in registry:
        raise click.UsageError(f"There is no backbone called {name!r}. Choose one of: {', '.join(registry)}.")
    return registry[name]


def _summary(spec: BackboneSpec) -> dict[str, Any]:
    from worker.backbones import TINY_WEIGHTS
    from worker.backbones.checkpoints import checkpoint_path

    published = spec.checkpoint
    path = TINY_WEIGHTS if published is None else checkpoint_path(published, load_settings().data_dir)
    return {
        "name": spec.name,
        "bytes": path.stat().st_size if published is None else published.size,
        "present": path.exists(),
        "path": str(path),
        "url": published.url if published else None,
        "sha256": published.sha256 if published else None,
        "licence": published.licence if published else "Apache-2.0",
        "source": spec.source,
    }


def _say(as_json: bool, sentence: str, row: dict[str, Any]) -> None:
    click.echo(json.dumps(row, indent=2) if as_json else sentence)

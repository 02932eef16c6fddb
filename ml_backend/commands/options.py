"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path

import click

BACKBONE = click.option("--backbone", help="tiny, mobile_sam, vit_b, vit_l or vit_h.")
CHECKPOINT = click.option("--checkpoint", type=click.Path(path_type=Path), help="Weights of the backbone.")
DEVICE = click.option("--device", help="auto, cpu, cuda, cuda:1, mps.")
HEAD = click.option("--head", help="Name or path of a head; none for SAM's own mask.")
DATA = click.option(
    "--data",
    "folders",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="Folder with a metadata.json (repeatable).",
)
